#include "../edge_to_node.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

// What an edge adds to the sums at both ends, at its column where its offset is mirrored: GELU(product + bias).
template <class T_, class L, int N_>
struct Activated {
  using T = T_;
  static constexpr int N = N_, kPlanes = 1, kAnchors = 8;
  static constexpr bool kNumber = false;
  const L* product;
  const T* bias;
  int64_t mirrored, D;

  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 1>& anchor, Sum<T, N, 1>& column) const {
    const Pack<T, N> x = read<T, N>(product + edge.row * D + d), shift = read<T, N>(bias + d);
    const bool both = edge.o >= mirrored;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T value = gelu_of(x.v[n] + shift.v[n]);
      anchor.planes[0].v[n] += value;
      column.planes[0].v[n] += both ? value : T(0);
    }
  }
};

// dp = (ds_i + ds_j) GELU'(product + bias), ds_j of mirrored offsets alone; part (parts, D): sums of dp, or null. dp
// may be the product.
template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, 1)
    edge_to_node_backward_kernel(Tile tile, const L* product, const T* __restrict__ bias, const T* __restrict__ ds,
                                 L* dp, T* part, int64_t D, ColumnGrid grid) {
  each_edge<1, N>(tile, grid, part, [&](const Edge& edge, int64_t d, Pack<T, N>(&sums)[1]) {
    const Pack<T, N> x = read<T, N>(product + edge.row * D + d), shift = read<T, N>(bias + d);
    Pack<T, N> value = read<T, N>(ds + tile.anchor(edge.a, edge.i) * D + d);
    if (edge.o >= tile.mirrored) {
      const Pack<T, N> ds_j = read<T, N>(ds + tile.column(edge.a, edge.o, edge.v) * D + d);
#pragma unroll
      for (int n = 0; n < N; ++n) value.v[n] += ds_j.v[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      value.v[n] *= slope_of(x.v[n] + shift.v[n]);
      sums[0].v[n] += value.v[n];
    }
    write(dp + edge.row * D + d, value);
  });
}

}  // namespace

int64_t edge_to_node_forward_scratch(const EdgeToNodeForward& args) {
  return node_sums_scratch<Activated<float, float, 1>>(args.tile, args.D);
}
int64_t edge_to_node_backward_scratch(const EdgeToNodeBackward& args) {
  return args.db ? sum_parts(args.tile.rows()) * args.D : 0;
}

int launch_edge_to_node_forward(const EdgeToNodeForward& args, void* scratch, void* stream) {
  const Tile& tile = args.tile;
  const int64_t D = args.D;
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    const auto run = [&]<int N>(Width<N>) -> int {
      const Activated<T, L, N> term{typed<L>(args.product), typed<T>(args.bias), tile.mirrored, D};
      return add_node_sums(term, tile, tile.mirrored, typed<T>(scratch), {{typed<T>(args.sum)}, nullptr}, D, stream);
    };
    // As many channels a thread as of the sums: it has eight anchors' of them.
    return wide<T>(D, args.product, args.bias, args.sum, scratch) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

int launch_edge_to_node_backward(const EdgeToNodeBackward& args, void* scratch, void* stream) {
  const int64_t rows = args.tile.rows(), D = args.D;
  if (rows * D == 0) return cudaSuccess;
  if (!numbered(args.tile)) return cudaErrorInvalidConfiguration;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    T* part = args.db ? typed<T>(scratch) : nullptr;
    const auto run = [&]<int N>(Width<N>) -> int {
      const ColumnGrid grid = column_grid(rows, D, N, sum_rows(rows));
      if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
      GCAHNG_LAUNCH((edge_to_node_backward_kernel<T, L, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows),
                    stream, args.tile, typed<L>(args.product), typed<T>(args.bias), typed<T>(args.ds),
                    typed<L>(args.dp), part, D, grid);
      const int error = cudaGetLastError();
      if (error || !part) return error;
      return launch_add_partials<T>(part, typed<T>(args.db), 1, grid.parts, D, stream);
    };
    const bool aligned = wide<L>(D, args.product, args.bias, args.ds, args.dp, scratch);
    return aligned ? run(Width<kWide<L>>{}) : run(Width<1>{});
  });
}

}  // namespace gcahng::cuda
