#include "../gate.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;  // of a block of the forward: an edge each

template <class T>
struct Tokens {
  const T *u, *c, *v;
};

// An edge's rows of the tokens.
template <class T>
struct Ends {
  const T *u_i, *u_j, *v_i, *v_j;
  T c_i, c_j;
  int64_t i, j;  // nodes (wrapped)
};
template <class T>
__device__ __forceinline__ Ends<T> ends_of(const Tile& tile, const Tokens<T>& n, int64_t row, int64_t D) {
  const Edge e = edge_of(tile, row);
  const int64_t i = tile.anchor(e.a, e.i), j = tile.column(e.a, e.o, e.v);
  return {n.u + i * D, n.u + j * D, n.v + i * D, n.v + j * D, n.c[i], n.c[j], i, j};
}

// The pre-norm sum e + w_i V_i + w_j V_j, channels from d on.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> attended(const Ends<T>& n, const T* e, T w_i, T w_j, int64_t d) {
  Pack<T, N> t = read<T, N>(e + d);
  const Pack<T, N> v_i = read<T, N>(n.v_i + d), v_j = read<T, N>(n.v_j + d);
#pragma unroll
  for (int k = 0; k < N; ++k) t.v[k] += w_i * v_i.v[k] + w_j * v_j.v[k];
  return t;
}

template <class T, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kWarps)
    gate_forward_kernel(Tile tile, Dropout dropout, Tokens<T> tokens, const T* gamma, const T* beta,
                        const T* __restrict__ e, T* __restrict__ e1, L* __restrict__ low, T* __restrict__ weight_i,
                        T* __restrict__ weight_j, int64_t rows, int64_t D) {
  constexpr int N = Shape::N;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const Ends<T> n = ends_of(tile, tokens, row, D);
  const T* x = e + row * D;
  T logit = 0;
  each_pack<N, Shape::V>(D, [&](int, int64_t d) {
    const Pack<T, N> value = read<T, N>(x + d), u_i = read<T, N>(n.u_i + d), u_j = read<T, N>(n.u_j + d);
#pragma unroll
    for (int k = 0; k < N; ++k) logit += value.v[k] * (u_i.v[k] - u_j.v[k]);
  });
  logit = (warp_sum(logit) + (n.c_i - n.c_j)) * inverse_root(T(D));
  const T at_i = logistic(logit), at_j = logistic(-logit);
  T mask_i, mask_j;
  masks_of(dropout, n.i, tile.node(n.j), mask_i, mask_j);
  if (threadIdx.x == 0) {
    weight_i[row] = at_i;
    weight_j[row] = at_j;
  }
  const T w_i = at_i * mask_i, w_j = at_j * mask_j;
  norm_gelu_row<T, N, Shape::V>(
      D, gamma, beta, [&](int64_t d) { return attended<T, N>(n, x, w_i, w_j, d); },
      [&](int64_t d, const Pack<T, N>& y) {
        write(e1 + row * D + d, y);
        if (low) write(low + row * D + d, y);
      });
}

// What the sums over edges need of each edge: dt (T, D), and (T,) dlogit, w_i and w_j.
template <class T>
struct EdgeGradients {
  T *dt, *dlogit, *w_i, *w_j;
};

