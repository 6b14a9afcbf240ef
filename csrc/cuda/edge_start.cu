#include "../edge_start.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kLanes = 32;     // threads along the channels
constexpr int kRows = 8;       // threads along the rows
constexpr int64_t kTile = 32;  // columns j that a block of the forward writes

// e[i, j, :] = x_i[i, :] * x_j[j, :]. A block takes one i and kTile of the j.
template <class T, int N>
__global__ void __launch_bounds__(kLanes* kRows)
    edge_start_forward_kernel(const T* __restrict__ x_i, const T* __restrict__ x_j, T* __restrict__ e, int64_t J,
                              int64_t D, int64_t tiles) {
  const int64_t i = blockIdx.x / tiles, first = (blockIdx.x % tiles) * kTile;
  const int64_t stop = first + kTile < J ? first + kTile : J;
  for (int64_t d = threadIdx.x * N; d < D; d += kLanes * N) {
    const Pack<T, N> a = load<N>(x_i + i * D + d);
    for (int64_t j = first + threadIdx.y; j < stop; j += kRows) {
      const Pack<T, N> b = load<N>(x_j + j * D + d);
      Pack<T, N> product;
#pragma unroll
      for (int k = 0; k < N; ++k) product.v[k] = narrow<T>(widen(a.v[k]) * widen(b.v[k]));
      store<N>(e + (i * J + j) * D + d, product);
    }
  }
}

// out[o, :] = sum over s < count of g[o * outer + s * inner + :] * x[s, :]. A block takes one o and kLanes * N
// channels; its kRows partial sums are added in their order, so that the bits do not depend on the schedule.
template <class T, int N>
__global__ void __launch_bounds__(kLanes* kRows)
    edge_start_node_sum_kernel(const T* __restrict__ g, const T* __restrict__ x, T* __restrict__ out, int64_t count,
                               int64_t D, int64_t outer, int64_t inner, int64_t tiles) {
  GCAHNG_SHARED(compute_t<T>, partial, kRows * N * kLanes);
  const int64_t o = blockIdx.x / tiles, d = ((blockIdx.x % tiles) * kLanes + threadIdx.x) * N;
  compute_t<T> sum[N] = {};
  if (d < D) {
    for (int64_t s = threadIdx.y; s < count; s += kRows) {
      const Pack<T, N> a = load<N>(g + o * outer + s * inner + d);
      const Pack<T, N> b = load<N>(x + s * D + d);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += widen(a.v[k]) * widen(b.v[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) partial[(threadIdx.y * N + k) * kLanes + threadIdx.x] = sum[k];
  __syncthreads();
  if (threadIdx.y != 0 || d >= D) return;
  Pack<T, N> total;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    for (int row = 1; row < kRows; ++row) sum[k] += partial[(row * N + k) * kLanes + threadIdx.x];
    total.v[k] = narrow<T>(sum[k]);
  }
  store<N>(out + o * D + d, total);
}

// e and low (T, D) = x_i x_j of a tile's edges, x (classes + reach, K, D); e or low may be null.
template <class T, class L, int N>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows)
    edge_start_tile_kernel(Tile tile, const T* __restrict__ x, T* __restrict__ e, L* __restrict__ low, int64_t D,
                           ColumnGrid grid) {
  each_column<0, N>(grid, static_cast<T*>(nullptr), [&](int64_t row, int64_t d, auto&) {
    const Edge edge = edge_of(tile, row);
    Pack<T, N> product = read<T, N>(x + tile.anchor(edge.a, edge.i) * D + d);
    const Pack<T, N> other = read<T, N>(x + tile.column(edge.a, edge.o, edge.v) * D + d);
#pragma unroll
    for (int n = 0; n < N; ++n) product.v[n] *= other.v[n];
    if (e) write(e + row * D + d, product);
    if (low) write(low + row * D + d, product);
  });
}

// What an edge adds to the gradient of its nodes: de times the other node.
template <class T_, int N_>
struct NodeGradient {
  using T = T_;
  static constexpr int N = N_, kPlanes = 1;
  static constexpr bool kNumber = false;
  const T *x, *de;
  Tile tile;
  int64_t D;

  template <bool kColumn>
  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 1>& sum) const {
    const int64_t other = kColumn ? tile.anchor(edge.a, edge.i) : tile.column(edge.a, edge.o, edge.v);
    const Pack<T, N> g = read<T, N>(de + edge.row * D + d), at = read<T, N>(x + other * D + d);
#pragma unroll
    for (int n = 0; n < N; ++n) sum.planes[0].v[n] += g.v[n] * at.v[n];
  }
};

