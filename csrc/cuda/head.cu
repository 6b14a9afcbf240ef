#include "../head.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int64_t kPlainRows = 32;  // rows of a block where nothing is summed

// How many ordered pairs the edge of a row stands for.
__device__ __forceinline__ int weight_of(const Tile& tile, int64_t row) {
  return row / tile.K % tile.O >= tile.mirrored ? 2 : 1;
}

// In double: variances are differences of these sums, and edges may lie far from 0 for their spread.
template <class T, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_moments_kernel(ColumnGrid grid, Tile tile, const T* __restrict__ e, double* part) {
  each_column<2, N>(grid, part, [&](int64_t row, int64_t d, Pack<double, N>* sums) {
    const double weight = weight_of(tile, row);
    const Pack<double, N> x = read<double, N>(e + row * grid.W + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const double weighted = weight * x.v[n];
      sums[0].v[n] += weighted;
      sums[1].v[n] += weighted * x.v[n];
    }
  });
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_forward_kernel(ColumnGrid grid, const L* __restrict__ p, const T* __restrict__ b, T* __restrict__ theta) {
  each_column<0, N>(grid, static_cast<T*>(nullptr), [&](int64_t row, int64_t d, Pack<T, N>*) {
    Pack<T, N> x = read<T, N>(p + row * grid.W + d);
    const Pack<T, N> bias = read<T, N>(b + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = logistic(x.v[n] + bias.v[n]);
    write(theta + row * grid.W + d, x);
  });
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_backward_kernel(ColumnGrid grid, const T* __restrict__ theta, const T* __restrict__ dtheta,
                         L* __restrict__ dpre, T* part) {
  each_column<1, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>* sums) {
    const Pack<T, N> at = read<T, N>(theta + row * grid.W + d);
    Pack<T, N> x = read<T, N>(dtheta + row * grid.W + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x.v[n] = x.v[n] * at.v[n] * (T(1) - at.v[n]);
      sums[0].v[n] += x.v[n];
    }
    write(dpre + row * grid.W + d, x);
  });
}

template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_sums_kernel(ColumnGrid grid, const L* __restrict__ dy, const T* __restrict__ e, T* __restrict__ wide_,
                     T* part) {
  each_column<2, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>* sums) {
    const Pack<T, N> g = read<T, N>(dy + row * grid.W + d), x = read<T, N>(e + row * grid.W + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[0].v[n] += g.v[n];
      sums[1].v[n] += g.v[n] * x.v[n];
    }
    write(wide_ + row * grid.W + d, g);
  });
}

// The vectors (D,) of the norm's backward.
template <class T>
struct NormVectors {
  const T *scale, *a, *b;
};

template <class T, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_norm_kernel(ColumnGrid grid, Tile tile, const T* dy, const T* __restrict__ e, NormVectors<T> in, T* de) {
  each_column<0, N>(grid, static_cast<T*>(nullptr), [&](int64_t row, int64_t d, Pack<T, N>*) {
    const T weight = weight_of(tile, row);
    Pack<T, N> g = read<T, N>(dy + row * grid.W + d);
    const Pack<T, N> x = read<T, N>(e + row * grid.W + d), scale = read<T, N>(in.scale + d), a = read<T, N>(in.a + d),
                     b = read<T, N>(in.b + d);
#pragma unroll
    for (int n = 0; n < N; ++n) g.v[n] = scale.v[n] * (g.v[n] - weight * (a.v[n] + b.v[n] * x.v[n]));
    write(de + row * grid.W + d, g);
  });
}

// f(number of channels an access takes, grid) for T rows of D channels, in wide accesses or one by one.
template <class A, class F>
int on_columns(int64_t T, int64_t D, int64_t rows, bool aligned, F f) {
  const auto with = [&]<int N>(RowShape<N, 0>) {
    const ColumnGrid grid = column_grid(T, D, N, rows);
    return grid.blocks() > kMaxBlocks ? static_cast<int>(cudaErrorInvalidConfiguration)
                                      : f(std::integral_constant<int, N>{}, grid);
  };
  return aligned ? with(RowShape<kWide<A>, 0>{}) : with(RowShape<1, 0>{});
}

