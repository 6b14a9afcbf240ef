// Pieces that several stems share: rows by warp, sums over rows by column, and the ordered addition of partial sums.
// No sum depends on the schedule: every term has its place, and places are added in their order.
//
// Kernels here ask for one block a multiprocessor in __launch_bounds__: left to itself, ptxas spills a few registers to
// fit one block more.
#pragma once
#include <cmath>

#include "../common/gelu.h"
#include "launch.h"

namespace gcahng::cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int64_t kMaxChannels = 1024;  // of an edge
constexpr double kNormEps = 1e-5;

// N values of S as T, and back; at most 16 bytes an access.
template <class T, int N, class S>
__device__ __forceinline__ Pack<T, N> read(const S* p) {
  constexpr int M = N < kWide<S> ? N : kWide<S>;
  Pack<T, N> values;
#pragma unroll
  for (int first = 0; first < N; first += M) {
    const Pack<S, M> part = load<M>(p + first);
#pragma unroll
    for (int n = 0; n < M; ++n) values.v[first + n] = widen(part.v[n]);
  }
  return values;
}
template <class T, int N, class S>
__device__ __forceinline__ void write(S* p, const Pack<T, N>& values) {
  constexpr int M = N < kWide<S> ? N : kWide<S>;
#pragma unroll
  for (int first = 0; first < N; first += M) {
    Pack<S, M> part;
#pragma unroll
    for (int n = 0; n < M; ++n) part.v[n] = narrow<S>(values.v[first + n]);
    store<M>(p + first, part);
  }
}

// The sum over a warp's lanes, the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kWholeWarp, x, offset);
  return x;
}

__device__ __forceinline__ float inverse_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

// The logistic function, by exp of what is not positive.
template <class T>
__device__ __forceinline__ T logistic(T x) {
  const T e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : T(1)) / (T(1) + e);
}

// -- a row by a warp: lane l (threadIdx.x) has the channels from (kWarp k + l) N on, N at a time.
//
// V: how many channels a lane has cached in registers. 0: none; what a row needs again is computed again, for channels
// in any number (fp64, and rows that wide accesses do not fit).

template <int N_, int V_>
struct RowShape {
  static constexpr int N = N_, V = V_;
  static constexpr int64_t channels = V ? V * kWarp : kMaxChannels;  // at most
};

// f(RowShape) for rows of D <= kMaxChannels values of T; aligned: rows take wide accesses.
template <class T, class F>
int with_row_shape(int64_t D, bool aligned, F f) {
  if (!aligned) return f(RowShape<1, 0>{});
  if constexpr (sizeof(T) == 8) {
    return f(RowShape<kWide<T>, 0>{});
  } else {
    if (D <= 4 * kWarp) return f(RowShape<kWide<T>, 4>{});
    if (D <= 8 * kWarp) return f(RowShape<kWide<T>, 8>{});
    if (D <= 16 * kWarp) return f(RowShape<kWide<T>, 16>{});
    return f(RowShape<kWide<T>, 32>{});
  }
}

// f(k, d) for each of a lane's packs: k-th, from channel d on.
template <int N, int V, class F>
__device__ __forceinline__ void each_pack(int64_t D, F f) {
  if constexpr (V > 0) {
#pragma unroll
    for (int k = 0; k < V / N; ++k) {
      const int64_t d = (k * kWarp + static_cast<int>(threadIdx.x)) * N;
      if (d < D) f(k, d);
    }
  } else {
#pragma unroll 1
    for (int64_t d = threadIdx.x * N; d < D; d += kWarp * N) f(0, d);
  }
}