// de (T, D), or null; may be de1. With sums wanted, `edges`, and part (2, parts, D): sums of dgamma and dbeta over
// `block_rows` rows. Else null pointers.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarp* BlockSums<T, Shape, 2>::kWarps)
    gate_backward_kernel(Tile tile, Dropout dropout, Tokens<T> tokens, const T* gamma, const T* e, const T* de1,
                         const T* weight_i, const T* weight_j, T* de, EdgeGradients<T> edges, T* part, int64_t rows,
                         int64_t block_rows, int64_t parts, int64_t D) {
  using Sums = BlockSums<T, Shape, 2>;
  constexpr int N = Shape::N;
  GCAHNG_SHARED(T, shared, Sums::kValues);
  const Sums sums{shared};
  if (part) sums.clear(D);
  const int64_t first = blockIdx.x * block_rows, stop = first + block_rows < rows ? first + block_rows : rows;
  for (int64_t row = first + threadIdx.y; row < stop; row += Sums::kWarps) {
    const Ends<T> n = ends_of(tile, tokens, row, D);
    const T* x = e + row * D;
    T* dt = (edges.dt ? edges.dt : de) + row * D;
    T mask_i, mask_j;
    masks_of(dropout, n.i, tile.node(n.j), mask_i, mask_j);
    const T at_i = weight_i[row], at_j = weight_j[row], w_i = at_i * mask_i, w_j = at_j * mask_j;
    T dw_i = 0, dw_j = 0;
    norm_gelu_row_backward<T, N, Shape::V>(
        D, gamma, [&](int64_t d) { return attended<T, N>(n, x, w_i, w_j, d); },
        [&](int64_t d) { return read<T, N>(de1 + row * D + d); },
        [&](int64_t d, const Pack<T, N>& value, Pack<T, N> dy, const Pack<T, N>& normalized) {
          const Pack<T, N> v_i = read<T, N>(n.v_i + d), v_j = read<T, N>(n.v_j + d);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            dw_i += value.v[k] * v_i.v[k];
            dw_j += value.v[k] * v_j.v[k];
          }
          write(dt + d, value);
          if (!part) return;
          sums.add(1, d, dy);
#pragma unroll
          for (int k = 0; k < N; ++k) dy.v[k] *= normalized.v[k];
          sums.add(0, d, dy);
        });
    const T dlogit = (warp_sum(dw_i) * mask_i - warp_sum(dw_j) * mask_j) * at_i * at_j * inverse_root(T(D));
    if (part && threadIdx.x == 0) {
      edges.dlogit[row] = dlogit;
      edges.w_i[row] = w_i;
      edges.w_j[row] = w_j;
    }
    if (!de) continue;
    each_pack<N, Shape::V>(D, [&](int, int64_t d) {
      Pack<T, N> value = read<T, N>(dt + d);
      const Pack<T, N> u_i = read<T, N>(n.u_i + d), u_j = read<T, N>(n.u_j + d);
#pragma unroll
      for (int k = 0; k < N; ++k) value.v[k] += dlogit * (u_i.v[k] - u_j.v[k]);
      write(de + row * D + d, value);
    });
  }
  if (part) sums.write(part, blockIdx.x, parts, D);
}

// What an edge adds to the gradients of its two nodes' tokens: dlogit e to U and w dt to V, dlogit to c; at the column
// U and c have the other sign.
template <class T_, int N_>
struct TokenGradient {
  using T = T_;
  static constexpr int N = N_, kPlanes = 2;
  static constexpr bool kNumber = true;
  const T* e;
  EdgeGradients<T> edges;
  int64_t D;

  template <bool kColumn>
  __device__ __forceinline__ void add(const Edge& edge, int64_t d, Sum<T, N, 2>& sum) const {
    const Pack<T, N> x = read<T, N>(e + edge.row * D + d), dt = read<T, N>(edges.dt + edge.row * D + d);
    const T dlogit = edges.dlogit[edge.row], along = kColumn ? -dlogit : dlogit;
    const T w = (kColumn ? edges.w_j : edges.w_i)[edge.row];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sum.planes[0].v[k] += along * x.v[k];
      sum.planes[1].v[k] += w * dt.v[k];
    }
    sum.number += along;
  }
};

template <class T>
Tokens<T> tokens_of(const GateTokens& tokens) {
  return {typed<T>(tokens.u), typed<T>(tokens.c), typed<T>(tokens.v)};
}

}  // namespace

