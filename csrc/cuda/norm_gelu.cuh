// LayerNorm(GELU(.)) of a row by a warp, its backward, and sums over the rows of a block.
#pragma once
#include "rows.cuh"

namespace gcahng::cuda {
namespace {

// A lane's packs, cached or (V = 0) made again.
template <class T, class Shape>
struct Cached {
  static constexpr int N = Shape::N, V = Shape::V;
  Pack<T, N> packs[V ? V / N : 1];
  template <class F>
  __device__ __forceinline__ Pack<T, N> make(int k, F f) {
    if constexpr (V == 0) return f();
    return packs[k] = f();
  }
  template <class F>
  __device__ __forceinline__ Pack<T, N> get(int k, F f) const {
    if constexpr (V == 0) return f();
    return packs[k];
  }
};

// The same where a kernel of another Shape has them Parked, and so has a slot to offer.
template <class T, class Shape>
struct Unparked : Cached<T, Shape> {
  __device__ __forceinline__ explicit Unparked(T*) {}
};

// The same, cached in shared memory, where each lane has a place of its own.
template <class T, class Shape>
struct Parked {
  static constexpr int N = Shape::N;
  T* slot;  // Shape::channels of them
  template <class F>
  __device__ __forceinline__ void make(int k, F f) const {
    if constexpr (Shape::V > 0) store_shared(at(k), f());
  }
  template <class F>
  __device__ __forceinline__ Pack<T, N> get(int k, F f) const {
    if constexpr (Shape::V == 0) return f();
    return load<N>(static_cast<const T*>(at(k)));
  }

 private:
  __device__ __forceinline__ T* at(int k) const { return slot + (k * kWarp + static_cast<int>(threadIdx.x)) * N; }
};

// x less the mean, in each channel.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> less(Pack<T, N> x, T mean) {
#pragma unroll
  for (int n = 0; n < N; ++n) x.v[n] -= mean;
  return x;
}

// out(k, d, y) of y = LayerNorm(GELU(t)) with t = in(k, d), the k-th pack, from channel d on.
template <class T, class Shape, class In, class Out>
__device__ __forceinline__ void norm_gelu_row(int64_t D, const T* gamma, const T* beta, In in, Out out) {
  constexpr int N = Shape::N;
  Cached<T, Shape> g;
  const auto activated = [&](int k, int d) {
    Pack<T, N> x = in(k, d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = gelu_of(x.v[n]);
    return x;
  };
  const T each = reciprocal(T(D));
  T sum = 0, square = 0;
  each_pack<Shape>(D, [&](int k, int d) {
    const Pack<T, N> x = g.make(k, [&] { return activated(k, d); });
#pragma unroll
    for (int n = 0; n < N; ++n) sum += x.v[n];
  });
  const T mean = warp_sum(sum) * each;
  const auto centered = [&](int k, int d) { return less(g.get(k, [&] { return activated(k, d); }), mean); };
  each_pack<Shape>(D, [&](int k, int d) {
    const Pack<T, N> x = centered(k, d);
    g.make(k, [&] { return x; });
#pragma unroll
    for (int n = 0; n < N; ++n) square += x.v[n] * x.v[n];
  });
  const T rstd = inverse_root(warp_sum(square) * each + T(kNormEps));
  each_pack<Shape>(D, [&](int k, int d) {
    Pack<T, N> x = g.get(k, [&] { return centered(k, d); });
    const Pack<T, N> scale = read<T, N>(gamma + d), shift = read<T, N>(beta + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = x.v[n] * rstd * scale.v[n] + shift.v[n];
    out(k, d, x);
  });
}

// out(k, d, dt, dy, x) for dt of y = LayerNorm(GELU(t)), t = in(k, d) and dy = upstream(k, d); x: the normalized
// GELU(t). slope: a cache, which out may overwrite.
template <class T, class Shape, class Slope, class In, class Upstream, class Out>
__device__ __forceinline__ void norm_gelu_row_backward(int64_t D, const T* gamma, Slope slope, In in, Upstream upstream,
                                                       Out out) {
  constexpr int N = Shape::N;
  Cached<T, Shape> g, dy;
  const auto activate = [&](int k, int d, Pack<T, N>& steep) {
    Pack<T, N> x = in(k, d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Gelu<T> at = gelu_and_slope(x.v[n]);
      steep.v[n] = at.slope;
      x.v[n] = at.value;
    }
    return x;
  };
  const auto activated = [&](int k, int d) {
    Pack<T, N> steep;
    return activate(k, d, steep);
  };
  const T each = reciprocal(T(D));
  T sum = 0, square = 0, flat = 0, along = 0;
  each_pack<Shape>(D, [&](int k, int d) {
    Pack<T, N> steep;
    const Pack<T, N> x = g.make(k, [&] { return activate(k, d, steep); });
    slope.make(k, [&] { return steep; });
    if constexpr (Shape::V > 0) dy.make(k, [&] { return upstream(k, d); });
#pragma unroll
    for (int n = 0; n < N; ++n) sum += x.v[n];
  });
  const T mean = warp_sum(sum) * each;
  const auto centered = [&](int k, int d) { return less(g.get(k, [&] { return activated(k, d); }), mean); };
  // The means of dn = dy gamma, and of dn times the normalized row: rstd follows.
  each_pack<Shape>(D, [&](int k, int d) {
    const Pack<T, N> x = centered(k, d);
    g.make(k, [&] { return x; });
    const Pack<T, N> above = dy.get(k, [&] { return upstream(k, d); }), scale = read<T, N>(gamma + d);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const T dn = above.v[n] * scale.v[n];
      square += x.v[n] * x.v[n];
      flat += dn;
      along += dn * x.v[n];
    }
  });
  const T rstd = inverse_root(warp_sum(square) * each + T(kNormEps));
  flat = warp_sum(flat) * each;
  along = warp_sum(along) * each * rstd;
  each_pack<Shape>(D, [&](int k, int d) {
    Pack<T, N> x = g.get(k, [&] { return centered(k, d); });
    const Pack<T, N> steep = slope.get(k, [&] {
      Pack<T, N> derivative;
      activate(k, d, derivative);
      return derivative;
    });
    const Pack<T, N> above = dy.get(k, [&] { return upstream(k, d); }), scale = read<T, N>(gamma + d);
    Pack<T, N> dt;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x.v[n] *= rstd;
      dt.v[n] = (above.v[n] * scale.v[n] - flat - x.v[n] * along) * rstd * steep.v[n];
    }
    out(k, d, dt, above, x);
  });
}

// Sums of S quantities over the rows of a block's warps (threadIdx.y), for each warp apart until they are added up in
// order. A lane has its channels' sums in registers or, where these are too many, in shared memory.
template <class T, class Shape, int S, int kWarps_ = 0, int kMost = 16>
struct BlockSums {
  static constexpr int N = Shape::N, V = Shape::V;
  static constexpr bool kRegisters = V > 0 && V <= kMost;
  static constexpr int kPlanes = kRegisters ? 1 : S;  // in shared memory at once
  static constexpr int64_t bytes = kPlanes * Shape::channels * sizeof(T);
  static constexpr int kWarps = kWarps_ ? kWarps_ : bytes * 4 <= 32768 ? 4 : bytes >= 32768 ? 1 : 32768 / bytes;
  static constexpr int64_t kValues = kPlanes * kWarps * Shape::channels;
  // On a multiprocessor, at least: as many as no register spills for.
  static constexpr int kBlocks = kRegisters && Shape::kFull ? (kChip < 100 ? 3 : 2) : 1;
  T* shared;  // kValues
  Pack<T, N> sums[kRegisters ? S * V / N : 1];

