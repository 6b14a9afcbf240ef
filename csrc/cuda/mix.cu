#include "../mix.h"

#include "tiles.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;      // of a block: a mix or an edge each
constexpr int kMaxViews = 64;  // negatives of a mix
constexpr int kTogether = 4;   // sums that a warp forms at once
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
inline int64_t mixes_of(const Tile& tile) { return tile.A * tile.K * (2 * tile.O - tile.mirrored); }

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
template <class T, int N>
__device__ __forceinline__ Pack<T, N> mixed(const Mix& m, const Inputs<T>& in, const T* theta, const Weight<T>* weights,
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
    each_pack<N, 0>(in.D, [&](int, int64_t d) {
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

// negatives (mixes, D), and logits = a . N and squares = |N|^2 (mixes,); either may be null.
template <class T, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    mix_forward_kernel(Tile tile, Inputs<T> in, const T* __restrict__ theta, T* __restrict__ negatives,
                       T* __restrict__ logits, T* __restrict__ squares, int64_t mixes) {
  GCAHNG_SHARED(Weight<T>, shared, kWarps * kMaxViews);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (number >= mixes) return;
  Weight<T>* weights = shared + threadIdx.y * kMaxViews;
  const Mix m = mix_of(tile, number);
  const int K = static_cast<int>(tile.K);
  weigh<T, N>(m, in, K, weights);
  T logit = 0, square = 0;
  each_pack<N, 0>(in.D, [&](int, int64_t d) {
    const Pack<T, N> a = read<T, N>(in.z + m.anchor * in.D + d);
    const Pack<T, N> out = mixed(m, in, theta, weights, K, a, d);
    if (negatives) write(negatives + number * in.D + d, out);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      logit += a.v[n] * out.v[n];
      square += out.v[n] * out.v[n];
    }
  });
  if (!logits) return;
  logit = warp_sum(logit);
  square = warp_sum(square);
  if (threadIdx.x != 0) return;
  logits[number] = logit;
  squares[number] = square;
}

// dtheta (T, D) from dn (mixes, D), both directions of an edge together: a warp an edge.
template <class T, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    mix_backward_theta_kernel(Tile tile, Inputs<T> in, const T* __restrict__ dn, T* __restrict__ dtheta, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const Edge e = edge_of(tile, row);
  const int K = static_cast<int>(tile.K);
  const int64_t i = tile.anchor(e.a, e.i), j = tile.column(e.a, e.o, e.v);
  const T *z_i = in.z + i * in.D, *z_j = in.z + j * in.D;
  const bool back = e.o >= tile.mirrored;
  T square = 0, square_back = 0;
  each_pack<N, 0>(in.D, [&](int, int64_t d) {
    const Pack<T, N> a = read<T, N>(z_i + d), b = read<T, N>(z_j + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T x = a.v[n] - b.v[n] + T(kSmall), y = b.v[n] - a.v[n] + T(kSmall);
      square += x * x;
      square_back += y * y;
    }
  });
  const bool positive = tile.offset + e.o == 0 && e.v == (e.i + 1) % K;
  const T ratio = share_of(warp_sum(square), in.d_plus[i], positive).ratio;
  const T ratio_back = share_of(warp_sum(square_back), in.d_plus[j], false).ratio;
  const T pull = *in.pull, scale = (T(1) - ratio) * pull * in.kappa[e.i * K + e.v];
  const T scale_back = back ? (T(1) - ratio_back) * pull * in.kappa[e.v * K + e.i] : 0;
  const T* g = dn + forward_mix(tile, e) * in.D;
  const T* g_back = back ? dn + back_mix(tile, e) * in.D : nullptr;
  each_pack<N, 0>(in.D, [&](int, int64_t d) {
    const Pack<T, N> a = read<T, N>(z_i + d), b = read<T, N>(z_j + d);
    Pack<T, N> out = read<T, N>(g + d);
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] *= scale * (b.v[n] - a.v[n]);
    if (back) {
      const Pack<T, N> other = read<T, N>(g_back + d);
#pragma unroll
      for (int n = 0; n < N; ++n) out.v[n] += scale_back * other.v[n] * (a.v[n] - b.v[n]);
    }
    write(dtheta + row * in.D + d, out);
  });
}

// What the sums over edges need of each mix: its negative (mixes, D) and its part of d(d_plus) (mixes,); and of each
// negative in it, by the mixes' direction (forward, back) and theta's row, ratio and along, which d- has a share of
// (2, T).
template <class T>
struct Saved {
  T *negatives, *d_plus, *ratio, *along;
};

template <class T, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    mix_backward_kernel(Tile tile, Inputs<T> in, const T* __restrict__ theta, const T* __restrict__ dlogits, T factor,
                        Saved<T> saved, int64_t mixes) {
  GCAHNG_SHARED(Weight<T>, shared, kWarps * kMaxViews);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (number >= mixes) return;
  const Mix m = mix_of(tile, number);
  if (m.own) return;
  Weight<T>* weights = shared + threadIdx.y * kMaxViews;
  const int K = static_cast<int>(tile.K);
  weigh<T, N>(m, in, K, weights);
  T* negative = saved.negatives + number * in.D;
  each_pack<N, 0>(in.D, [&](int, int64_t d) {
    const Pack<T, N> a = read<T, N>(in.z + m.anchor * in.D + d);
    write(negative + d, mixed(m, in, theta, weights, K, a, d));
  });
  const T g = dlogits[number], pull = *in.pull;
  const int64_t direction = number < tile.A * tile.K * tile.O ? 0 : tile.rows();
  T d_plus = 0;
  for (int first = 0; first < K; first += kTogether) {
    T d_ratio[kTogether] = {};
    each_pack<N, 0>(in.D, [&](int, int64_t d) {
      const Pack<T, N> a = read<T, N>(in.z + m.anchor * in.D + d), out = read<T, N>(negative + d);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k >= K) continue;
        const Pack<T, N> b = read<T, N>(in.z + (m.negative + first + k) * in.D + d);
        const Pack<T, N> t = read<T, N>(theta + (m.edge + (first + k) * m.step) * in.D + d);
#pragma unroll
        for (int n = 0; n < N; ++n)
          d_ratio[k] += (g * a.v[n] + factor * out.v[n]) * (b.v[n] - a.v[n]) * (T(1) - pull * t.v[n]);
      }
    });
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const T sum = warp_sum(d_ratio[k]);
      if (first + k >= K) continue;
      const Weight<T> w = weights[first + k];
      // Easy where ratio is below 1; else it is 1, and stays so.
      const T slope = w.ratio < T(1) ? w.kappa * sum : 0;
      d_plus += slope / w.away;
      if (threadIdx.x != 0) continue;
      const int64_t row = direction + m.edge + (first + k) * m.step;
      saved.ratio[row] = w.ratio;
      saved.along[row] = -slope * w.ratio / (w.away * w.away);
    }
  }
  if (threadIdx.x == 0) saved.d_plus[number] = d_plus;
}

