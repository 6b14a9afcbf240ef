// A mix, its negatives' weights, and the mix itself.
#pragma once
#include "../mix.h"
#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;     // of a block: a mix or an edge each
constexpr int kTogether = 4;  // sums that a warp forms at once
constexpr double kSmall = 1e-6;

template <class T>
struct Inputs {
  const T *z, *d_plus, *kappa, *pull;
  int64_t D;
};

// One mix: an anchor, and the K negatives of one class, `step` edges apart (csrc/mix.h numbers them).
struct Mix {
  int64_t anchor, negative;  // nodes (wrapped); negatives are consecutive
  int64_t edge, step;        // rows of theta
  int view;                  // of the anchor
  int positive;              // the negative that is the anchor's positive (in its own class), or -1
  bool own;                  // the anchor's own class
};

__device__ __forceinline__ Mix mix_of(const Tile& tile, int64_t number) {
  const int K = static_cast<int>(tile.K), O = static_cast<int>(tile.O), mirrored = static_cast<int>(tile.mirrored);
  const int forward = static_cast<int>(tile.A) * K * O, m = static_cast<int>(number);
  if (m < forward) {
    const int o = m % O, i = m / O % K, a = m / O / K;
    const bool own = tile.offset + o == 0;
    return {tile.anchor(a, i), tile.column(a, o, 0), tile.row(a, i, o, 0), 1, i, own ? (i + 1) % K : -1, own};
  }
  const int back = m - forward, width = O - mirrored;
  const int v = back % K, o = back / K % width + mirrored, a = back / K / width;
  return {tile.column(a, o, v), tile.anchor(a, 0), tile.row(a, 0, o, v), tile.O * tile.K, v, -1, tile.offset + o == 0};
}

// The numbers of the two mixes that an edge belongs to; the one back only where the edge's offset is mirrored.
__device__ __forceinline__ int64_t forward_mix(const Tile& tile, const Edge& e) {
  return (static_cast<int64_t>(e.a) * tile.K + e.i) * tile.O + e.o;
}
__device__ __forceinline__ int64_t back_mix(const Tile& tile, const Edge& e) {
  return tile.A * tile.K * tile.O + (e.a * (tile.O - tile.mirrored) + e.o - tile.mirrored) * tile.K + e.v;
}

// What follows from d-: ratio = min(d+/d-, 1), and easy: the negative is not nearer than the positive.
template <class T>
struct Share {
  T ratio, away;
  bool easy;
};
template <class T>
__device__ __forceinline__ Share<T> share_of(T square, T d_plus, bool positive) {
  const T away = sqrt(square);
  const bool easy = !positive && d_plus < away;  // not by a rounding of the same distance
  return {easy ? d_plus / away : T(1), away, easy};
}

// A mix's negative: N = a + sum over v of kappa (b_v - a) (ratio + rest theta_v), rest = (1 - ratio) pull.
template <class T>
struct Weight {
  T ratio, rest, kappa, away;
};
template <class T, class E, int N>
__device__ __forceinline__ Pack<T, N> mixed(const Mix& m, const Inputs<T>& in, const E* theta, const Weight<T>* weights,
                                            int K, const Pack<T, N>& a, int64_t d) {
  Pack<T, N> out = a;
  for (int v = 0; v < K; ++v) {
    const Pack<T, N> b = read<T, N>(in.z + (m.negative + v) * in.D + d);
    const Pack<T, N> t = read<T, N>(theta + (m.edge + v * m.step) * in.D + d);
    const Weight<T> w = weights[v];
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] += w.kappa * (b.v[n] - a.v[n]) * (w.ratio + w.rest * t.v[n]);
  }
  return out;
}

// A warp's weights of a mix, from the distances to its negatives.
template <class T, int N>
__device__ __forceinline__ void weigh(const Mix& m, const Inputs<T>& in, int K, Weight<T>* weights) {
  const T d_plus = in.d_plus[m.anchor], pull = *in.pull;
  for (int first = 0; first < K; first += kTogether) {
    T square[kTogether] = {};
    each_pack<RowShape<N, 0>>(in.D, [&](int, int d) {
      const Pack<T, N> a = read<T, N>(in.z + m.anchor * in.D + d);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k >= K) continue;
        const Pack<T, N> b = read<T, N>(in.z + (m.negative + first + k) * in.D + d);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const T x = a.v[n] - b.v[n] + T(kSmall);
          square[k] += x * x;
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int v = first + k;
      const Share<T> s = share_of(warp_sum(square[k]), d_plus, v == m.positive);
      if (threadIdx.x == 0 && v < K) weights[v] = {s.ratio, (T(1) - s.ratio) * pull, in.kappa[m.view * K + v], s.away};
    }
  }
  __syncwarp();
}

}  // namespace
}  // namespace gcahng::cuda