  __device__ __forceinline__ T* at(int s, int d) const {
    return shared + (s * kWarps + static_cast<int>(threadIdx.y)) * Shape::channels + d;
  }
  __device__ __forceinline__ void clear(int64_t D) {
    const Pack<T, N> zero{};
    each_pack<Shape>(D, [&](int k, int d) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if constexpr (kRegisters)
          sums[s * (V / N) + k] = zero;
        else
          store_shared<N>(at(s, d), zero);
      }
    });
  }
  // Adds x by y.
  __device__ __forceinline__ void add(int s, int k, int d, const Pack<T, N>& x, const Pack<T, N>& y) {
    Pack<T, N> sum = load_sum(s, k, d);
#pragma unroll
    for (int n = 0; n < N; ++n) sum.v[n] += x.v[n] * y.v[n];
    store_sum(s, k, d, sum);
  }
  __device__ __forceinline__ void add(int s, int k, int d, const Pack<T, N>& x) {
    Pack<T, N> sum = load_sum(s, k, d);
#pragma unroll
    for (int n = 0; n < N; ++n) sum.v[n] += x.v[n];
    store_sum(s, k, d, sum);
  }
  // part (S, blocks, D): adds the warps up in order. The whole block comes here; nobody needs `shared` otherwise.
  __device__ __forceinline__ void write(T* part, int64_t part_number, int64_t parts, int64_t D) {
    const int first = static_cast<int>(threadIdx.y * kWarp + threadIdx.x);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if constexpr (kRegisters) {
        if (s) __syncthreads();  // all have read the sums before
        each_pack<Shape>(D, [&](int k, int d) { store_shared<N>(at(0, d), sums[s * (V / N) + k]); });
      }
      if (kRegisters || s == 0) __syncthreads();
      const T* plane = shared + (kRegisters ? 0 : s) * kWarps * Shape::channels;
      for (int d = first; d < D; d += kWarp * kWarps) {
        T total = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += plane[warp * Shape::channels + d];
        store(part + (s * parts + part_number) * D + d, Pack<T, 1>{total});
      }
    }
  }

 private:
  __device__ __forceinline__ Pack<T, N> load_sum(int s, int k, int d) const {
    if constexpr (kRegisters) return sums[s * (V / N) + k];
    return load<N>(static_cast<const T*>(at(s, d)));
  }
  __device__ __forceinline__ void store_sum(int s, int k, int d, const Pack<T, N>& sum) {
    if constexpr (kRegisters)
      sums[s * (V / N) + k] = sum;
    else
      store_shared<N>(at(s, d), sum);
  }
};

}  // namespace
}  // namespace gcahng::cuda