// What an edge adds to dz at its two nodes. Of each mix, dn = g a + factor N reaches the negative b as
// kappa dn (ratio + rest theta) + along (b - a - small), and the anchor a as dn + g N less all of these.
template <class T_, int N_>
struct MixGradient {
  using T = T_;
  static constexpr int N = N_, kPlanes = 1;
  static constexpr bool kNumber = true;
  Tile tile;
  Inputs<T> in;
  const T *theta, *dlogits;
  T factor;
  Saved<T> saved;

  // Adds sign times what reaches the negative, and with `whole` the anchor's dn + g N.
  __device__ __forceinline__ void add_mix(int64_t number, int64_t row, T kappa, const Pack<T, N>& a,
                                          const Pack<T, N>& b, const Pack<T, N>& t, int64_t d, T sign, bool whole,
                                          Sum<T, N, 1>& sum) const {
    const Pack<T, N> negative = read<T, N>(saved.negatives + number * in.D + d);
    const T g = dlogits[number], ratio = saved.ratio[row], along = saved.along[row];
    const T rest = (T(1) - ratio) * *in.pull;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T dn = g * a.v[n] + factor * negative.v[n];
      const T value = kappa * dn * (ratio + rest * t.v[n]) + along * (b.v[n] - a.v[n] - T(kSmall));
      sum.planes[0].v[n] += sign * value;
      if (whole) sum.planes[0].v[n] += dn + g * negative.v[n];
    }
    if (whole) sum.number += saved.d_plus[number];
  }

  template <bool kColumn>
  __device__ __forceinline__ void add(const Edge& e, int64_t d, Sum<T, N, 1>& sum) const {
    if (tile.offset + e.o == 0) return;
    const int64_t i = tile.anchor(e.a, e.i), j = tile.column(e.a, e.o, e.v);
    const Pack<T, N> z_i = read<T, N>(in.z + i * in.D + d), z_j = read<T, N>(in.z + j * in.D + d);
    const Pack<T, N> t = read<T, N>(theta + e.row * in.D + d);
    const T* kappa = in.kappa;
    add_mix(forward_mix(tile, e), e.row, kappa[e.i * tile.K + e.v], z_i, z_j, t, d, kColumn ? 1 : -1,
            !kColumn && e.v == 0, sum);
    if (e.o >= tile.mirrored)
      add_mix(back_mix(tile, e), tile.rows() + e.row, kappa[e.v * tile.K + e.i], z_j, z_i, t, d, kColumn ? -1 : 1,
              kColumn && e.i == 0, sum);
  }
};

