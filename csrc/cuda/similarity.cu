#include "../similarity.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;  // rows of a block

template <class T>
__device__ __forceinline__ T norm_of(T square) {
  return square > T(1e-16) ? square * inverse_root(square) : T(1e-8);
}

// A warp takes a row.
template <class T, int N>
__global__ void __launch_bounds__(kWarp* kWarps, 1)
    similarity_kernel(const T* __restrict__ anchors, const int64_t* __restrict__ node, const T* __restrict__ negatives,
                      const bool* __restrict__ counted, T scale, T* __restrict__ loss, T* __restrict__ dn, int64_t rows,
                      int64_t D) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  if (!counted[row]) {
    if (threadIdx.x == 0) loss[row] = 0;
    return;
  }
  const T *a = anchors + node[row] * D, *x = negatives + row * D;
  T along = 0, own = 0, others = 0;
  for (int64_t d = threadIdx.x * N; d < D; d += kWarp * N) {
    const Pack<T, N> p = read<T, N>(a + d), q = read<T, N>(x + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      along += p.v[n] * q.v[n];
      own += p.v[n] * p.v[n];
      others += q.v[n] * q.v[n];
    }
  }
  const T norm_a = norm_of(warp_sum(own)), norm_x = norm_of(warp_sum(others));
  const T cosine = warp_sum(along) / (norm_a * norm_x);
  if (threadIdx.x == 0) loss[row] = T(1) - cosine;
  if (!dn) return;
  const T by = scale / norm_x, of_a = by / norm_a, of_x = by * cosine / norm_x;
  for (int64_t d = threadIdx.x * N; d < D; d += kWarp * N) {
    const Pack<T, N> p = read<T, N>(a + d), q = read<T, N>(x + d);
    Pack<T, N> out = read<T, N>(dn + row * D + d);
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] += of_x * q.v[n] - of_a * p.v[n];
    write(dn + row * D + d, out);
  }
}

}  // namespace

int launch_similarity_forward(const SimilarityForward& args, void* stream) {
  const int64_t D = args.D, blocks = ceil_div(args.N, kWarps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (args.N * D == 0) return cudaSuccess;
  return with_accumulating(args.dtype, [&]<class T>(T*) {
    const T *anchors = typed<T>(args.anchors), *negatives = typed<T>(args.negatives);
    T* dn = typed<T>(args.dn);
    const auto launch = [&](auto kernel) {
      GCAHNG_LAUNCH(kernel, dim3(blocks), dim3(kWarp, kWarps), stream, anchors, args.node, negatives, args.counted,
                    static_cast<T>(args.scale), typed<T>(args.loss), dn, args.N, D);
      return static_cast<int>(cudaGetLastError());
    };
    if (wide<T>(D, anchors, negatives, dn)) return launch(similarity_kernel<T, kWide<T>>);
    return launch(similarity_kernel<T, 1>);
  });
}

}  // namespace gcahng::cuda
