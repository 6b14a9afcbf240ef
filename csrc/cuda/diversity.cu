#include "../diversity.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

// What an edge adds to J_div's sums at its nodes: x = theta - 1/2, and at the anchor x^2 for each of its directions.
template <class T_, class E, int N_>
struct Spread {
  using T = T_;
  static constexpr int N = N_, kPlanes = 2, kAnchors = 4;
  static constexpr bool kNumber = false;
  const E* theta;
  int64_t mirrored, D;

  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 2>& anchor, Sum<T, N, 2>& column) const {
    const Pack<T, N> x = read<T, N>(theta + edge.row * D + d);
    const bool both = edge.o >= mirrored;
    const T directions = both ? T(2) : T(1);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T value = x.v[n] - T(0.5);
      anchor.planes[0].v[n] += value;
      anchor.planes[1].v[n] += directions * value * value;
      column.planes[0].v[n] += both ? value : T(0);
    }
  }
};

// dtheta += scale (theta - mean_i), and scale (theta - mean_j) for mirrored offsets.
template <class T, class E, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, kBlocks)
    diversity_backward_kernel(Tile tile, const E* __restrict__ theta, const T* __restrict__ mean,
                              const T* __restrict__ scale, E* dtheta, int64_t D, ColumnGrid grid) {
  const T factor = *scale;
  each_edge<0, N>(tile, grid, static_cast<T*>(nullptr), [&](const Edge& edge, int64_t d, auto&) {
    const int64_t row = edge.row;
    const Pack<T, N> x = read<T, N>(theta + row * D + d),
                     mean_i = read<T, N>(mean + tile.anchor(edge.a, edge.i) * D + d);
    Pack<T, N> away, out = read<T, N>(dtheta + row * D + d);
#pragma unroll
    for (int n = 0; n < N; ++n) away.v[n] = x.v[n] - mean_i.v[n];
    if (edge.o >= tile.mirrored) {
      const Pack<T, N> mean_j = read<T, N>(mean + tile.column(edge.a, edge.o, edge.v) * D + d);
#pragma unroll
      for (int n = 0; n < N; ++n) away.v[n] += x.v[n] - mean_j.v[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] += factor * away.v[n];
    write(dtheta + row * D + d, out);
  });
}

}  // namespace

int64_t diversity_forward_scratch(const DiversityForward& args) {
  return node_sums_scratch<Spread<float, float, 1>>(args.tile, args.D);
}

int launch_diversity_forward(const DiversityForward& args, void* scratch, void* stream) {
  const Tile& tile = args.tile;
  const int64_t D = args.D;
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_edges(args.dtype, args.edge_type, [&]<class T, class E>(T*, E*) -> int {
    const auto run = [&]<int N>(Width<N>) -> int {
      const Spread<T, E, N> term{typed<E>(args.theta), tile.mirrored, D};
      const Places<T, 2> into{{typed<T>(args.sum), typed<T>(args.square)}, nullptr};
      return add_node_sums(term, tile, tile.mirrored, typed<T>(scratch), into, D, stream);
    };
    return wide<T>(D, args.theta, args.sum, args.square, scratch) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

int launch_diversity_backward(const DiversityBackward& args, void* stream) {
  const int64_t rows = args.tile.rows(), D = args.D;
  if (rows * D == 0) return cudaSuccess;
  if (!numbered(args.tile)) return cudaErrorInvalidConfiguration;
  return with_edges(args.dtype, args.edge_type, [&]<class T, class E>(T*, E*) -> int {
    const auto run = [&]<int N>(Width<N>) -> int {
      const ColumnGrid grid = column_grid(rows, D, N, 4 * kColumnRows);
      if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
      GCAHNG_LAUNCH((diversity_backward_kernel<T, E, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows), stream,
                    args.tile, typed<E>(args.theta), typed<T>(args.mean), typed<T>(args.scale), typed<E>(args.dtheta),
                    D, grid);
      return cudaGetLastError();
    };
    return wide<T>(D, args.theta, args.mean, args.dtheta) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

}  // namespace gcahng::cuda
