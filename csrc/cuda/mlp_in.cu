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
    mlp_in_forward_kernel(const L* h, const T* __restrict__ bias, L* g, T* __restrict__ mean, T* __restrict__ rstd,
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
  Pack<T, N> shift[kPacks], x[kPacks];
  each([&](int k, int64_t d) { shift[k] = read<T, N>(bias + d); });
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    T sum = 0, square = 0;
    each([&](int k, int64_t d) { x[k] = read<T, N>(h + row * W + d); });  // all before the first write: g may be h
    each([&](int k, int64_t d) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        x[k].v[n] = widen(narrow<L>(gelu(x[k].v[n] + shift[k].v[n])));  // as the next product reads it
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

// NormRows of a type.
template <class T>
struct Rows {
  const T *mean, *rstd, *mean_dn, *mean_n_dn;
};

template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    mlp_in_backward_kernel(ColumnGrid grid, const L* h, const T* __restrict__ bias, const L* dn, Rows<T> in, L* g,
                           L* dh, T* part) {
  const int64_t column = ((blockIdx.x % grid.tiles) * kColumnLanes + threadIdx.x) * N;
  Pack<T, N> shift{};
  if (column < grid.W) shift = read<T, N>(bias + column);
  each_column<1, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>* sums) {
    Pack<T, N> x = read<T, N>(h + row * grid.W + d), above = read<T, N>(dn + row * grid.W + d);
    const T center = in.mean[row], inverse = in.rstd[row], flat = in.mean_dn[row], along = in.mean_n_dn[row] * inverse;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T at = x.v[n] + shift.v[n], cdf = normal_cdf(at);
      x.v[n] = widen(narrow<L>(at * cdf));
      above.v[n] = (above.v[n] - flat - (x.v[n] - center) * along) * inverse * gelu_slope(at, cdf);
      sums[0].v[n] += above.v[n];
    }
    write(g + row * grid.W + d, x);
    write(dh + row * grid.W + d, above);
  });
}

template <class T, class L, int N, int V>
int forward(const MlpInForward& args, void* stream) {
  const int64_t threads = ceil_div(ceil_div(args.W, V), kWarp) * kWarp;
  GCAHNG_LAUNCH((mlp_in_forward_kernel<T, L, N, V>), dim3(args.T < kForwardBlocks ? args.T : kForwardBlocks),
                dim3(threads), stream, typed<L>(args.h), typed<T>(args.bias), typed<L>(args.g), typed<T>(args.mean),
                typed<T>(args.rstd), args.T, args.W);
  return cudaGetLastError();
}

template <class T, class L, int N>
int backward(const MlpInBackward& args, void* scratch, void* stream) {
  const ColumnGrid grid = column_grid(args.T, args.W, N, sum_rows(args.T));
  if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const NormRows& rows = args.rows;
  const Rows<T> in{typed<T>(rows.mean), typed<T>(rows.rstd), typed<T>(rows.mean_dn), typed<T>(rows.mean_n_dn)};
  T *part = args.db ? typed<T>(scratch) : nullptr, *db = typed<T>(args.db);
  GCAHNG_LAUNCH((mlp_in_backward_kernel<T, L, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows), stream, grid,
                typed<L>(args.h), typed<T>(args.bias), typed<L>(args.dn), in, typed<L>(args.g), typed<L>(args.dh),
                part);
  const int error = cudaGetLastError();
  return error || !db ? error : launch_add_partials(part, db, 1, grid.parts, args.W, stream);
}

}  // namespace

int launch_mlp_in_forward(const MlpInForward& args, void* stream) {
  if (args.W > 4 * kMaxChannels) return cudaErrorInvalidValue;
  if (args.T * args.W == 0) return cudaSuccess;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    auto* f = !wide<L>(args.W, args.h, args.bias, args.g) ? forward<A, L, 1, 16>
              : args.W <= 8 * kThreads                    ? forward<A, L, kWide<L>, 8>
                                                          : forward<A, L, kWide<L>, 16>;
    return f(args, stream);
  });
}

int64_t mlp_in_backward_scratch(const MlpInBackward& args) { return args.db ? sum_parts(args.T) * args.W : 0; }

int launch_mlp_in_backward(const MlpInBackward& args, void* scratch, void* stream) {
  if (args.T * args.W == 0) return cudaSuccess;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const bool aligned = wide<L>(args.W, args.h, args.bias, args.dn, args.g, args.dh, scratch);
    return aligned ? backward<A, L, kWide<L>>(args, scratch, stream) : backward<A, L, 1>(args, scratch, stream);
  });
}

}  // namespace gcahng::cuda