// A lane's packs, cached or (V = 0) made again.
template <class T, int N, int V>
struct Cached {
  Pack<T, N> packs[V / N];
  template <class F>
  __device__ __forceinline__ Pack<T, N> make(int k, F f) {
    return packs[k] = f();
  }
  template <class F>
  __device__ __forceinline__ Pack<T, N> get(int k, F) const {
    return packs[k];
  }
};
template <class T, int N>
struct Cached<T, N, 0> {
  template <class F>
  __device__ __forceinline__ Pack<T, N> make(int, F f) {
    return f();
  }
  template <class F>
  __device__ __forceinline__ Pack<T, N> get(int, F f) const {
    return f();
  }
};

// out(d, y) of y = LayerNorm(GELU(t)) with t = in(d), packs of N values from channel d on.
template <class T, int N, int V, class In, class Out>
__device__ __forceinline__ void norm_gelu_row(int64_t D, const T* gamma, const T* beta, In in, Out out) {
  Cached<T, N, V> g;
  const auto activated = [&](int64_t d) {
    Pack<T, N> x = in(d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = gelu(x.v[n]);
    return x;
  };
  T sum = 0, square = 0;
  each_pack<N, V>(D, [&](int k, int64_t d) {
    const Pack<T, N> x = g.make(k, [&] { return activated(d); });
#pragma unroll
    for (int n = 0; n < N; ++n) sum += x.v[n];
  });
  const T mean = warp_sum(sum) / T(D);
  each_pack<N, V>(D, [&](int k, int64_t d) {
    const Pack<T, N> x = g.get(k, [&] { return activated(d); });
#pragma unroll
    for (int n = 0; n < N; ++n) square += (x.v[n] - mean) * (x.v[n] - mean);
  });
  const T rstd = inverse_root(warp_sum(square) / T(D) + T(kNormEps));
  each_pack<N, V>(D, [&](int k, int64_t d) {
    Pack<T, N> x = g.get(k, [&] { return activated(d); });
    const Pack<T, N> scale = read<T, N>(gamma + d), shift = read<T, N>(beta + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = (x.v[n] - mean) * rstd * scale.v[n] + shift.v[n];
    out(d, x);
  });
}

// out(d, dt, dy, x) for dt of y = LayerNorm(GELU(t)), t = in(d) and dy = upstream(d); x: the normalized GELU(t).
template <class T, int N, int V, class In, class Upstream, class Out>
__device__ __forceinline__ void norm_gelu_row_backward(int64_t D, const T* gamma, In in, Upstream upstream, Out out) {
  Cached<T, N, V> g, slope, dy;
  const auto activate = [&](int64_t d, Pack<T, N>& steep) {
    Pack<T, N> x = in(d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T cdf = normal_cdf(x.v[n]);
      steep.v[n] = gelu_slope(x.v[n], cdf);
      x.v[n] *= cdf;
    }
    return x;
  };
  const auto activated = [&](int64_t d) {
    Pack<T, N> steep;
    return activate(d, steep);
  };
  T sum = 0, square = 0, flat = 0, along = 0;
  each_pack<N, V>(D, [&](int k, int64_t d) {
    Pack<T, N> steep;
    const Pack<T, N> x = g.make(k, [&] { return activate(d, steep); });
    slope.make(k, [&] { return steep; });
    if constexpr (V > 0) dy.make(k, [&] { return upstream(d); });
#pragma unroll
    for (int n = 0; n < N; ++n) sum += x.v[n];
  });
  const T mean = warp_sum(sum) / T(D);
  each_pack<N, V>(D, [&](int k, int64_t d) {
    const Pack<T, N> x = g.get(k, [&] { return activated(d); });
#pragma unroll
    for (int n = 0; n < N; ++n) square += (x.v[n] - mean) * (x.v[n] - mean);
  });
  const T rstd = inverse_root(warp_sum(square) / T(D) + T(kNormEps));
  each_pack<N, V>(D, [&](int k, int64_t d) {
    const Pack<T, N> x = g.get(k, [&] { return activated(d); });
    const Pack<T, N> above = dy.get(k, [&] { return upstream(d); }), scale = read<T, N>(gamma + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T dn = above.v[n] * scale.v[n];
      flat += dn;
      along += dn * ((x.v[n] - mean) * rstd);
    }
  });
  flat = warp_sum(flat) / T(D);
  along = warp_sum(along) / T(D);
  each_pack<N, V>(D, [&](int k, int64_t d) {
    Pack<T, N> x = g.get(k, [&] { return activated(d); });
    const Pack<T, N> steep = slope.get(k, [&] {
      Pack<T, N> derivative;
      activate(d, derivative);
      return derivative;
    });
    const Pack<T, N> above = dy.get(k, [&] { return upstream(d); }), scale = read<T, N>(gamma + d);
    Pack<T, N> dt;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x.v[n] = (x.v[n] - mean) * rstd;
      dt.v[n] = (above.v[n] * scale.v[n] - flat - x.v[n] * along) * rstd * steep.v[n];
    }
    out(d, dt, above, x);
  });
}

// Sums of S quantities over the rows of a block's warps (threadIdx.y), a warp's own each in shared memory:
// sums[(s kWarps + warp) channels + d]. Each lane meets its own channels alone until the warps are added up.
template <class T, class Shape, int S>
struct BlockSums {
  static constexpr int64_t bytes = S * Shape::channels * sizeof(T);
  static constexpr int kWarps = bytes * 8 <= 32768 ? 8 : bytes >= 32768 ? 1 : 32768 / bytes;
  static constexpr int64_t kValues = S * kWarps * Shape::channels;
  T* sums;

  __device__ __forceinline__ T* at(int s, int64_t d) const {
    return sums + (s * kWarps + static_cast<int>(threadIdx.y)) * Shape::channels + d;
  }
  __device__ __forceinline__ void clear(int64_t D) const {
    each_pack<Shape::N, Shape::V>(D, [&](int, int64_t d) {
      const Pack<T, Shape::N> zero{};
#pragma unroll
      for (int s = 0; s < S; ++s) store<Shape::N>(at(s, d), zero);
    });
  }
  __device__ __forceinline__ void add(int s, int64_t d, const Pack<T, Shape::N>& x) const {
    Pack<T, Shape::N> sum = load<Shape::N>(static_cast<const T*>(at(s, d)));
#pragma unroll
    for (int n = 0; n < Shape::N; ++n) sum.v[n] += x.v[n];
    store<Shape::N>(at(s, d), sum);
  }
  // part (S, blocks, D): adds the warps up in order. The whole block comes here.
  __device__ __forceinline__ void write(T* part, int64_t part_number, int64_t parts, int64_t D) const {
    __syncthreads();
    const int64_t first = threadIdx.y * kWarp + threadIdx.x;
    for (int s = 0; s < S; ++s)
      for (int64_t d = first; d < D; d += kWarp * kWarps) {
        T total = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += sums[(s * kWarps + warp) * Shape::channels + d];
        part[(s * parts + part_number) * D + d] = total;
      }
  }
};

// -- rows by column: a block takes kColumnLanes N channels and `rows` rows, its thread rows take turns.

constexpr int kColumnLanes = 32;
constexpr int kColumnRows = 8;

struct ColumnGrid {
  int64_t T, W;         // rows, channels
  int64_t rows, parts;  // rows a block, blocks along the rows
  int64_t tiles;        // blocks along the channels
  int64_t blocks() const { return parts * tiles; }
};

// How many blocks along the rows form partial sums of their own; depends on the shape alone.
inline int64_t sum_rows(int64_t T) {
  constexpr int64_t kParts = 1024;
  const int64_t rows = ceil_div(ceil_div(T, kParts), kColumnRows) * kColumnRows;
  return rows < 4 * kColumnRows ? 4 * kColumnRows : rows;
}
inline int64_t sum_parts(int64_t T) { return ceil_div(T, sum_rows(T)); }

inline ColumnGrid column_grid(int64_t T, int64_t W, int64_t N, int64_t rows) {
  return {T, W, rows, ceil_div(T, rows), ceil_div(W, kColumnLanes * N)};
}

// f(row, d, sums) for each row and pack of N channels of a block. S > 0: sums (S, N) of type A, part (S, parts, W)
// receives their totals, or is null.
template <int S, int N, class A, class F>
__device__ __forceinline__ void each_column(const ColumnGrid& grid, A* part, F f) {
  const int64_t number = blockIdx.x / grid.tiles, first = number * grid.rows;
  const int64_t stop = first + grid.rows < grid.T ? first + grid.rows : grid.T;
  const int64_t d = ((blockIdx.x % grid.tiles) * kColumnLanes + threadIdx.x) * N;
  Pack<A, N> sums[S > 0 ? S : 1] = {};
  if (d < grid.W)
    for (int64_t row = first + threadIdx.y; row < stop; row += kColumnRows) f(row, d, sums);
  if constexpr (S > 0) {
    GCAHNG_SHARED(A, partial, S * kColumnRows * N * kColumnLanes);
    if (!part) return;
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int n = 0; n < N; ++n)
        partial[((s * kColumnRows + threadIdx.y) * N + n) * kColumnLanes + threadIdx.x] = sums[s].v[n];
    __syncthreads();
    if (threadIdx.y != 0 || d >= grid.W) return;
#pragma unroll
    for (int s = 0; s < S; ++s) {
#pragma unroll
      for (int n = 0; n < N; ++n)
        for (int row = 1; row < kColumnRows; ++row)
          sums[s].v[n] += partial[((s * kColumnRows + row) * N + n) * kColumnLanes + threadIdx.x];
      write(part + (s * grid.parts + number) * grid.W + d, sums[s]);
    }
  }
}

