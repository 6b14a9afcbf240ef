#include "../gate.h"

#include "norm_gelu.cuh"
#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;  // of a block of the forward
constexpr int kRows = 8;   // edges of one anchor that a warp of the forward takes
constexpr int kStep = 16;  // columns that a block of the backward takes, at most kWarp

template <class T>
struct Tokens {
  const T *u, *c, *v;
};
template <class T>
struct NormOf {
  const T *gamma, *beta;
};

// The tokens of a node, D channels each.
template <class T>
struct Token {
  const T *u, *v;
  T c;
};
template <class T>
__device__ __forceinline__ Token<T> token_of(const Tokens<T>& n, int64_t node, int64_t D) {
  return {n.u + node * D, n.v + node * D, n.c[node]};
}

// The pre-norm sum e + w_i V_i + w_j V_j, channels from d on.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> attended(Pack<T, N> e, const Token<T>& i, const Token<T>& j, T w_i, T w_j,
                                               int d) {
  const Pack<T, N> v_i = read<T, N>(i.v + d), v_j = read<T, N>(j.v + d);
#pragma unroll
  for (int k = 0; k < N; ++k) e.v[k] += w_i * v_i.v[k] + w_j * v_j.v[k];
  return e;
}

// What another lane has of an edge.
template <class T>
__device__ __forceinline__ T of_lane(T x, int lane) {
  return __shfl_sync(kWholeWarp, x, lane);
}

// A warp takes kRows edges of one anchor. Each lane draws the masks of one of them.
template <class T, class E, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kWarps, 1)
    gate_forward_kernel(Tile tile, Dropout dropout, Tokens<T> tokens, NormOf<T> norm, const E* __restrict__ e,
                        E* __restrict__ e1, L* __restrict__ low, T* __restrict__ weight_i, T* __restrict__ weight_j,
                        int64_t channels) {
  constexpr int N = Shape::N;
  const int64_t D = Shape::width(channels);
  const int lane = threadIdx.x, columns = static_cast<int>(tile.O * tile.K), lane_row = lane % kRows;
  const unsigned parts = static_cast<unsigned>(columns + kRows - 1) / kRows;
  const unsigned unit = blockIdx.x * kWarps + static_cast<unsigned>(warp_number());  // of no more than edges
  const int anchor = static_cast<int>(unit / parts), first = static_cast<int>(unit % parts) * kRows;
  if (anchor >= tile.A * tile.K) return;
  const int stop = columns - first < kRows ? columns : first + kRows;
  const int64_t i = tile.first * tile.K + anchor, start = (tile.first + anchor / tile.K + tile.offset) * tile.K;
  T mask_i, mask_j;
  masks_of(dropout, i, node_of(tile, start + first + lane_row), mask_i, mask_j);
  const Token<T> at_i = token_of(tokens, i, D);
  const T root = inverse_root(T(D));
  for (int column = first; column < stop; ++column) {
    const int64_t row = static_cast<int64_t>(anchor) * columns + column;
    const Token<T> at_j = token_of(tokens, start + column, D);
    Cached<T, Shape> cached;
    const auto edge = [&](int d) { return read<T, N>(e + row * D + d); };
    T logit = 0;
    each_pack<Shape>(D, [&](int k, int d) {
      const Pack<T, N> x = cached.make(k, [&] { return edge(d); });
      const Pack<T, N> u_i = read<T, N>(at_i.u + d), u_j = read<T, N>(at_j.u + d);
#pragma unroll
      for (int n = 0; n < N; ++n) logit += x.v[n] * (u_i.v[n] - u_j.v[n]);
    });
    const Logistic<T> weight = logistic((warp_sum(logit) + (at_i.c - at_j.c)) * root);
    if (lane == 0) {
      weight_i[row] = weight.value;
      weight_j[row] = weight.opposite;
    }
    const T w_i = weight.value * of_lane(mask_i, column - first),
            w_j = weight.opposite * of_lane(mask_j, column - first);
    norm_gelu_row<T, Shape>(
        D, norm.gamma, norm.beta,
        [&](int k, int d) { return attended<T, N>(cached.get(k, [&] { return edge(d); }), at_i, at_j, w_i, w_j, d); },
        [&](int, int d, const Pack<T, N>& y) {
          write(e1 + row * D + d, y);
          if constexpr (std::is_same_v<T, E>) {  // narrow edges have no copy beside them
            if (low) write(low + row * D + d, y);
          }
        });
  }
}

