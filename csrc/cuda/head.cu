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
template <class E, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_moments_kernel(ColumnGrid grid, Tile tile, const E* __restrict__ e, double* part) {
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

template <class T, class E, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_forward_kernel(ColumnGrid grid, const L* __restrict__ product, const T* __restrict__ bias,
                        E* __restrict__ theta) {
  each_column<0, N>(grid, static_cast<T*>(nullptr), [&](int64_t row, int64_t d, Pack<T, N>*) {
    Pack<T, N> x = read<T, N>(product + row * grid.W + d);
    const Pack<T, N> shift = read<T, N>(bias + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = logistic(x.v[n] + shift.v[n]).value;
    write(theta + row * grid.W + d, x);
  });
}

template <class T, class E, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_backward_kernel(ColumnGrid grid, const E* __restrict__ theta, const E* __restrict__ dtheta,
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

template <class T, class E, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_sums_kernel(ColumnGrid grid, const L* __restrict__ dy, const E* __restrict__ e, E* __restrict__ copy,
                     T* part) {
  each_column<2, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>* sums) {
    const Pack<T, N> g = read<T, N>(dy + row * grid.W + d), x = read<T, N>(e + row * grid.W + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[0].v[n] += g.v[n];
      sums[1].v[n] += g.v[n] * x.v[n];
    }
    write(copy + row * grid.W + d, g);
  });
}

// The vectors (D,) of the norm's backward.
template <class T>
struct NormVectors {
  const T *scale, *a, *b;
};

template <class T, class E, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    head_norm_kernel(ColumnGrid grid, Tile tile, const E* dy, const E* __restrict__ e, NormVectors<T> in, E* de) {
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

int64_t head_moments_scratch(const HeadMoments& args) { return 2 * sum_parts(args.tile.rows()) * args.D; }

int launch_head_moments(const HeadMoments& args, void* scratch, void* stream) {
  const int64_t rows = args.tile.rows(), D = args.D;
  if (rows * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, [&]<class A, class E>(A*, E*) {
    const E* e = typed<E>(args.e);
    double* part = typed<double>(scratch);
    return on_columns<A>(rows, D, sum_rows(rows), wide<A>(D, e, part), [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_moments_kernel<E, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, args.tile, e,
                    part);
      const int error = cudaGetLastError();
      return error ? error : launch_add_partials(part, typed<double>(args.sums), 2, grid.parts, D, stream);
    });
  });
}

int launch_head_forward(const HeadForward& args, void* stream) {
  const int64_t D = args.D;
  if (args.T * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class A, class E, class L>(A*, E*, L*) {
    const L* product = typed<L>(args.product);
    const A* bias = typed<A>(args.bias);
    E* theta = typed<E>(args.theta);
    return on_columns<A>(args.T, D, kPlainRows, wide<A>(D, product, bias, theta), [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_forward_kernel<A, E, L, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, product,
                    bias, theta);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

int64_t head_backward_scratch(const HeadBackward& args) { return args.sum ? sum_parts(args.T) * args.D : 0; }

int launch_head_backward(const HeadBackward& args, void* scratch, void* stream) {
  const int64_t D = args.D;
  if (args.T * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class A, class E, class L>(A*, E*, L*) {
    const E *theta = typed<E>(args.theta), *dtheta = typed<E>(args.dtheta);
    L* dpre = typed<L>(args.dpre);
    A *sum = typed<A>(args.sum), *part = sum ? typed<A>(scratch) : nullptr;
    const bool aligned = wide<A>(D, theta, dtheta, dpre, part);
    return on_columns<A>(args.T, D, sum_rows(args.T), aligned, [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_backward_kernel<A, E, L, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, theta,
                    dtheta, dpre, part);
      const int error = cudaGetLastError();
      return error || !sum ? error : launch_add_partials(part, sum, 1, grid.parts, D, stream);
    });
  });
}

int64_t head_sums_scratch(const HeadSums& args) { return 2 * sum_parts(args.T) * args.D; }

int launch_head_sums(const HeadSums& args, void* scratch, void* stream) {
  const int64_t D = args.D;
  if (args.T * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class A, class E, class L>(A*, E*, L*) {
    const L* dy = typed<L>(args.dy);
    const E* e = typed<E>(args.e);
    E* copy = typed<E>(args.wide);
    A* part = typed<A>(scratch);
    return on_columns<A>(args.T, D, sum_rows(args.T), wide<A>(D, dy, e, copy, part), [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_sums_kernel<A, E, L, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, dy, e, copy,
                    part);
      const int error = cudaGetLastError();
      return error ? error : launch_add_partials(part, typed<A>(args.sums), 2, grid.parts, D, stream);
    });
  });
}

int launch_head_norm(const HeadNorm& args, void* stream) {
  const int64_t rows = args.tile.rows(), D = args.D;
  if (rows * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, [&]<class A, class E>(A*, E*) {
    const E *dy = typed<E>(args.dy), *e = typed<E>(args.e);
    const NormVectors<A> in{typed<A>(args.scale), typed<A>(args.a), typed<A>(args.b)};
    E* de = typed<E>(args.de);
    const bool aligned = wide<A>(D, dy, e, in.scale, in.a, in.b, de);
    return on_columns<A>(rows, D, kPlainRows, aligned, [&](auto n, ColumnGrid grid) {
      GCAHNG_LAUNCH((head_norm_kernel<A, E, n.value>), dim3(grid.blocks()), kColumnBlock, stream, grid, args.tile, dy,
                    e, in, de);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace gcahng::cuda
