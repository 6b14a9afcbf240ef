#include "../mix.h"

#include "tiles.h"

namespace gcahng {
namespace {

// One mix: an anchor, and the K negatives of one class, `step` edges apart.
template <class T>
struct Mix {
  int64_t anchor, negative;       // nodes (wrapped); negatives are consecutive
  int64_t edge, step;             // rows of theta
  int64_t number;                 // among the tile's mixes
  const T* kappa;                 // (K,) of the anchor's view
  int64_t anchor_sum, first_sum;  // where dz of the anchor and of the first negative goes
  bool forward;
  bool own;          // the anchor's own class
  int64_t positive;  // the negative that is the anchor's positive (in its own class), or -1
};

// Calls f with every mix of a unit. Where sums go: rows by view of the anchor class, columns by (offset, view).
template <class T, class F>
void each_mix(const Tile& tile, const Unit& unit, const T* kappa, F f) {
  const int64_t a = unit.a, K = tile.K;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t o = unit.o0; o < unit.o1; ++o) {
      const bool own = tile.offset + o == 0;
      f(Mix<T>{tile.anchor(a, i), tile.column(a, o, 0), tile.row(a, i, o, 0), 1, (a * K + i) * tile.O + o,
               kappa + i * K, i, o * K, true, own, own ? (i + 1) % K : -1});
    }
  const int64_t back = tile.O - tile.mirrored, first = tile.A * K * tile.O;
  for (int64_t o = unit.o0 > tile.mirrored ? unit.o0 : tile.mirrored; o < unit.o1; ++o)
    for (int64_t v = 0; v < K; ++v)
      f(Mix<T>{tile.column(a, o, v), tile.anchor(a, 0), tile.row(a, 0, o, v), tile.O * K,
               first + (a * back + o - tile.mirrored) * K + v, kappa + v * K, o * K + v, 0, false, tile.offset + o == 0,
               -1});
}

// MixInputs of a type.
template <class T>
struct Inputs {
  const T *z, *d_plus, *kappa;
  T pull;
  int64_t K, D;
};
template <class T, class Args>
inline Inputs<T> inputs_of(const Args& args) {
  return {typed<T>(args.inputs.z),
          typed<T>(args.inputs.d_plus),
          typed<T>(args.inputs.kappa),
          *typed<T>(args.inputs.pull),
          args.tile.K,
          args.D};
}

template <class T>
struct Shares {
  T ratio[kMaxViews], away[kMaxViews];
  bool easy[kMaxViews];
};

// d- of every negative and what follows from it: ratio = min(d+/d-, 1), 1 where the negative is nearer than the
// positive.
template <class T>
void shares(const Mix<T>& m, const Inputs<T>& in, Shares<T>& out) {
  const T* __restrict a = in.z + m.anchor * in.D;
  const T d_plus = in.d_plus[m.anchor];
  for (int64_t v = 0; v < in.K; ++v) {
    const T* __restrict b = in.z + (m.negative + v) * in.D;
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < in.D; ++d) {
      const T x = a[d] - b[d] + T(1e-6);
      square += x * x;
    }
    out.away[v] = square * inverse_root(square);
    out.easy[v] = v != m.positive && d_plus < out.away[v];  // not by a rounding of the same distance
    out.ratio[v] = out.easy[v] ? d_plus / out.away[v] : T(1);
  }
}

// wide: scratch (D,).
template <class T>
void mixed(const Mix<T>& m, const Inputs<T>& in, const EdgeRows<T>& theta, const Shares<T>& s, T* __restrict out,
           T* wide) {
  const T* __restrict a = in.z + m.anchor * in.D;
  for (int64_t d = 0; d < in.D; ++d) out[d] = a[d];
  for (int64_t v = 0; v < in.K; ++v) {
    const T* __restrict b = in.z + (m.negative + v) * in.D;
    const T* __restrict t = theta.read(m.edge + v * m.step, wide);
    const T ratio = s.ratio[v], rest = (T(1) - ratio) * in.pull, kappa = m.kappa[v];
#pragma omp simd
    for (int64_t d = 0; d < in.D; ++d) out[d] += kappa * (b[d] - a[d]) * (ratio + rest * t[d]);
  }
}

void forward(const MixForward& args, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, scratch, 2 * D);
    const auto theta = edge_rows<T>(args.theta, args.edge_type, D);
    const auto in = inputs_of<T>(args);
    T* negatives = typed<T>(args.negatives);
    Shares<T> s;
    for (int64_t number = begin; number < end; ++number)
      each_mix(args.tile, unit_of(args.tile, number), in.kappa, [&](const Mix<T>& m) {
        shares(m, in, s);
        T* out = negatives ? negatives + m.number * D : scratch;
        mixed(m, in, theta, s, out, scratch + D);
        if (args.logits) {
          typed<T>(args.logits)[m.number] = dot(in.z + m.anchor * D, out, D);
          typed<T>(args.squares)[m.number] = dot(out, out, D);
        }
      });
  });
}

