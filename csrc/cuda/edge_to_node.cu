#include "../edge_to_node.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

// What an edge adds to a sum over edges: GELU(p + b).
template <class T_, class L, int N_>
struct Activated {
  using T = T_;
  static constexpr int N = N_, kPlanes = 1;
  static constexpr bool kNumber = false;
  const L* p;
  const T* b;
  int64_t D;

  template <bool>
  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 1>& sum) const {
    const Pack<T, N> x = read<T, N>(p + edge.row * D + d), bias = read<T, N>(b + d);
#pragma unroll
    for (int n = 0; n < N; ++n) sum.planes[0].v[n] += gelu(x.v[n] + bias.v[n]);
  }
};

// dp = (ds_i + ds_j) GELU'(p + b), ds_j of mirrored offsets alone; part (parts, D): sums of dp, or null. dp may be p.
template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows)
    edge_to_node_backward_kernel(Tile tile, const L* p, const T* __restrict__ b, const T* __restrict__ ds, L* dp,
                                 T* part, int64_t D, ColumnGrid grid) {
  each_column<1, N>(grid, part, [&](int64_t row, int64_t d, Pack<T, N>(&sums)[1]) {
    const Edge edge = edge_of(tile, row);
    const Pack<T, N> x = read<T, N>(p + row * D + d), bias = read<T, N>(b + d);
    Pack<T, N> value = read<T, N>(ds + tile.anchor(edge.a, edge.i) * D + d);
    if (edge.o >= tile.mirrored) {
      const Pack<T, N> ds_j = read<T, N>(ds + tile.column(edge.a, edge.o, edge.v) * D + d);
#pragma unroll
      for (int n = 0; n < N; ++n) value.v[n] += ds_j.v[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T t = x.v[n] + bias.v[n];
      value.v[n] *= gelu_slope(t, normal_cdf(t));
      sums[0].v[n] += value.v[n];
    }
    write(dp + row * D + d, value);
  });
}

}  // namespace

int64_t edge_to_node_forward_scratch(const Tile& tile, int64_t D) { return node_sums_scratch(tile, D, 1, 0); }
int64_t edge_to_node_backward_scratch(const Tile& tile, int64_t D) { return sum_parts(tile.rows()) * D; }

int launch_edge_to_node_forward(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b, void* sum,
                                void* scratch, int64_t D, void* stream) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_products(dtype, low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    const auto run = [&]<int N>(Width<N>) -> int {
      const Activated<T, L, N> term{static_cast<const L*>(p), static_cast<const T*>(b), D};
      return add_node_sums(term, tile, tile.mirrored, static_cast<T*>(scratch), {{static_cast<T*>(sum)}, nullptr}, D,
                           stream);
    };
    return wide<L>(D, p, b, sum, scratch) ? run(Width<kWide<L>>{}) : run(Width<1>{});
  });
}

int launch_edge_to_node_backward(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b,
                                 const void* ds, void* dp, void* db, void* scratch, int64_t D, void* stream) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_products(dtype, low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    T* part = db ? static_cast<T*>(scratch) : nullptr;
    const auto run = [&]<int N>(Width<N>) -> int {
      const ColumnGrid grid = column_grid(tile.rows(), D, N, sum_rows(tile.rows()));
      if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
      GCAHNG_LAUNCH((edge_to_node_backward_kernel<T, L, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows),
                    stream, tile, static_cast<const L*>(p), static_cast<const T*>(b), static_cast<const T*>(ds),
                    static_cast<L*>(dp), part, D, grid);
      const int error = cudaGetLastError();
      if (error || !part) return error;
      return launch_add_partials<T>(part, static_cast<T*>(db), 1, grid.parts, D, stream);
    };
    return wide<L>(D, p, b, ds, dp, scratch) ? run(Width<kWide<L>>{}) : run(Width<1>{});
  });
}

}  // namespace gcahng::cuda