// -- partial sums

constexpr int kAddRows = 32;

// into (groups, width) += the sums over u < count of part (groups, count, width); in double, for there may be many.
template <class T>
__global__ void __launch_bounds__(kWarp* kAddRows, 1)
    add_partials_kernel(const T* __restrict__ part, T* __restrict__ into, int64_t count, int64_t width) {
  GCAHNG_SHARED(double, partial, kAddRows* kWarp);
  const int64_t w = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x, group = blockIdx.y;
  double sum = 0;
  if (w < width) {
#pragma unroll 4
    for (int64_t u = threadIdx.y; u < count; u += kAddRows) sum += part[(group * count + u) * width + w];
  }
  partial[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || w >= width) return;
  double total = into[group * width + w];
  for (int row = 0; row < kAddRows; ++row) total += partial[row * kWarp + threadIdx.x];
  into[group * width + w] = static_cast<T>(total);
}

template <class T>
int launch_add_partials(const T* part, T* into, int64_t groups, int64_t count, int64_t width, void* stream) {
  if (groups * count * width == 0) return cudaSuccess;
  GCAHNG_LAUNCH((add_partials_kernel<T>), dim3(ceil_div(width, kWarp), groups), dim3(kWarp, kAddRows), stream, part,
                into, count, width);
  return cudaGetLastError();
}

// f(null pointer of the accumulating type).
template <class F>
int with_accumulating(DType dtype, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
  return dtype == DType::f32 ? f(static_cast<float*>(nullptr)) : static_cast<int>(cudaErrorInvalidValue);
}

// f(null pointer of the products' type L) where the accumulating type is compute_t<L>; an error for other pairs.
template <class F>
int with_products(DType dtype, DType low_type, F f) {
  const bool known = dtype == DType::f64 ? low_type == DType::f64 : dtype == DType::f32 && low_type != DType::f64;
  if (!known) return cudaErrorInvalidValue;
  int error = cudaSuccess;
  with_type<true>(low_type, [&]<class L>(L* low) { error = f(low); });
  return error;
}

}  // namespace
}  // namespace gcahng::cuda