// How a block of the backward works: its warps have an anchor each and take the same column at a time. Then all threads
// add up over the edges of that column, whose e and dt lie in shared memory: kPlanes by warps by channels.
template <class T, class Shape>
struct Steps {
  static constexpr int kPlanes = 2, N = Shape::N, V = Shape::V;
  // A thread adds up 2 V sums, whatever the warps are; its registers decide about the rest.
  static constexpr int kWarps = V == 4 ? 8 : V == 8 || V == 16 ? 4 : sizeof(T) == 4 ? 2 : 1;
  // Blocks on a multiprocessor, at least: as many as no register spills for.
  static constexpr int kMany = Shape::kFull && (V < 16 || (kChip >= 90 && kChip < 120)) ? 3 : 2;
  static constexpr int kBlocks = V == 4 ? 2 : V == 8 || V == 16 ? kMany : 1;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kValues = kPlanes * kWarps * Shape::channels;
  static constexpr int kEach = Shape::channels / N;                           // packs of a plane
  static constexpr int kPacks = (kPlanes * kEach + kThreads - 1) / kThreads;  // that a thread adds up
  using NormSums = BlockSums<T, Shape, 2, kWarps, 8>;
  static constexpr bool kShared = !NormSums::kRegisters;  // they need memory of their own
};

template <class T, class E>
struct BackwardTensors {
  const E *e, *de1;
  const T *weight_i, *weight_j;
  E* de;    // or null; may be de1
  T* part;  // (2, blocks, D): sums of dgamma and dbeta; null where no sums are wanted
};