template <class T, int N>
int forward(const T* x_i, const T* x_j, T* e, int64_t I, int64_t J, int64_t D, void* stream) {
  const int64_t tiles = ceil_div(J, kTile), blocks = I * tiles;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  GCAHNG_LAUNCH((edge_start_forward_kernel<T, N>), dim3(blocks), dim3(kLanes, kRows), stream, x_i, x_j, e, J, D, tiles);
  return cudaGetLastError();
}

template <class T, int N>
int node_sum(const T* g, const T* x, T* out, int64_t rows, int64_t count, int64_t D, int64_t outer, int64_t inner,
             void* stream) {
  const int64_t tiles = ceil_div(D, kLanes * N), blocks = rows * tiles;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (blocks == 0) return cudaSuccess;
  GCAHNG_LAUNCH((edge_start_node_sum_kernel<T, N>), dim3(blocks), dim3(kLanes, kRows), stream, g, x, out, count, D,
                outer, inner, tiles);
  return cudaGetLastError();
}

template <class T, int N>
int backward(const T* grad_e, const T* x_i, const T* x_j, T* dx_i, T* dx_j, int64_t I, int64_t J, int64_t D,
             void* stream) {
  const int error = node_sum<T, N>(grad_e, x_j, dx_i, I, J, D, J * D, D, stream);
  return error ? error : node_sum<T, N>(grad_e, x_i, dx_j, J, I, D, D, J * D, stream);
}

}  // namespace

int launch_edge_start_forward(DType dtype, const void* x_i, const void* x_j, void* e, int64_t I, int64_t J, int64_t D,
                              void* stream) {
  if (I * J * D == 0) return cudaSuccess;
  int error = cudaSuccess;
  with_type<true>(dtype, [&]<class T>(T*) {
    auto* f = wide<T>(D, x_i, x_j, e) ? forward<T, kWide<T>> : forward<T, 1>;
    error = f(static_cast<const T*>(x_i), static_cast<const T*>(x_j), static_cast<T*>(e), I, J, D, stream);
  });
  return error;
}

int launch_edge_start_backward(DType dtype, const void* grad_e, const void* x_i, const void* x_j, void* dx_i,
                               void* dx_j, int64_t I, int64_t J, int64_t D, void* stream) {
  int error = cudaSuccess;
  with_type<true>(dtype, [&]<class T>(T*) {
    auto* f = wide<T>(D, grad_e, x_i, x_j, dx_i, dx_j) ? backward<T, kWide<T>> : backward<T, 1>;
    error = f(static_cast<const T*>(grad_e), static_cast<const T*>(x_i), static_cast<const T*>(x_j),
              static_cast<T*>(dx_i), static_cast<T*>(dx_j), I, J, D, stream);
  });
  return error;
}

int launch_edge_start_tile(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t D,
                           void* stream) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_products(dtype, low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    const auto run = [&]<int N>(Width<N>) -> int {
      const ColumnGrid grid = column_grid(tile.rows(), D, N, 4 * kColumnRows);
      if (grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
      GCAHNG_LAUNCH((edge_start_tile_kernel<T, L, N>), dim3(grid.blocks()), dim3(kColumnLanes, kColumnRows), stream,
                    tile, static_cast<const T*>(x), static_cast<T*>(e), static_cast<L*>(low), D, grid);
      return cudaGetLastError();
    };
    return wide<T>(D, x, e, low) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

int64_t edge_start_tile_backward_scratch(const Tile& tile, int64_t D) { return node_sums_scratch(tile, D, 1, 0); }

int launch_edge_start_tile_backward(DType dtype, const Tile& tile, const void* x, const void* de, void* dx,
                                    void* scratch, int64_t D, void* stream) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile)) return cudaErrorInvalidConfiguration;
  return with_accumulating(dtype, [&]<class T>(T*) -> int {
    const auto run = [&]<int N>(Width<N>) -> int {
      const NodeGradient<T, N> term{static_cast<const T*>(x), static_cast<const T*>(de), tile, D};
      return add_node_sums(term, tile, 0, static_cast<T*>(scratch), {{static_cast<T*>(dx)}, nullptr}, D, stream);
    };
    return wide<T>(D, x, de, dx, scratch) ? run(Width<kWide<T>>{}) : run(Width<1>{});
  });
}

}  // namespace gcahng::cuda