void backward_theta(const MixBackwardTheta& args, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, D);
    const auto gradients = edge_rows<T>(args.dtheta, args.edge_type, D);
    const auto in = inputs_of<T>(args);
    Shares<T> s;
    for (int64_t number = begin; number < end; ++number)
      each_mix(args.tile, unit_of(args.tile, number), in.kappa, [&](const Mix<T>& m) {
        shares(m, in, s);
        const T* __restrict a = in.z + m.anchor * D;
        const T* __restrict dn = typed<T>(args.dn) + m.number * D;
        for (int64_t v = 0; v < in.K; ++v) {
          const T* __restrict b = in.z + (m.negative + v) * D;
          const int64_t row = m.edge + v * m.step;
          T* __restrict dtheta = m.forward ? gradients.room(row, wide) : gradients.change(row, wide);
          const T scale = (T(1) - s.ratio[v]) * in.pull * m.kappa[v];
          if (m.forward) {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) dtheta[d] = scale * dn[d] * (b[d] - a[d]);
          } else {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) dtheta[d] += scale * dn[d] * (b[d] - a[d]);
          }
          gradients.put(row, dtheta);
        }
      });
  });
}

// The gradient of a mix's N, from the logits' or as it is given, -> dn (D,); adds what reaches the anchor past the
// differences b - a. negative, wide: scratch (D,).
template <class T>
void upstream(const MixBackwardZ& args, const Mix<T>& m, const Inputs<T>& in, const EdgeRows<T>& theta,
              const Shares<T>& s, T* __restrict dn, T* __restrict negative, T* wide, T* __restrict into_anchor) {
  if (args.dn) {
    const T* __restrict given = typed<T>(args.dn) + m.number * in.D;
#pragma omp simd
    for (int64_t d = 0; d < in.D; ++d) {
      dn[d] = given[d];
      into_anchor[d] += given[d];
    }
    return;
  }
  mixed(m, in, theta, s, negative, wide);
  const T dlogit = typed<T>(args.dlogits)[m.number];
  const T* __restrict a = in.z + m.anchor * in.D;
#pragma omp simd
  for (int64_t d = 0; d < in.D; ++d) {
    dn[d] = dlogit * a[d] + T(args.square) * negative[d];
    into_anchor[d] += dn[d] + dlogit * negative[d];
  }
}

void backward_z(const MixBackwardZ& args, const MixSums& sums, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, scratch, 3 * D);
    T* __restrict dn = scratch + D;
    T* const wide = scratch + 2 * D;
    const auto theta = edge_rows<T>(args.theta, args.edge_type, D);
    const auto in = inputs_of<T>(args);
    Shares<T> s;
    for (int64_t number = begin; number < end; ++number) {
      const Unit unit = unit_of(args.tile, number);
      const auto dz = start_sums<T>(sums.z, args.tile, unit, D),
                 dd_plus = start_sums<T>(sums.d_plus, args.tile, unit, 1);
      each_mix(args.tile, unit, in.kappa, [&](const Mix<T>& m) {
        if (m.own && !args.dn) return;
        shares(m, in, s);
        const T* __restrict a = in.z + m.anchor * D;
        T* __restrict into_anchor = (m.forward ? dz.rows : dz.columns) + m.anchor_sum * D;
        T* into_d = (m.forward ? dd_plus.rows : dd_plus.columns) + m.anchor_sum;
        upstream(args, m, in, theta, s, dn, scratch, wide, into_anchor);
        for (int64_t v = 0; v < in.K; ++v) {
          const T* __restrict b = in.z + (m.negative + v) * D;
          const T* __restrict t = theta.read(m.edge + v * m.step, wide);
          T* __restrict into = (m.forward ? dz.columns : dz.rows) + (m.first_sum + v) * D;
          const T ratio = s.ratio[v], rest = (T(1) - ratio) * in.pull, kappa = m.kappa[v];
          T d_ratio = 0;
          if (s.easy[v]) {
#pragma omp simd reduction(+ : d_ratio)
            for (int64_t d = 0; d < D; ++d) d_ratio += dn[d] * (b[d] - a[d]) * (T(1) - in.pull * t[d]);
            d_ratio *= kappa;
          }
          const T along = -d_ratio * ratio / (s.away[v] * s.away[v]);
          *into_d += d_ratio / s.away[v];
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) {
            const T value = kappa * dn[d] * (ratio + rest * t[d]) + along * (b[d] - a[d] - T(1e-6));
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