// An edge adds dlogit e to dU and w dt to dV at both of its nodes, dlogit to dc; at the column U and c have the other
// sign.
template <class T, class E, class Shape>
__global__ void __launch_bounds__(Steps<T, Shape>::kThreads, Steps<T, Shape>::kBlocks)
    gate_backward_kernel(Tile tile, Dropout dropout, Tokens<T> tokens, const T* __restrict__ gamma,
                         BackwardTensors<T, E> p, EndGrid grid, EndParts<T, 2> parts, int64_t channels) {
  using S = Steps<T, Shape>;
  constexpr int N = Shape::N, V = Shape::V;
  GCAHNG_SHARED(T, slots, S::kValues);
  GCAHNG_SHARED(T, factors, 4 * S::kWarps);
  GCAHNG_SHARED(T, draws, 4 * kStep * S::kWarps);
  GCAHNG_SHARED(T, norm_memory, S::kShared ? S::NormSums::kValues : 1);
  const int64_t D = Shape::width(channels);
  const int lane = threadIdx.x, warp = warp_number(), thread = warp * kWarp + lane;
  const int K = static_cast<int>(tile.K), columns = static_cast<int>(tile.O) * K;
  const EndBlock block(tile, grid, blockIdx.x);
  const bool summed = p.part, there = warp < block.count;
  const int anchor = there ? block.first + warp : block.first, before = (anchor / K - block.a) * K;
  const int64_t i = tile.first * K + anchor, start = (tile.first + block.a + tile.offset) * K;
  const auto row_of = [&](int column) { return static_cast<int64_t>(anchor) * columns + column - before; };
  const auto valid = [&](int column) { return there && column >= before && column - before < columns; };
  const auto row_at = [&](int plane, int w, int d) {
    return (plane ? parts.rows.planes[1] : parts.rows.planes[0]) + block.row_place(grid, w) * D + d;
  };
  // f(k, plane, d) for each pack that this thread adds up.
  const auto each_sum = [&](auto f) {
    constexpr int kEach = S::kEach;
    if constexpr (V > 0 && S::kPacks > 1) {  // as many of each plane
      constexpr int kOf = kEach / S::kThreads;
#pragma unroll
      for (int k = 0; k < S::kPacks; ++k) {
        const int d = (k % kOf * S::kThreads + thread) * N;
        if (Shape::kFull || d < D) f(k, k / kOf, d);
      }
    } else if constexpr (V > 0) {
      const int d = thread % kEach * N;
      if (thread < S::kPlanes * kEach && (Shape::kFull || d < D)) f(0, thread / kEach, d);
    } else {
#pragma unroll 1
      for (int number = thread; number < S::kPlanes * kEach; number += S::kThreads)
        if (number % kEach * N < D) f(0, number / kEach, number % kEach * N);
    }
  };
  T* const e_slot = slots + warp * Shape::channels;
  T* const dt_slot = slots + (S::kWarps + warp) * Shape::channels;
  typename S::NormSums norms{S::kShared ? norm_memory : slots};
  if (summed) norms.clear(D);
  Pack<T, N> at_anchors[V ? S::kPacks : 1][S::kWarps] = {};  // of V = 0, they are added to where they are left
  T number = 0;
  if constexpr (V == 0) {
    if (summed) {
      each_sum([&](int, int plane, int d) {
        for (int w = 0; w < block.count; ++w) store(row_at(plane, w, d), Pack<T, N>{});
      });
    }
  }

  // Each lane works out one column's weights and masks, for the whole warp.
  T* const drawn = draws + warp * 4 * kStep;
  if (const int column = block.begin + lane; lane < kStep && column < block.end && valid(column)) {
    Pack<T, 2> weight{{p.weight_i[row_of(column)], p.weight_j[row_of(column)]}}, mask;
    masks_of(dropout, i, node_of(tile, start + column), mask.v[0], mask.v[1]);
    store_shared(drawn + 4 * lane, weight);
    store_shared(drawn + 4 * lane + 2, mask);
  }
  __syncwarp();
  const Token<T> at_i = token_of(tokens, i, D);
  const T root = inverse_root(T(D));
  for (int column = block.begin; column < block.end; ++column) {
    if (valid(column)) {
      const T* const at_column = drawn + 4 * (column - block.begin);
      const Pack<T, 2> own = load<2>(at_column), kept = load<2>(at_column + 2);
      const T w_i = own.v[0] * kept.v[0], w_j = own.v[1] * kept.v[1];
      const int64_t at = row_of(column) * D;
      const Token<T> at_j = token_of(tokens, start + column, D);
      Cached<T, Shape> gradients;
      T dw_i = 0, dw_j = 0;
      norm_gelu_row_backward<T, Shape>(
          D, gamma, Parked<T, Shape>{dt_slot},
          [&](int, int d) {
            const Pack<T, N> x = read<T, N>(p.e + at + d);
            if (summed) store_shared(e_slot + d, x);
            return attended<T, N>(x, at_i, at_j, w_i, w_j, d);
          },
          [&](int, int d) { return read<T, N>(p.de1 + at + d); },
          [&](int k, int d, const Pack<T, N>& dt, const Pack<T, N>& dy, const Pack<T, N>& normalized) {
            const Pack<T, N> v_i = read<T, N>(at_i.v + d), v_j = read<T, N>(at_j.v + d);
#pragma unroll
            for (int n = 0; n < N; ++n) {
              dw_i += dt.v[n] * v_i.v[n];
              dw_j += dt.v[n] * v_j.v[n];
            }
            gradients.make(k, [&] { return dt; });
            if (summed || !V) store_shared(dt_slot + d, dt);
            if (!summed) return;
            norms.add(0, k, d, dy, normalized);
            norms.add(1, k, d, dy);
          });
      const T dlogit = (warp_sum(dw_i) * kept.v[0] - warp_sum(dw_j) * kept.v[1]) * own.v[0] * own.v[1] * root;
      number += dlogit;
      if (summed && lane == 0) {
        T* const mine = factors + 4 * warp;
        mine[0] = dlogit, mine[1] = -dlogit, mine[2] = w_i, mine[3] = w_j;
      }
      if (p.de) {
        each_pack<Shape>(D, [&](int k, int d) {
          Pack<T, N> value = gradients.get(k, [&] { return load<N>(static_cast<const T*>(dt_slot + d)); });
          const Pack<T, N> u_i = read<T, N>(at_i.u + d), u_j = read<T, N>(at_j.u + d);
#pragma unroll
          for (int n = 0; n < N; ++n) value.v[n] += dlogit * (u_i.v[n] - u_j.v[n]);
          write(p.de + at + d, value);
        });
      }
    } else if (summed) {  // adds nothing
      const Pack<T, N> zero{};
      each_pack<Shape>(D, [&](int, int d) {
        store_shared(e_slot + d, zero);
        store_shared(dt_slot + d, zero);
      });
      if (lane < 4) factors[4 * warp + lane] = 0;
    }
    if (!summed) continue;
    __syncthreads();
    const int64_t place = block.column_place(grid, column);
    each_sum([&](int k, int plane, int d) {
      Pack<T, N> sum{};
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) {
        const Pack<T, N> x = load<N>(static_cast<const T*>(slots + (plane * S::kWarps + w) * Shape::channels + d));
        const Pack<T, 2> by = load<2>(static_cast<const T*>(factors + 4 * w + 2 * plane));
        Pack<T, N> anchor{};
        if constexpr (V > 0)
          anchor = at_anchors[k][w];
        else if (w < block.count)
          anchor = load<N>(static_cast<const T*>(row_at(plane, w, d)));
#pragma unroll
        for (int n = 0; n < N; ++n) {
          anchor.v[n] += by.v[0] * x.v[n];
          sum.v[n] += by.v[1] * x.v[n];
        }
        if constexpr (V > 0)
          at_anchors[k][w] = anchor;
        else if (w < block.count)
          store(row_at(plane, w, d), anchor);
      }
      write((plane ? parts.columns.planes[1] : parts.columns.planes[0]) + place * D + d, sum);
    });
    if (thread == 0) {
      T sum = 0;
      for (int w = 0; w < S::kWarps; ++w) sum += factors[4 * w + 1];
      parts.columns.numbers[place] = sum;
    }
    __syncthreads();
  }
  if (!summed) return;
  if constexpr (V > 0) {
    each_sum([&](int k, int plane, int d) {
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w)
        if (w < block.count) write(row_at(plane, w, d), at_anchors[k][w]);
    });
  }
  if (there && lane == 0) parts.rows.numbers[block.row_place(grid, warp)] = number;
  norms.write(p.part, blockIdx.x, gridDim.x, D);
}

