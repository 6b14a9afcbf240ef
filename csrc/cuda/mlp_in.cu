#include "../mlp_in.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kThreads = 256;             // at most, along a row of the forward
constexpr int64_t kForwardBlocks = 4096;  // at most; each takes every so many-th row

// A block takes a row: V values a thread, packs of N. Two places for partial sums, so that none is overwritten before
// every warp has read it.
template <class T, class L, int N, int V>
__global__ void __launch_bounds__(kThreads, 1)
    mlp_in_forward_kernel(const L* h, const T* __restrict__ b, L* g, T* __restrict__ mean, T* __restrict__ rstd,
                          int64_t rows, int64_t W) {
  constexpr int kPacks = V / N;
  GCAHNG_SHARED(T, sums, kThreads / kWarp);
  GCAHNG_SHARED(T, squares, kThreads / kWarp);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto block_sum = [&](T x, T* places) {
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) places[warp] = x;
    __syncthreads();
    T total = 0;
    for (int w = 0; w < warps; ++w) total += places[w];
    return total;
  };
  const auto each = [&](auto f) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t d = (static_cast<int64_t>(k) * blockDim.x + threadIdx.x) * N;
      if (d < W) f(k, d);
    }
  };
  Pack<T, N> bias[kPacks], x[kPacks];
  each([&](int k, int64_t d) { bias[k] = read<T, N>(b + d); });
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T sum = 0, square = 0;
    each([&](int k, int64_t d) { x[k] = read<T, N>(h + row * W + d); });  // all before the first write: g may be h
    each([&](int k, int64_t d) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        x[k].v[n] = widen(narrow<L>(gelu(x[k].v[n] + bias[k].v[n])));  // as the next product reads it
        sum += x[k].v[n];
      }
      write(g + row * W + d, x[k]);
    });
    const T center = block_sum(sum, sums) / T(W);
    each([&](int k, int64_t) {
#pragma unroll
      for (int n = 0; n < N; ++n) square += (x[k].v[n] - center) * (x[k].v[n] - center);
    });
    square = block_sum(square, squares);
    if (threadIdx.x == 0) {
      mean[row] = center;
      rstd[row] = inverse_root(square / T(W) + T(kNormEps));
    }
  }
}

// What a row's gradient needs of it (T,).
template <class T>
struct RowInputs {
  const T *mean, *rstd, *m1, *m2;
};

template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    mlp_in_backward_kernel(ColumnGrid grid, const L* h, const T* __restrict__ b, const L* dn, RowInputs<T> in, L* g,
                           L* dh, T* part) {
  const int64_t column = ((blockIdx.x % grid.tiles) * kColumnLanes + threadIdx.x) * N;
  Pack<T, N> bias{};
  if (column < grid.W) bias = read<T, N>(b + column);
  each_column<1, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>* sums) {
    Pack<T, N> x = read<T, N>(h + row * grid.W + d), above = read<T, N>(dn + row * grid.W + d);
    const T center = in.mean[row], inverse = in.rstd[row], flat = in.m1[row], along = in.m2[row] * inverse;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T at = x.v[n] + bias.v[n], cdf = normal_cdf(at);
      x.v[n] = widen(narrow<L>(at * cdf));
      above.v[n] = (above.v[n] - flat - (x.v[n] - center) * along) * inverse * gelu_slope(at, cdf);
      sums[0].v[n] += above.v[n];
    }
    write(g + row * grid.W + d, x);
    write(dh + row * grid.W + d, above);
  });
}

template <class T, class L, int N, int V>
int forward(const L* h, const T* b, L* g, T* mean, T* rstd, int64_t rows, int64_t W, void* stream) {
  const int64_t threads = ceil_div(ceil_div(W, V), kWarp) * kWarp;
  GCAHNG_LAUNCH((mlp_in_forward_kernel<T, L, N, V>), dim3(rows < kForwardBlocks ? rows : kForwardBlocks), dim3(threads),
                stream, h, b, g, mean, rstd, rows, W);
  return cudaGetLastError();
}

template <class T, class L, int N>
int backward(const L* h, const T* b, const L* dn, RowInputs<T> in, L* g, L* dh, T* db, T* scratch, int64_t rows,
             int64_t W, void* stream) {
  const ColumnGrid grid = column_grid(rows, W, N, sum_rows(rows));
  if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
  T* part = db ? scratch : nullptr;
  GCAHNG_LAUNCH((mlp_in_backward_kernel<T, L, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows), stream, grid,
                h, b, dn, in, g, dh, part);
  const int error = cudaGetLastError();
  return error || !db ? error : launch_add_partials(scratch, db, 1, grid.parts, W, stream);
}

}  // namespace

int launch_mlp_in_forward(DType dtype, DType low_type, const void* h, const void* b, void* g, void* mean, void* rstd,
                          int64_t T, int64_t W, void* stream) {
  if (W > 4 * kMaxChannels) return cudaErrorInvalidValue;
  if (T * W == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L* g_) {
    using A = compute_t<L>;
    const auto* h_ = static_cast<const L*>(h);
    const auto* b_ = static_cast<const A*>(b);
    g_ = static_cast<L*>(g);
    auto* f = !wide<L>(W, h_, b_, g_) ? forward<A, L, 1, 16>
              : W <= 8 * kThreads     ? forward<A, L, kWide<L>, 8>
                                      : forward<A, L, kWide<L>, 16>;
    return f(h_, b_, g_, static_cast<A*>(mean), static_cast<A*>(rstd), T, W, stream);
  });
}

int64_t mlp_in_backward_scratch(int64_t T, int64_t W) { return sum_parts(T) * W; }

int launch_mlp_in_backward(DType dtype, DType low_type, const void* h, const void* b, const void* dn, const void* mean,
                           const void* rstd, const void* m1, const void* m2, void* g, void* dh, void* db, void* scratch,
                           int64_t T, int64_t W, void* stream) {
  if (T * W == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L* g_) {
    using A = compute_t<L>;
    const auto *h_ = static_cast<const L*>(h), *dn_ = static_cast<const L*>(dn);
    const auto* b_ = static_cast<const A*>(b);
    g_ = static_cast<L*>(g);
    auto* dh_ = static_cast<L*>(dh);
    auto *db_ = static_cast<A*>(db), *scratch_ = static_cast<A*>(scratch);
    const RowInputs<A> in{static_cast<const A*>(mean), static_cast<const A*>(rstd), static_cast<const A*>(m1),
                          static_cast<const A*>(m2)};
    auto* f = wide<L>(W, h_, b_, dn_, g_, dh_, scratch_) ? backward<A, L, kWide<L>> : backward<A, L, 1>;
    return f(h_, b_, dn_, in, g_, dh_, db_, scratch_, T, W, stream);
  });
}

}  // namespace gcahng::cuda
