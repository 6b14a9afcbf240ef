#include "../mix.h"

#include "rows.h"

namespace gcahng {
namespace {

constexpr int64_t kMaxViews = 64;

// One mix: an anchor, and the K negatives of one class, `step` edges apart.
template <class T>
struct Mix {
  int64_t anchor, negative;       // nodes (wrapped); negatives are consecutive
  int64_t edge, step;             // rows of theta
  int64_t number;                 // among the tile's mixes
  const T* kappa;                 // (K,) of the anchor's view
  int64_t anchor_sum, first_sum;  // where dz of the anchor and of the first negative goes
  bool forward;
  int64_t positive;  // the negative that is the anchor's positive (in its own class), or -1
};

template <class T>
struct Shares {
  T ratio[kMaxViews], away[kMaxViews];
  bool easy[kMaxViews];
};

// Calls f with every mix of a unit: anchor class a, offsets [o0, o1). Where sums go: rows by view of the anchor class,
// columns by (a, o, view).
template <class T, class F>
void each_mix(const Tile& tile, int64_t unit, const T* kappa, F f) {
  const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width(), K = tile.K;
  const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t o = o0; o < o1; ++o)
      f(Mix<T>{tile.anchor(a, i), tile.column(a, o, 0), tile.row(a, i, o, 0), 1, (a * K + i) * tile.O + o,
               kappa + i * K, i, (a * tile.O + o) * K, true, tile.offset + o == 0 ? (i + 1) % K : -1},
        o);
  const int64_t back = tile.O - tile.mirrored, first = tile.A * K * tile.O;
  for (int64_t o = o0 > tile.mirrored ? o0 : tile.mirrored; o < o1; ++o)
    for (int64_t v = 0; v < K; ++v)
      f(Mix<T>{tile.column(a, o, v), tile.anchor(a, 0), tile.row(a, 0, o, v), tile.O * K,
               first + (a * back + o - tile.mirrored) * K + v, kappa + v * K, (a * tile.O + o) * K + v, 0, false, -1},
        o);
}

// d- of every negative and what follows from it: ratio = min(d+/d-, 1), 1 where the negative is nearer than the
// positive.
template <class T>
void shares(const Mix<T>& m, const T* z, T d_plus, int64_t K, int64_t D, Shares<T>& out) {
  const T* __restrict a = z + m.anchor * D;
  for (int64_t v = 0; v < K; ++v) {
    const T* __restrict b = z + (m.negative + v) * D;
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < D; ++d) {
      const T x = a[d] - b[d] + T(1e-6);
      square += x * x;
    }
    out.away[v] = square * inverse_root(square);
    out.easy[v] = v != m.positive && d_plus < out.away[v];  // not by a rounding of the same distance
    out.ratio[v] = out.easy[v] ? d_plus / out.away[v] : T(1);
  }
}

template <class T>
void mixed(const Mix<T>& m, const T* z, const T* theta, const Shares<T>& s, T pull, int64_t K, int64_t D,
           T* __restrict out) {
  const T* __restrict a = z + m.anchor * D;
  for (int64_t d = 0; d < D; ++d) out[d] = a[d];
  for (int64_t v = 0; v < K; ++v) {
    const T* __restrict b = z + (m.negative + v) * D;
    const T* __restrict t = theta + (m.edge + v * m.step) * D;
    const T ratio = s.ratio[v], rest = (T(1) - ratio) * pull, kappa = m.kappa[v];
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[d] += kappa * (b[d] - a[d]) * (ratio + rest * t[d]);
  }
}