template <class T>
Tokens<T> tokens_of(const GateTokens& tokens) {
  return {typed<T>(tokens.u), typed<T>(tokens.c), typed<T>(tokens.v)};
}

// f(EndGrid of the backward, Shape).
template <class T, class F>
int with_steps(const GateBackward& args, bool aligned, F f) {
  return with_row_shape<T>(args.D, aligned, [&]<class Shape>(Shape) {
    // Of 32 channels, too many would be in registers at once if none were asked whether it is there.
    using Taken = RowShape<Shape::N, Shape::V, Shape::kFull && Shape::V != 32>;
    return f(end_grid(args.tile, Steps<T, Taken>::kWarps, kStep), Taken{});
  });
}
int64_t backward_values(const GateBackward& args, const EndGrid& grid) {
  return end_scratch(args.tile, grid, args.D, 2, 1) + 2 * int64_t(grid.blocks()) * args.D;
}

}  // namespace

int launch_gate_forward(const GateForward& args, void* stream) {
  const Tile& tile = args.tile;
  const int64_t D = args.D, units = tile.A * tile.K * ceil_div(tile.O * tile.K, kRows);
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile) || D > kMaxChannels) return cudaErrorInvalidConfiguration;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class T, class E, class L>(T*, E*, L*) -> int {
    const NormOf<T> norm{typed<T>(args.norm.gamma), typed<T>(args.norm.beta)};
    const E* e = typed<E>(args.e);
    constexpr bool kCopied = std::is_same_v<T, E>;
    E* e1 = typed<E>(kCopied ? args.out.full : args.out.low);
    L* low = kCopied ? typed<L>(args.out.low) : nullptr;
    const bool aligned = wide<T>(D, args.tokens.u, args.tokens.v, norm.gamma, norm.beta, e, e1, low);
    return with_row_shape<T>(D, aligned, [&]<class Shape>(Shape) -> int {
      GCAHNG_LAUNCH((gate_forward_kernel<T, E, L, Shape>), dim3(ceil_div(units, kWarps)), dim3(kWarp, kWarps), stream,
                    tile, args.dropout, tokens_of<T>(args.tokens), norm, e, e1, low, typed<T>(args.weight_i),
                    typed<T>(args.weight_j), D);
      return cudaGetLastError();
    });
  });
}