const dim3 kColumnBlock(kColumnLanes, kColumnRows);

}  // namespace

int64_t head_scratch(int64_t T, int64_t D) { return 2 * sum_parts(T) * D; }

int launch_head_moments(DType dtype, const Tile& tile, const void* e, void* sums, void* scratch, int64_t D,
                        void* stream) {
  const int64_t T = tile.rows();
  if (T * D == 0) return cudaSuccess;
  return with_accumulating(dtype, [&]<class A>(A*) {
    const auto* e_ = static_cast<const A*>(e);
    auto *sums_ = static_cast<double*>(sums), *part = static_cast<double*>(scratch);
    return on_columns<A>(T, D, sum_rows(T), wide<A>(D, e_, part), [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_moments_kernel<A, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, tile, e_, part);
      const int error = cudaGetLastError();
      return error ? error : launch_add_partials(part, sums_, 2, grid.parts, D, stream);
    });
  });
}

int launch_head_forward(DType dtype, DType low_type, const void* p, const void* b, void* theta, int64_t T, int64_t D,
                        void* stream) {
  if (T * D == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const auto* p_ = static_cast<const L*>(p);
    const auto* b_ = static_cast<const A*>(b);
    auto* theta_ = static_cast<A*>(theta);
    return on_columns<A>(T, D, kPlainRows, wide<A>(D, p_, b_, theta_), [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_forward_kernel<A, L, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, p_, b_,
                    theta_);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

int launch_head_backward(DType dtype, DType low_type, const void* theta, const void* dtheta, void* dpre, void* sum,
                         void* scratch, int64_t T, int64_t D, void* stream) {
  if (T * D == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const auto *theta_ = static_cast<const A*>(theta), *dtheta_ = static_cast<const A*>(dtheta);
    auto* dpre_ = static_cast<L*>(dpre);
    auto *sum_ = static_cast<A*>(sum), *part = sum ? static_cast<A*>(scratch) : nullptr;
    const bool aligned = wide<A>(D, theta_, dtheta_, dpre_, part);
    return on_columns<A>(T, D, sum_rows(T), aligned, [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_backward_kernel<A, L, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, theta_,
                    dtheta_, dpre_, part);
      const int error = cudaGetLastError();
      return error || !sum ? error : launch_add_partials(part, sum_, 1, grid.parts, D, stream);
    });
  });
}

int launch_head_sums(DType dtype, DType low_type, const void* dy, const void* e, void* wide_, void* sums, void* scratch,
                     int64_t T, int64_t D, void* stream) {
  if (T * D == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const auto* dy_ = static_cast<const L*>(dy);
    const auto* e_ = static_cast<const A*>(e);
    auto *out = static_cast<A*>(wide_), *sums_ = static_cast<A*>(sums), *part = static_cast<A*>(scratch);
    return on_columns<A>(T, D, sum_rows(T), wide<A>(D, dy_, e_, out, part), [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_sums_kernel<A, L, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, dy_, e_, out,
                    part);
      const int error = cudaGetLastError();
      return error ? error : launch_add_partials(part, sums_, 2, grid.parts, D, stream);
    });
  });
}

int launch_head_norm(DType dtype, const Tile& tile, const void* dy, const void* e, const void* scale, const void* a,
                     const void* b, void* de, int64_t D, void* stream) {
  const int64_t T = tile.rows();
  if (T * D == 0) return cudaSuccess;
  return with_accumulating(dtype, [&]<class A>(A*) {
    const auto *dy_ = static_cast<const A*>(dy), *e_ = static_cast<const A*>(e);
    const NormVectors<A> in{static_cast<const A*>(scale), static_cast<const A*>(a), static_cast<const A*>(b)};
    auto* de_ = static_cast<A*>(de);
    const bool aligned = wide<A>(D, dy_, e_, in.scale, in.a, in.b, de_);
    return on_columns<A>(T, D, kPlainRows, aligned, [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_norm_kernel<A, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, tile, dy_, e_, in,
                    de_);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace gcahng::cuda
