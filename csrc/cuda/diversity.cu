#include "../diversity.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

// What an edge adds to J_div's sums at its nodes: x = theta - 1/2, and at the anchor x^2 for each of its directions.
template <class T_, int N_>
struct Spread {
  using T = T_;
  static constexpr int N = N_, kPlanes = 2;
  static constexpr bool kNumber = false;
  const T* theta;
  int64_t mirrored, D;

  template <bool kColumn>
  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 2>& sum) const {
    const Pack<T, N> x = read<T, N>(theta + edge.row * D + d);
    const T directions = edge.o >= mirrored ? T(2) : T(1);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T value = x.v[n] - T(0.5);
      sum.planes[0].v[n] += value;
      if (!kColumn) sum.planes[1].v[n] += directions * value * value;
    }
  }
};

// dtheta += scale (theta - mean_i), and scale (theta - mean_j) for mirrored offsets.
template <class T, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, kBlocks)
    diversity_backward_kernel(Tile tile, const T* __restrict__ theta, const T* __restrict__ mean,
                              const T* __restrict__ scale, T* dtheta, int64_t D, ColumnGrid grid) {
  const T by = *scale;
  each_column<0, N>(grid, static_cast<T*>(nullptr), [&](int64_t row, int64_t d, auto&) {
    const Edge edge = edge_of(tile, row);
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
    for (int n = 0; n < N; ++n) out.v[n] += by * away.v[n];
    write(dtheta + row * D + d, out);
  });
}

}  // namespace

int64_t diversity_forward_scratch(const Tile& tile, int64_t D) { return node_sums_scratch(tile, D, 2, 0); }

int launch_diversity_forward(DType dtype, const Tile& tile, const void* theta, void* sum, void* square, void* scratch,
                             int64_t D, void* stream) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_accumulating(dtype, [&]<class T>(T*) -> int {
    const auto run = [&]<int N>(Width<N>) -> int {
      const Spread<T, N> term{static_cast<const T*>(theta), tile.mirrored, D};
      const Places<T, 2> into{{static_cast<T*>(sum), static_cast<T*>(square)}, nullptr};
      return add_node_sums(term, tile, tile.mirrored, static_cast<T*>(scratch), into, D, stream);
    };
    return wide<T>(D, theta, sum, square, scratch) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

int launch_diversity_backward(DType dtype, const Tile& tile, const void* theta, const void* mean, const void* scale,
                              void* dtheta, int64_t D, void* stream) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_accumulating(dtype, [&]<class T>(T*) -> int {
    const auto run = [&]<int N>(Width<N>) -> int {
      const ColumnGrid grid = column_grid(tile.rows(), D, N, 4 * kColumnRows);
      if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
      GCAHNG_LAUNCH((diversity_backward_kernel<T, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows), stream,
                    tile, static_cast<const T*>(theta), static_cast<const T*>(mean), static_cast<const T*>(scale),
                    static_cast<T*>(dtheta), D, grid);
      return cudaGetLastError();
    };
    return wide<T>(D, theta, mean, dtheta) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

}  // namespace gcahng::cuda