int launch_gate_forward(const GateForward& args, void* stream) {
  const int64_t rows = args.tile.rows(), D = args.D;
  if (rows * D == 0) return cudaSuccess;
  if (!numbered(args.tile) || D > kMaxChannels) return cudaErrorInvalidConfiguration;
  return with_products(args.dtype, args.low_type, [&]<class L>(L*) -> int {
    using T = compute_t<L>;
    const T *gamma = typed<T>(args.norm.gamma), *beta = typed<T>(args.norm.beta), *e = typed<T>(args.e);
    const bool aligned = wide<T>(D, args.tokens.u, args.tokens.v, gamma, beta, e, args.e1, args.low);
    return with_row_shape<T>(D, aligned, [&]<class Shape>(Shape) -> int {
      GCAHNG_LAUNCH((gate_forward_kernel<T, L, Shape>), dim3(ceil_div(rows, kWarps)), dim3(kWarp, kWarps), stream,
                    args.tile, args.dropout, tokens_of<T>(args.tokens), gamma, beta, e, typed<T>(args.e1),
                    typed<L>(args.low), typed<T>(args.weight_i), typed<T>(args.weight_j), rows, D);
      return cudaGetLastError();
    });
  });
}

int64_t gate_backward_scratch(const GateBackward& args) {
  const int64_t rows = args.tile.rows(), D = args.D;
  return args.sums.du ? rows * (D + 3) + 2 * sum_parts(rows) * D + node_sums_scratch(args.tile, D, 2, 1) : 0;
}

int launch_gate_backward(const GateBackward& args, void* scratch, void* stream) {
  const Tile& tile = args.tile;
  const GateGradients& into = args.sums;
  const int64_t D = args.D, rows = tile.rows(), parts = sum_parts(rows);
  const bool summed = into.du;
  if (rows * D == 0 || (!summed && !args.de)) return cudaSuccess;
  if (!numbered(tile) || D > kMaxChannels) return cudaErrorInvalidConfiguration;
  return with_accumulating(args.dtype, [&]<class T>(T*) -> int {
    const T *gamma = typed<T>(args.norm.gamma), *e = typed<T>(args.e), *de1 = typed<T>(args.de1);
    EdgeGradients<T> edges{};
    T *part = nullptr, *node_sums = nullptr;
    if (summed) {
      edges.dt = typed<T>(scratch);
      part = edges.dt + rows * D;
      node_sums = part + 2 * parts * D;
      edges.dlogit = node_sums + node_sums_scratch(tile, D, 2, 1);
      edges.w_i = edges.dlogit + rows;
      edges.w_j = edges.w_i + rows;
    }
    const bool aligned = wide<T>(D, args.tokens.u, args.tokens.v, gamma, e, de1, args.de, into.du, into.dv, scratch);
    const int error = with_row_shape<T>(D, aligned, [&]<class Shape>(Shape) -> int {
      GCAHNG_LAUNCH((gate_backward_kernel<T, Shape>), dim3(parts), dim3(kWarp, BlockSums<T, Shape, 2>::kWarps), stream,
                    tile, args.dropout, tokens_of<T>(args.tokens), gamma, e, de1, typed<T>(args.weight_i),
                    typed<T>(args.weight_j), typed<T>(args.de), edges, part, rows, sum_rows(rows), parts, D);
      return cudaGetLastError();
    });
    if (error || !summed) return error;
    const auto add = [&]<int N>(Width<N>) -> int {
      const TokenGradient<T, N> term{e, edges, D};
      const Places<T, 2> places{{typed<T>(into.du), typed<T>(into.dv)}, typed<T>(into.dc)};
      return add_node_sums(term, tile, 0, node_sums, places, D, stream);
    };
    int failed = aligned ? add(Width<kWide<T>>{}) : add(Width<1>{});
    if (!failed) failed = launch_add_partials<T>(part, typed<T>(into.dgamma), 1, parts, D, stream);
    if (!failed) failed = launch_add_partials<T>(part + parts * D, typed<T>(into.dbeta), 1, parts, D, stream);
    return failed;
  });
}

}  // namespace gcahng::cuda
