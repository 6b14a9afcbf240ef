#include "../mlp_in.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 4;  // rows of a block of the forward

// A warp takes a row: a lane has the channels from (kWarp k + l) N on, and V of them cached as they are written, or
// (V = 0) reads them again.
template <class T, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kWarps, 1)
    mlp_in_forward_kernel(const L* h, const T* __restrict__ bias, L* g, T* __restrict__ mean, T* __restrict__ rstd,
                          int64_t rows, int64_t channels) {
  constexpr int N = Shape::N, V = Shape::V;
  const int64_t W = Shape::width(channels);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_number();
  if (row >= rows) return;
  const L* in = h + row * W;
  L* out = g + row * W;
  Pack<L, N> cached[V ? V / N : 1];
  const T each = reciprocal(T(W));
  T sum = 0, square = 0;
  each_pack<Shape>(W, [&](int k, int d) {
    Pack<T, N> x = read<T, N>(in + d);
    const Pack<T, N> shift = read<T, N>(bias + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = gelu_of(x.v[n] + shift.v[n]);
    const Pack<L, N> narrowed = narrow_pack<L>(x);
    store(out + d, narrowed);
    if constexpr (V > 0) cached[k] = narrowed;
#pragma unroll
    for (int n = 0; n < N; ++n) sum += widen(narrowed.v[n]);  // as the next product reads it
  });
  const T center = warp_sum(sum) * each;
  each_pack<Shape>(W, [&](int k, int d) {
    Pack<L, N> x;
    if constexpr (V > 0)
      x = cached[k];
    else
      x = load<N>(static_cast<const L*>(out + d));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T off = widen(x.v[n]) - center;
      square += off * off;
    }
  });
  square = warp_sum(square);
  if (threadIdx.x != 0) return;
  mean[row] = center;
  rstd[row] = inverse_root(square * each + T(kNormEps));
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
  const int64_t column = ((blockIdx.x % static_cast<unsigned>(grid.tiles)) * kColumnLanes + threadIdx.x) * N;
  Pack<T, N> shift{};
  if (column < grid.W) shift = read<T, N>(bias + column);
  each_column<1, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>* sums) {
    Pack<T, N> x = read<T, N>(h + row * grid.W + d), above = read<T, N>(dn + row * grid.W + d);
    const T center = in.mean[row], inverse = in.rstd[row], flat = in.mean_dn[row], along = in.mean_n_dn[row] * inverse;
    Pack<T, N> slope;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Gelu<T> at = gelu_and_slope(x.v[n] + shift.v[n]);
      x.v[n] = at.value;
      slope.v[n] = at.slope * inverse;
    }
    const Pack<L, N> narrowed = narrow_pack<L>(x);
    store(g + row * grid.W + d, narrowed);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      above.v[n] = (above.v[n] - flat - (widen(narrowed.v[n]) - center) * along) * slope.v[n];
      sums[0].v[n] += above.v[n];
    }
    write(dh + row * grid.W + d, above);
  });
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
  const int64_t blocks = ceil_div(args.T, kWarps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const auto launch = [&]<class Shape>(Shape) {
      GCAHNG_LAUNCH((mlp_in_forward_kernel<A, L, Shape>), dim3(blocks), dim3(kWarp, kWarps), stream, typed<L>(args.h),
                    typed<A>(args.bias), typed<L>(args.g), typed<A>(args.mean), typed<A>(args.rstd), args.T, args.W);
      return static_cast<int>(cudaGetLastError());
    };
    constexpr int N = kWide<L>;
    if (!wide<L>(args.W, args.h, args.bias, args.g)) return launch(RowShape<1, 0>{});
    if constexpr (sizeof(L) <= 4) {
      if (args.W == 16 * kWarp) return launch(RowShape<N, 16, true>{});
      if (args.W == 32 * kWarp) return launch(RowShape<N, 32, true>{});
      if (args.W == 64 * kWarp) return launch(RowShape<N, 64, true>{});
    }
    return launch(RowShape<N, 0>{});
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