int64_t gate_backward_scratch(const GateBackward& args) {
  if (!args.sums.du || args.D > kMaxChannels) return 0;
  int64_t most = 0;
  for (const int64_t anchors : {1, 2, 4, 8}) {
    const int64_t values = backward_values(args, end_grid(args.tile, anchors, kStep));
    most = values > most ? values : most;
  }
  return most;
}

int launch_gate_backward(const GateBackward& args, void* scratch, void* stream) {
  const Tile& tile = args.tile;
  const GateGradients& into = args.sums;
  const int64_t D = args.D;
  const bool summed = into.du;
  if (tile.rows() * D == 0 || (!summed && !args.de)) return cudaSuccess;
  if (!numbered(tile) || D > kMaxChannels) return cudaErrorInvalidConfiguration;
  return with_edges(args.dtype, args.edge_type, [&]<class T, class E>(T*, E*) -> int {
    const T* gamma = typed<T>(args.norm.gamma);
    const E *e = typed<E>(args.e), *de1 = typed<E>(args.de1);
    const bool aligned = wide<T>(D, args.tokens.u, args.tokens.v, gamma, e, de1, args.de, into.du, into.dv, scratch);
    return with_steps<T>(args, aligned, [&]<class Shape>(const EndGrid& grid, Shape) -> int {
      using S = Steps<T, Shape>;
      using Sums = Parts<T, Shape::N, 2, true>;  // dU and dV, and the number dc
      EndParts<T, 2> parts{};
      T* part = nullptr;
      if (summed) {
        part = typed<T>(scratch);
        parts = end_parts<2>(tile, grid, part + 2 * int64_t(grid.blocks()) * D, D);
      }
      const BackwardTensors<T, E> p{
          .e = e,
          .de1 = de1,
          .weight_i = typed<T>(args.weight_i),
          .weight_j = typed<T>(args.weight_j),
          .de = typed<E>(args.de),
          .part = part,
      };
      GCAHNG_LAUNCH((gate_backward_kernel<T, E, Shape>), dim3(grid.blocks()), dim3(kWarp, S::kWarps), stream, tile,
                    args.dropout, tokens_of<T>(args.tokens), gamma, p, grid, parts, D);
      const int error = cudaGetLastError();
      if (error || !summed) return error;
      const Places<T, 2> places{{typed<T>(into.du), typed<T>(into.dv)}, typed<T>(into.dc)};
      int failed = launch_node_sums<Sums>(tile, grid, parts, places, 0, D, stream);
      const int64_t blocks = grid.blocks();
      if (!failed) failed = launch_add_partials<T>(part, typed<T>(into.dgamma), 1, blocks, D, stream);
      if (!failed) failed = launch_add_partials<T>(part + blocks * D, typed<T>(into.dbeta), 1, blocks, D, stream);
      return failed;
    });
  });
}

}  // namespace gcahng::cuda
