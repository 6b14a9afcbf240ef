#include <algorithm>

#include "mix.cuh"

namespace gcahng::cuda {
namespace {

// negatives (mixes, D), and logits = a . N and squares = |N|^2 (mixes,); either may be null.
template <class T, class E, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    mix_forward_kernel(Tile tile, Inputs<T> in, const E* __restrict__ theta, T* __restrict__ negatives,
                       T* __restrict__ logits, T* __restrict__ squares, int64_t mixes) {
  GCAHNG_SHARED(Weight<T>, shared, kWarps * kMaxViews);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (number >= mixes) return;
  Weight<T>* weights = shared + threadIdx.y * kMaxViews;
  const Mix m = mix_of(tile, number);
  const int K = static_cast<int>(tile.K);
  weigh<T, N>(m, in, K, weights);
  T logit = 0, square = 0;
  each_pack<RowShape<N, 0>>(in.D, [&](int, int d) {
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
template <class T, class E, int N>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    mix_backward_theta_kernel(Tile tile, Inputs<T> in, const T* __restrict__ dn, E* __restrict__ dtheta, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const Edge e = edge_of(tile, row);
  const int K = static_cast<int>(tile.K);
  const int64_t i = tile.anchor(e.a, e.i), j = tile.column(e.a, e.o, e.v);
  const T *z_i = in.z + i * in.D, *z_j = in.z + j * in.D;
  const bool back = e.o >= tile.mirrored;
  T square = 0, square_back = 0;
  each_pack<RowShape<N, 0>>(in.D, [&](int, int d) {
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
  each_pack<RowShape<N, 0>>(in.D, [&](int, int d) {
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

// The gradient of N, from the logits': dn = g a + factor N. The anchor gets g N beside. A class's mixes with itself are
// no negatives.
template <class T>
struct FromLogits {
  static constexpr bool kOwn = false;
  const T* dlogits;  // (mixes,)
  T factor;
  T* negatives;  // (mixes, D), which prepare writes

  template <int N, class E>
  __device__ __forceinline__ void prepare(const Mix& m, const Inputs<T>& in, const E* theta, const Weight<T>* weights,
                                          int K, int64_t number) const {
    T* negative = negatives + number * in.D;
    each_pack<RowShape<N, 0>>(in.D, [&](int, int d) {
      const Pack<T, N> a = read<T, N>(in.z + m.anchor * in.D + d);
      write(negative + d, mixed(m, in, theta, weights, K, a, d));
    });
  }
  // dn, and the whole that reaches the anchor past the differences b - a.
  template <int N>
  struct At {
    Pack<T, N> negative;
    T g, factor;
    __device__ __forceinline__ T dn(const Pack<T, N>& a, int n) const { return g * a.v[n] + factor * negative.v[n]; }
    __device__ __forceinline__ T whole(T dn, int n) const { return dn + g * negative.v[n]; }
  };
  template <int N>
  __device__ __forceinline__ At<N> at(int64_t number, int64_t d, int64_t D) const {
    return {read<T, N>(negatives + number * D + d), dlogits[number], factor};
  }
};

// The gradient of N as it is given, of a class's mixes with itself, too.
template <class T>
struct Given {
  static constexpr bool kOwn = true;
  const T* gradient;  // (mixes, D)

  template <int N, class E>
  __device__ __forceinline__ void prepare(const Mix&, const Inputs<T>&, const E*, const Weight<T>*, int,
                                          int64_t) const {}
  template <int N>
  struct At {
    Pack<T, N> gradient;
    __device__ __forceinline__ T dn(const Pack<T, N>&, int n) const { return gradient.v[n]; }
    __device__ __forceinline__ T whole(T dn, int) const { return dn; }
  };
  template <int N>
  __device__ __forceinline__ At<N> at(int64_t number, int64_t d, int64_t D) const {
    return {read<T, N>(gradient + number * D + d)};
  }
};

// What the sums over edges need of each mix: its part of d(d_plus) (mixes,); and of each negative in it, by the mixes'
// direction (forward, back) and theta's row, ratio and along, which d- has a share of (2, T).
template <class T>
struct MixParts {
  T *d_plus, *ratio, *along;
};

template <class T, class E, int N, class Upstream>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks)
    mix_backward_kernel(Tile tile, Inputs<T> in, const E* __restrict__ theta, Upstream upstream, MixParts<T> parts,
                        int64_t mixes) {
  GCAHNG_SHARED(Weight<T>, shared, kWarps * kMaxViews);
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (number >= mixes) return;
  const Mix m = mix_of(tile, number);
  if (m.own && !Upstream::kOwn) return;
  Weight<T>* weights = shared + threadIdx.y * kMaxViews;
  const int K = static_cast<int>(tile.K);
  weigh<T, N>(m, in, K, weights);
  upstream.template prepare<N>(m, in, theta, weights, K, number);
  const T pull = *in.pull;
  const int64_t direction = number < tile.A * tile.K * tile.O ? 0 : tile.rows();
  T d_plus = 0;
  for (int first = 0; first < K; first += kTogether) {
    T d_ratio[kTogether] = {};
    each_pack<RowShape<N, 0>>(in.D, [&](int, int d) {
      const Pack<T, N> a = read<T, N>(in.z + m.anchor * in.D + d);
      const auto reaches = upstream.template at<N>(number, d, in.D);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (first + k >= K) continue;
        const Pack<T, N> b = read<T, N>(in.z + (m.negative + first + k) * in.D + d);
        const Pack<T, N> t = read<T, N>(theta + (m.edge + (first + k) * m.step) * in.D + d);
#pragma unroll
        for (int n = 0; n < N; ++n) d_ratio[k] += reaches.dn(a, n) * (b.v[n] - a.v[n]) * (T(1) - pull * t.v[n]);
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
      parts.ratio[row] = w.ratio;
      parts.along[row] = -slope * w.ratio / (w.away * w.away);
    }
  }
  if (threadIdx.x == 0) parts.d_plus[number] = d_plus;
}

// What an edge adds to dz at its two nodes. Of each mix, the gradient dn of N reaches the negative b as
// kappa dn (ratio + rest theta) + along (b - a - small), and the anchor a as a whole less all of these.
template <class T_, class E, int N_, class Upstream>
struct MixGradient {
  using T = T_;
  static constexpr int N = N_, kPlanes = 1, kAnchors = sizeof(T) == 8 || N == 1 ? 2 : 4;
  static constexpr bool kNumber = true;
  Tile tile;
  Inputs<T> in;
  const E* theta;
  Upstream upstream;
  MixParts<T> parts;

  // A negative in a mix: the mix's number, the place of ratio and along, kappa, and whether it is the mix's first.
  struct Place {
    int64_t number, row;
    T kappa;
    bool first;
  };
  // Adds what reaches the negative b to `to`, and with the other sign and once the whole to its anchor's sum, `from`.
  __device__ __forceinline__ void add_mix(const Place& at, const Pack<T, N>& a, const Pack<T, N>& b,
                                          const Pack<T, N>& t, int64_t d, Sum<T, N, 1>& from, Sum<T, N, 1>& to) const {
    const auto reaches = upstream.template at<N>(at.number, d, in.D);
    const T ratio = parts.ratio[at.row], along = parts.along[at.row];
    const T rest = (T(1) - ratio) * *in.pull;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T dn = reaches.dn(a, n);
      const T value = at.kappa * dn * (ratio + rest * t.v[n]) + along * (b.v[n] - a.v[n] - T(kSmall));
      to.planes[0].v[n] += value;
      from.planes[0].v[n] += at.first ? reaches.whole(dn, n) - value : -value;
    }
    if (at.first) from.number += parts.d_plus[at.number];
  }

  __device__ __forceinline__ void add(const Edge& e, int64_t d, Sum<T, N, 1>& anchor, Sum<T, N, 1>& column) const {
    if (!Upstream::kOwn && tile.offset + e.o == 0) return;
    const int64_t i = tile.anchor(e.a, e.i), j = tile.column(e.a, e.o, e.v);
    const Pack<T, N> z_i = read<T, N>(in.z + i * in.D + d), z_j = read<T, N>(in.z + j * in.D + d);
    const Pack<T, N> t = read<T, N>(theta + e.row * in.D + d);
    const T* kappa = in.kappa;
    add_mix({forward_mix(tile, e), e.row, kappa[e.i * tile.K + e.v], e.v == 0}, z_i, z_j, t, d, anchor, column);
    if (e.o >= tile.mirrored)
      add_mix({back_mix(tile, e), tile.rows() + e.row, kappa[e.v * tile.K + e.i], e.i == 0}, z_j, z_i, t, d, column,
              anchor);
  }
};

template <class T>
Inputs<T> inputs_of(const MixInputs& in, int64_t D) {
  return {typed<T>(in.z), typed<T>(in.d_plus), typed<T>(in.kappa), typed<T>(in.pull), D};
}

// f(Inputs<T>, null pointer of the edges' type E, Width) for tiles that can be numbered; pointers: of rows of D values.
template <class Args, class F, class... P>
int with_inputs(const Args& args, F f, const P*... pointers) {
  const int64_t D = args.D;
  if (args.tile.rows() * D == 0) return cudaSuccess;
  if (!numbered(args.tile) || mixes_of(args.tile) > kMaxBlocks || args.tile.K > kMaxViews)
    return cudaErrorInvalidConfiguration;
  return with_edges(args.dtype, args.edge_type, [&]<class T, class E>(T*, E* edge) -> int {
    const Inputs<T> inputs = inputs_of<T>(args.inputs, D);
    return wide<T>(D, inputs.z, pointers...) ? f(inputs, edge, Width<kWide<T>>{}) : f(inputs, edge, Width<1>{});
  });
}

template <class E, int N, class T, class Upstream>
int backward_z(const MixBackwardZ& args, const Inputs<T>& in, const Upstream& upstream, T* scratch, void* stream) {
  const Tile& tile = args.tile;
  const int64_t mixes = mixes_of(tile);
  T *node_sums = scratch, *d_plus = node_sums + node_sums_scratch<MixGradient<T, E, N, Upstream>>(tile, args.D);
  const MixParts<T> parts{d_plus, d_plus + mixes, d_plus + mixes + 2 * tile.rows()};
  const E* theta = typed<E>(args.theta);
  GCAHNG_LAUNCH((mix_backward_kernel<T, E, N, Upstream>), dim3(ceil_div(mixes, kWarps)), dim3(kWarp, kWarps), stream,
                tile, in, theta, upstream, parts, mixes);
  const int error = cudaGetLastError();
  if (error) return error;
  const MixGradient<T, E, N, Upstream> term{tile, in, theta, upstream, parts};
  return add_node_sums(term, tile, 0, node_sums, {{typed<T>(args.dz)}, typed<T>(args.dd_plus)}, args.D, stream);
}

}  // namespace

int launch_mix_forward(const MixForward& args, void* stream) {
  const auto run = [&]<class T, class E, int N>(const Inputs<T>& in, E*, Width<N>) -> int {
    const int64_t mixes = mixes_of(args.tile);
    GCAHNG_LAUNCH((mix_forward_kernel<T, E, N>), dim3(ceil_div(mixes, kWarps)), dim3(kWarp, kWarps), stream, args.tile,
                  in, typed<E>(args.theta), typed<T>(args.negatives), typed<T>(args.logits), typed<T>(args.squares),
                  mixes);
    return cudaGetLastError();
  };
  return with_inputs(args, run, args.theta, args.negatives);
}

int launch_mix_backward_theta(const MixBackwardTheta& args, void* stream) {
  const auto run = [&]<class T, class E, int N>(const Inputs<T>& in, E*, Width<N>) -> int {
    const int64_t rows = args.tile.rows();
    GCAHNG_LAUNCH((mix_backward_theta_kernel<T, E, N>), dim3(ceil_div(rows, kWarps)), dim3(kWarp, kWarps), stream,
                  args.tile, in, typed<T>(args.dn), typed<E>(args.dtheta), rows);
    return cudaGetLastError();
  };
  return with_inputs(args, run, args.dn, args.dtheta);
}

int64_t mix_backward_z_scratch(const MixBackwardZ& args) {
  const int64_t mixes = mixes_of(args.tile), D = args.D;
  // Enough for either group of anchors, which depends on the type and on alignment.
  const int64_t sums = std::max(node_sums_scratch<MixGradient<float, float, 1, Given<float>>>(args.tile, D),
                                node_sums_scratch<MixGradient<float, float, 4, Given<float>>>(args.tile, D));
  return (args.dn ? 0 : mixes * D) + sums + mixes + 4 * args.tile.rows();
}

int launch_mix_backward_z(const MixBackwardZ& args, void* scratch, void* stream) {
  const auto run = [&]<class T, class E, int N>(const Inputs<T>& in, E*, Width<N>) -> int {
    T* memory = typed<T>(scratch);
    if (args.dn) return backward_z<E, N>(args, in, Given<T>{typed<T>(args.dn)}, memory, stream);
    const FromLogits<T> upstream{typed<T>(args.dlogits), T(args.square), memory};
    return backward_z<E, N>(args, in, upstream, memory + mixes_of(args.tile) * args.D, stream);
  };
  return with_inputs(args, run, args.theta, args.dn, args.dz, scratch);
}

}  // namespace gcahng::cuda
