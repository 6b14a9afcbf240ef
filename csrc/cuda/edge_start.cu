#include "../edge_start.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows)
    edge_start_forward_kernel(Tile tile, const T* __restrict__ x, Out<T, L> out, int64_t D, ColumnGrid grid) {
  each_edge<0, N>(tile, grid, static_cast<T*>(nullptr), [&](const Edge& edge, int64_t d, auto&) {
    Pack<T, N> product = read<T, N>(x + tile.anchor(edge.a, edge.i) * D + d);
    const Pack<T, N> other = read<T, N>(x + tile.column(edge.a, edge.o, edge.v) * D + d);
#pragma unroll
    for (int n = 0; n < N; ++n) product.v[n] *= other.v[n];
    out.put(edge.row * D + d, product);
  });
}

// What an edge adds to the gradient of its nodes: de times the other node.
template <class T_, class E, int N_>
struct NodeGradient {
  using T = T_;
  static constexpr int N = N_, kPlanes = 1, kAnchors = 8;
  static constexpr bool kNumber = false;
  const T* x;
  const E* de;
  Tile tile;
  int64_t D;

  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 1>& anchor, Sum<T, N, 1>& column) const {
    const Pack<T, N> g = read<T, N>(de + edge.row * D + d), x_i = read<T, N>(x + tile.anchor(edge.a, edge.i) * D + d),
                     x_j = read<T, N>(x + tile.column(edge.a, edge.o, edge.v) * D + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      anchor.planes[0].v[n] += g.v[n] * x_j.v[n];
      column.planes[0].v[n] += g.v[n] * x_i.v[n];
    }
  }
};

}  // namespace

int launch_edge_start_forward(const EdgeStartForward& args, void* stream) {
  if (args.tile.rows() * args.D == 0) return cudaSuccess;
  if (!numbered(args.tile)) return cudaErrorInvalidConfiguration;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    const auto run = [&]<int N>(Width<N>) -> int {
      const ColumnGrid grid = column_grid(args.tile.rows(), args.D, N, 4 * kColumnRows);
      if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
      GCAHNG_LAUNCH((edge_start_forward_kernel<T, L, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows), stream,
                    args.tile, typed<T>(args.x), out_of<T, L>(args.out), args.D, grid);
      return cudaGetLastError();
    };
    return wide<T>(args.D, args.x, args.out.full, args.out.low) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

int64_t edge_start_backward_scratch(const EdgeStartBackward& args) {
  return node_sums_scratch<NodeGradient<float, float, 1>>(args.tile, args.D);
}

int launch_edge_start_backward(const EdgeStartBackward& args, void* scratch, void* stream) {
  const int64_t D = args.D;
  if (args.tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(args.tile)) return cudaErrorInvalidConfiguration;
  return with_edges(args.dtype, args.edge_type, [&]<class T, class E>(T*, E*) -> int {
    const auto run = [&]<int N>(Width<N>) -> int {
      const NodeGradient<T, E, N> term{typed<T>(args.x), typed<E>(args.de), args.tile, D};
      return add_node_sums(term, args.tile, 0, typed<T>(scratch), {{typed<T>(args.dx)}, nullptr}, D, stream);
    };
    return wide<T>(D, args.x, args.de, args.dx, scratch) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

}  // namespace gcahng::cuda