template <class F>
void with_float(DType dtype, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

void forward(DType dtype, const Tile& tile, MixInputs in, const void* theta, void* negatives, void* logits,
             void* squares, int64_t begin, int64_t end, int64_t D) {
  with_float(dtype, [&]<class T>(T*) {
    GCAHNG_SCRATCH(T, scratch, D);
    const T *z = static_cast<const T*>(in.z), *d_plus = static_cast<const T*>(in.d_plus);
    Shares<T> s;
    for (int64_t unit = begin; unit < end; ++unit)
      each_mix<T>(tile, unit, static_cast<const T*>(in.kappa), [&](const Mix<T>& m, int64_t) {
        shares(m, z, d_plus[m.anchor], tile.K, D, s);
        T* out = negatives ? static_cast<T*>(negatives) + m.number * D : scratch;
        mixed(m, z, static_cast<const T*>(theta), s, *static_cast<const T*>(in.pull), tile.K, D, out);
        if (logits) {
          static_cast<T*>(logits)[m.number] = dot(z + m.anchor * D, out, D);
          static_cast<T*>(squares)[m.number] = dot(out, out, D);
        }
      });
  });
}

void backward_theta(DType dtype, const Tile& tile, MixInputs in, const void* dn, void* dtheta, int64_t begin,
                    int64_t end, int64_t D) {
  with_float(dtype, [&]<class T>(T*) {
    const T *z = static_cast<const T*>(in.z), *d_plus = static_cast<const T*>(in.d_plus);
    Shares<T> s;
    for (int64_t unit = begin; unit < end; ++unit)
      each_mix<T>(tile, unit, static_cast<const T*>(in.kappa), [&](const Mix<T>& m, int64_t) {
        shares(m, z, d_plus[m.anchor], tile.K, D, s);
        const T* __restrict a = z + m.anchor * D;
        const T* __restrict g = static_cast<const T*>(dn) + m.number * D;
        for (int64_t v = 0; v < tile.K; ++v) {
          const T* __restrict b = z + (m.negative + v) * D;
          T* __restrict out = static_cast<T*>(dtheta) + (m.edge + v * m.step) * D;
          const T scale = (T(1) - s.ratio[v]) * *static_cast<const T*>(in.pull) * m.kappa[v];
          if (m.forward) {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) out[d] = scale * g[d] * (b[d] - a[d]);
          } else {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) out[d] += scale * g[d] * (b[d] - a[d]);
          }
        }
      });
  });
}

void backward_z(DType dtype, const Tile& tile, MixInputs in, const void* theta, const void* dlogits, double square,
                MixSums sums, int64_t begin, int64_t end, int64_t D) {
  with_float(dtype, [&]<class T>(T*) {
    GCAHNG_SCRATCH(T, n, 2 * D);
    T* __restrict dn = n + D;
    const T *z = static_cast<const T*>(in.z), *d_plus = static_cast<const T*>(in.d_plus);
    const T pull = *static_cast<const T*>(in.pull);
    const int64_t K = tile.K;
    Shares<T> s;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      T *row_z = static_cast<T*>(sums.row_z) + unit * K * D, *row_d = static_cast<T*>(sums.row_d) + unit * K;
      T *column_z = static_cast<T*>(sums.column_z), *column_d = static_cast<T*>(sums.column_d);
      const int64_t columns = (o1 - o0) * K, first = (a * tile.O + o0) * K;
      fill(row_z, K * D);
      fill(row_d, K);
      fill(column_z + first * D, columns * D);
      fill(column_d + first, columns);
      each_mix<T>(tile, unit, static_cast<const T*>(in.kappa), [&](const Mix<T>& m, int64_t o) {
        if (tile.offset + o == 0) return;
        shares(m, z, d_plus[m.anchor], K, D, s);
        mixed(m, z, static_cast<const T*>(theta), s, pull, K, D, n);
        const T g = static_cast<const T*>(dlogits)[m.number];
        const T* __restrict x = z + m.anchor * D;
        T* __restrict into_anchor = (m.forward ? row_z : column_z) + m.anchor_sum * D;
        T* into_d = (m.forward ? row_d : column_d) + m.anchor_sum;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          dn[d] = g * x[d] + T(square) * n[d];
          into_anchor[d] += dn[d] + g * n[d];
        }
        for (int64_t v = 0; v < K; ++v) {
          const T* __restrict b = z + (m.negative + v) * D;
          const T* __restrict t = static_cast<const T*>(theta) + (m.edge + v * m.step) * D;
          T* __restrict into = (m.forward ? column_z : row_z) + (m.first_sum + v) * D;
          const T ratio = s.ratio[v], rest = (T(1) - ratio) * pull, kappa = m.kappa[v];
          T d_ratio = 0;
          if (s.easy[v]) {
#pragma omp simd reduction(+ : d_ratio)
            for (int64_t d = 0; d < D; ++d) d_ratio += dn[d] * (b[d] - x[d]) * (T(1) - pull * t[d]);
            d_ratio *= kappa;
          }
          const T along = -d_ratio * ratio / (s.away[v] * s.away[v]);
          *into_d += d_ratio / s.away[v];
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) {
            const T value = kappa * dn[d] * (ratio + rest * t[d]) + along * (b[d] - x[d] - T(1e-6));
            into[d] += value;
            into_anchor[d] -= value;
          }
        }
      });
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const MixCpu mix = {forward, backward_theta, backward_z};
}

}  // namespace gcahng