template <class T>
Inputs<T> inputs_of(const MixInputs& in, int64_t D) {
  return {static_cast<const T*>(in.z), static_cast<const T*>(in.d_plus), static_cast<const T*>(in.kappa),
          static_cast<const T*>(in.pull), D};
}

// f(Inputs<T>, Width) for tiles that can be numbered; pointers: of rows of D values.
template <class F, class... P>
int with_inputs(DType dtype, const Tile& tile, const MixInputs& in, int64_t D, F f, const P*... pointers) {
  if (tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(tile) || mixes_of(tile) > kMaxBlocks || tile.K > kMaxViews) return cudaErrorInvalidConfiguration;
  const auto run = [&]<class T>(T*) -> int {
    return wide<T>(D, in.z, pointers...) ? f(inputs_of<T>(in, D), Width<kWide<T>>{})
                                         : f(inputs_of<T>(in, D), Width<1>{});
  };
  return dtype == DType::f64 ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

}  // namespace

int launch_mix_forward(DType dtype, const Tile& tile, MixInputs in, const void* theta, void* negatives, void* logits,
                       void* squares, int64_t D, void* stream) {
  const auto run = [&]<class T, int N>(const Inputs<T>& inputs, Width<N>) -> int {
    const int64_t mixes = mixes_of(tile);
    GCAHNG_LAUNCH((mix_forward_kernel<T, N>), dim3(ceil_div(mixes, kWarps)), dim3(kWarp, kWarps), stream, tile, inputs,
                  static_cast<const T*>(theta), static_cast<T*>(negatives), static_cast<T*>(logits),
                  static_cast<T*>(squares), mixes);
    return cudaGetLastError();
  };
  return with_inputs(dtype, tile, in, D, run, theta, negatives);
}

int launch_mix_backward_theta(DType dtype, const Tile& tile, MixInputs in, const void* dn, void* dtheta, int64_t D,
                              void* stream) {
  const auto run = [&]<class T, int N>(const Inputs<T>& inputs, Width<N>) -> int {
    const int64_t rows = tile.rows();
    GCAHNG_LAUNCH((mix_backward_theta_kernel<T, N>), dim3(ceil_div(rows, kWarps)), dim3(kWarp, kWarps), stream, tile,
                  inputs, static_cast<const T*>(dn), static_cast<T*>(dtheta), rows);
    return cudaGetLastError();
  };
  return with_inputs(dtype, tile, in, D, run, dn, dtheta);
}

int64_t mix_backward_z_scratch(const Tile& tile, int64_t D) {
  return mixes_of(tile) * (D + 1) + 4 * tile.rows() + node_sums_scratch(tile, D, 1, 1);
}

int launch_mix_backward_z(DType dtype, const Tile& tile, MixInputs in, const void* theta, const void* dlogits,
                          double square, void* dz, void* d_d_plus, void* scratch, int64_t D, void* stream) {
  const auto run = [&]<class T, int N>(const Inputs<T>& inputs, Width<N>) -> int {
    const int64_t mixes = mixes_of(tile), rows = tile.rows();
    T *negatives = static_cast<T*>(scratch), *parts = negatives + mixes * D;
    T* d_plus = parts + node_sums_scratch(tile, D, 1, 1);
    const Saved<T> saved{negatives, d_plus, d_plus + mixes, d_plus + mixes + 2 * rows};
    const T *t = static_cast<const T*>(theta), *g = static_cast<const T*>(dlogits);
    GCAHNG_LAUNCH((mix_backward_kernel<T, N>), dim3(ceil_div(mixes, kWarps)), dim3(kWarp, kWarps), stream, tile, inputs,
                  t, g, T(square), saved, mixes);
    const int error = cudaGetLastError();
    if (error) return error;
    const MixGradient<T, N> term{tile, inputs, t, g, T(square), saved};
    return add_node_sums(term, tile, 0, parts, {{static_cast<T*>(dz)}, static_cast<T*>(d_d_plus)}, D, stream);
  };
  return with_inputs(dtype, tile, in, D, run, theta, dz, scratch);
}

}  // namespace gcahng::cuda
