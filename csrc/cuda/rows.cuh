// Pieces that several stems share: rows by warp, sums over rows by column, and the ordered addition of partial sums.
// No sum depends on the schedule: every term has its place, and places are added in their order.
//
// Kernels here ask for one block a multiprocessor in __launch_bounds__: left to itself, ptxas spills a few registers to
// fit one block more.
#pragma once
#include <type_traits>

#include "../common/arguments.h"
#include "functions.cuh"

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
// out[0] and out[1], of two values by one instruction.
template <class S>
__device__ __forceinline__ void narrow_pair(float first, float second, S* out) {
#ifdef GCAHNG_EMULATOR
  out[0] = narrow<S>(first), out[1] = narrow<S>(second);
#else
  if constexpr (std::is_same_v<S, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(out, &pair, sizeof pair);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(out, &pair, sizeof pair);
  }
#endif
}
// N values of T as S.
template <class S, class T, int N>
__device__ __forceinline__ Pack<S, N> narrow_pack(const Pack<T, N>& values) {
  Pack<S, N> narrowed;
  if constexpr (sizeof(S) == 2 && N % 2 == 0) {
#pragma unroll
    for (int n = 0; n < N; n += 2) narrow_pair(values.v[n], values.v[n + 1], narrowed.v + n);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) narrowed.v[n] = narrow<S>(values.v[n]);
  }
  return narrowed;
}
template <class T, int N, class S>
__device__ __forceinline__ void write(S* p, const Pack<T, N>& values) {
  constexpr int M = N < kWide<S> ? N : kWide<S>;
#pragma unroll
  for (int first = 0; first < N; first += M) {
    Pack<T, M> part;
#pragma unroll
    for (int n = 0; n < M; ++n) part.v[n] = values.v[first + n];
    store<M>(p + first, narrow_pack<S>(part));
  }
}

// The values as S has them.
template <class S, class T, int N>
__device__ __forceinline__ Pack<T, N> rounded(const Pack<T, N>& values) {
  if constexpr (std::is_same_v<S, T>) return values;
  const Pack<S, N> narrowed = narrow_pack<S>(values);
  Pack<T, N> wide;
#pragma unroll
  for (int n = 0; n < N; ++n) wide.v[n] = widen(narrowed.v[n]);
  return wide;
}

// Where a kernel leaves edges, as they are and as operands of products. Either may be null.
template <class T, class L>
struct Out {
  T* full;
  L* low;

  template <int N>
  __device__ __forceinline__ void put(int64_t at, const Pack<T, N>& values) const {
    if (full) write(full + at, values);
    if (low) write(low + at, values);
  }
};
template <class T, class L>
Out<T, L> out_of(const EdgesOut& out) {
  return {typed<T>(out.full), typed<L>(out.low)};
}

// The sum over a warp's lanes, the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kWholeWarp, x, offset);
  return x;
}

// A warp's number, threadIdx.y, in a way that tells the compiler that it is the same in every lane: what follows from
// it needs a register of the warp, not of each lane, and branches on it do not diverge.
__device__ __forceinline__ int warp_number() { return __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.y), 0); }

// -- a row by a warp: lane l (threadIdx.x) has the channels from (kWarp k + l) N on, N at a time.
//
// V: how many channels a lane has cached in registers. 0: none; what a row needs again is computed again, for channels
// in any number (fp64, and rows that wide accesses do not fit). kFull: every lane has V channels, so that their number
// is known where the kernel is compiled, and none is asked whether it is there.

template <int N_, int V_, bool kFull_ = false>
struct RowShape {
  static constexpr int N = N_, V = V_;
  static constexpr bool kFull = kFull_;
  static constexpr int64_t channels = V ? V * kWarp : kMaxChannels;  // at most
  // The row's channels, of which the launcher says that they are D.
  static __device__ __forceinline__ int64_t width(int64_t D) { return kFull ? channels : D; }
};

// f(RowShape) for rows of D <= kMaxChannels values of T; aligned: rows take wide accesses.
template <class T, class F>
int with_row_shape(int64_t D, bool aligned, F f) {
  constexpr int N = kWide<T>;
  if (!aligned) return f(RowShape<1, 0>{});
  if constexpr (sizeof(T) == 8) {
    return f(RowShape<N, 0>{});
  } else {
    if (D == 4 * kWarp) return f(RowShape<N, 4, true>{});
    if (D == 8 * kWarp) return f(RowShape<N, 8, true>{});
    if (D == 16 * kWarp) return f(RowShape<N, 16, true>{});
    if (D == 32 * kWarp) return f(RowShape<N, 32, true>{});
    if (D < 16 * kWarp) return f(RowShape<N, 16>{});
    return f(RowShape<N, 32>{});
  }
}

// f(k, d) for each of a lane's packs: k-th, from channel d on.
template <class Shape, class F>
__device__ __forceinline__ void each_pack(int64_t D, F f) {
  constexpr int N = Shape::N;
  if constexpr (Shape::V > 0) {
#pragma unroll
    for (int k = 0; k < Shape::V / N; ++k) {
      const int d = (k * kWarp + static_cast<int>(threadIdx.x)) * N;
      if (Shape::kFull || d < D) f(k, d);
    }
  } else {
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x) * N; d < D; d += kWarp * N) f(0, d);
  }
}

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

// The first row that a thread takes.
__device__ __forceinline__ int64_t first_row(const ColumnGrid& grid) {
  return blockIdx.x / static_cast<unsigned>(grid.tiles) * grid.rows + threadIdx.y;
}

// f(row, d, sums) for each row and pack of N channels of a block. S > 0: sums (S, N) of type A, part (S, parts, W)
// receives their totals, or is null.
template <int S, int N, class A, class F>
__device__ __forceinline__ void each_column(const ColumnGrid& grid, A* part, F f) {
  const unsigned tiles = static_cast<unsigned>(grid.tiles);
  const int64_t number = blockIdx.x / tiles, first = number * grid.rows;
  const int64_t stop = first + grid.rows < grid.T ? first + grid.rows : grid.T;
  const int64_t d = (static_cast<int>(blockIdx.x % tiles) * kColumnLanes + static_cast<int>(threadIdx.x)) * N;
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
    for (int64_t u = threadIdx.y; u < count; u += kAddRows) sum += load<1>(part + (group * count + u) * width + w).v[0];
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

// f(null pointers of the accumulating type T and of the edges' type E): T itself or, beside float, bf16.
template <class F>
int with_edges(DType dtype, DType edge_type, F f) {
  if (edge_type == dtype) return with_accumulating(dtype, [&]<class T>(T* type) { return f(type, type); });
  const bool known = dtype == DType::f32 && edge_type == DType::bf16;
  return known ? f(static_cast<float*>(nullptr), static_cast<bf16*>(nullptr)) : int(cudaErrorInvalidValue);
}

// f(null pointers of T, E and the products' type L). Edges in bf16 go with products in bf16 alone.
template <class F>
int with_edges(DType dtype, DType edge_type, DType low_type, F f) {
  if (edge_type == dtype)
    return with_products(dtype, low_type, [&]<class L>(L* low) {
      compute_t<L>* const type = nullptr;
      return f(type, type, low);
    });
  if (low_type != edge_type) return cudaErrorInvalidValue;
  return with_edges(dtype, edge_type, [&]<class T, class E>(T* type, E* edge) { return f(type, edge, edge); });
}

}  // namespace
}  // namespace gcahng::cuda
