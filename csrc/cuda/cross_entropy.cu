#include "../cross_entropy.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kThreads = 256;  // that share a row
constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// reduce(x, y) over a block's values, the same bits in every thread. places (kWarps): no one else's until the next
// barrier but one.
template <class T, class F>
__device__ __forceinline__ T over_block(T x, T* places, F reduce) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = reduce(x, __shfl_xor_sync(kWholeWarp, x, offset));
  if (threadIdx.x == 0) places[threadIdx.y] = x;
  __syncthreads();
  x = places[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = reduce(x, places[warp]);
  return x;
}

// A block takes a row. d may be the logits: the last barrier stands between all reads for the sums and the writes.
template <class L, int N>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_kernel(const L* logits, const compute_t<L>* __restrict__ bias, const int64_t* __restrict__ labels,
                         compute_t<L> scale, compute_t<L>* __restrict__ loss, L* d, int64_t M) {
  using T = compute_t<L>;
  GCAHNG_SHARED(T, places, 3 * kWarps);
  const int64_t row = blockIdx.x, label = labels[row];
  const L* in = logits + row * M;
  const int64_t start = (static_cast<int64_t>(threadIdx.y) * kWarp + threadIdx.x) * N;
  const auto at = [&](int64_t m) {
    Pack<T, N> x = read<T, N>(in + m);
    const Pack<T, N> shift = read<T, N>(bias + m);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] += shift.v[n];
    return x;
  };
  T most = T(-3.0e38), sum = 0, own = 0;
  for (int64_t m = start; m < M; m += kThreads * N) {
    const Pack<T, N> x = at(m);
#pragma unroll
    for (int n = 0; n < N; ++n) most = larger(most, x.v[n]);
  }
  most = over_block(most, places, [](T a, T b) { return larger(a, b); });
  for (int64_t m = start; m < M; m += kThreads * N) {
    const Pack<T, N> x = at(m);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sum += exponential(x.v[n] - most);
      own += m + n == label ? x.v[n] - most : T(0);
    }
  }
  const auto add = [](T a, T b) { return a + b; };
  sum = over_block(sum, places + kWarps, add);
  own = over_block(own, places + 2 * kWarps, add);
  if (threadIdx.x == 0 && threadIdx.y == 0) loss[row] = logarithm(sum) - own;
  if (!d) return;
  const T each = scale / sum;
  for (int64_t m = start; m < M; m += kThreads * N) {
    Pack<T, N> x = at(m);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = exponential(x.v[n] - most) * each - (m + n == label ? scale : T(0));
    write(d + row * M + m, x);
  }
}

}  // namespace

int launch_cross_entropy_forward(const CrossEntropyForward& args, void* stream) {
  const int64_t M = args.M;
  if (args.R > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (args.R * M == 0) return cudaSuccess;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const L* logits = typed<L>(args.logits);
    const A* bias = typed<A>(args.bias);
    L* d = typed<L>(args.d);
    const auto launch = [&](auto kernel) {
      GCAHNG_LAUNCH(kernel, dim3(args.R), dim3(kWarp, kWarps), stream, logits, bias, args.labels,
                    static_cast<A>(args.scale), typed<A>(args.loss), d, M);
      return static_cast<int>(cudaGetLastError());
    };
    // Addresses of the bias are wide where the logits' are: as many values of a type that is no narrower.
    if (wide<L>(M, logits, d) && wide<A>(M, bias)) return launch(cross_entropy_kernel<L, kWide<L>>);
    return launch(cross_entropy_kernel<L, 1>);
  });
}

}  // namespace gcahng::cuda
