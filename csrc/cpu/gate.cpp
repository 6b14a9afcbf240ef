#include "../gate.h"

#include "rows.h"

namespace gcahng {
namespace {

template <class T>
struct Ends {
  const T *u_i, *u_j, *v_i, *v_j;
  T c_i, c_j;
};

template <class T>
Ends<T> ends(const GateTokens& tokens, int64_t i, int64_t j, int64_t D) {
  const T *u = static_cast<const T*>(tokens.u), *v = static_cast<const T*>(tokens.v);
  const T* c = static_cast<const T*>(tokens.c);
  return {u + i * D, u + j * D, v + i * D, v + j * D, c[i], c[j]};
}

void forward(DType dtype, DType low_type, const Tile& tile, const Dropout& dropout, GateTokens tokens,
             const void* gamma, const void* beta, const void* e, void* e1, void* low, GateSaved saved, int64_t begin,
             int64_t end, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, t, 2 * D);
    const T scale = inverse_root(T(D));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      for (int64_t i = 0; i < tile.K; ++i)
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const int64_t row = tile.row(a, i, o, v), node_i = tile.anchor(a, i), node_j = tile.column(a, o, v);
            const auto n = ends<T>(tokens, node_i, node_j, D);
            const T* __restrict x = static_cast<const T*>(e) + row * D;
            T logit = 0;
#pragma omp simd reduction(+ : logit)
            for (int64_t d = 0; d < D; ++d) logit += x[d] * (n.u_i[d] - n.u_j[d]);
            logit = (logit + (n.c_i - n.c_j)) * scale;
            const T p = sigmoid(logit), q = sigmoid(-logit);
            T keep_i, keep_j;
            keep_of(dropout, node_i, tile.node(node_j), keep_i, keep_j);
            const T w_i = p * keep_i, w_j = q * keep_j;
            static_cast<T*>(saved.p)[row] = p;
            static_cast<T*>(saved.q)[row] = q;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) t[d] = x[d] + w_i * n.v_i[d] + w_j * n.v_j[d];
            norm_gelu_row(t, static_cast<const T*>(gamma), static_cast<const T*>(beta), static_cast<T*>(e1) + row * D,
                          low ? static_cast<L*>(low) + row * D : nullptr, t + D, D);
          }
    }
  });
}

void backward(DType dtype, const Tile& tile, const Dropout& dropout, GateTokens tokens, const void* gamma,
              const void* e, const void* de1, GateSaved saved, void* de, GateSums sums, int64_t begin, int64_t end,
              int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, t, 4 * D);
    T *dt = t + D, *scratch = t + 2 * D;
    const T scale = inverse_root(T(D));
    const bool summed = sums.row_u != nullptr;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      T *dgamma = nullptr, *dbeta = nullptr;
      if (summed) {
        dgamma = static_cast<T*>(sums.dgamma) + unit * D;
        dbeta = static_cast<T*>(sums.dbeta) + unit * D;
        fill(dgamma, D);
        fill(dbeta, D);
        const int64_t columns = (o1 - o0) * tile.K, first = (a * tile.O + o0) * tile.K;
        fill(static_cast<T*>(sums.column_u) + first * D, columns * D);
        fill(static_cast<T*>(sums.column_v) + first * D, columns * D);
        fill(static_cast<T*>(sums.column_c) + first, columns);
      }
      for (int64_t i = 0; i < tile.K; ++i) {
        T* __restrict row_u = static_cast<T*>(sums.row_u) + (unit * tile.K + i) * D;
        T* __restrict row_v = static_cast<T*>(sums.row_v) + (unit * tile.K + i) * D;
        T row_c = 0;
        if (summed) {
          fill(row_u, D);
          fill(row_v, D);
        }
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const int64_t row = tile.row(a, i, o, v), node_i = tile.anchor(a, i), node_j = tile.column(a, o, v);
            const auto n = ends<T>(tokens, node_i, node_j, D);
            const T* __restrict x = static_cast<const T*>(e) + row * D;
            const T p = static_cast<const T*>(saved.p)[row], q = static_cast<const T*>(saved.q)[row];
            T keep_i, keep_j;
            keep_of(dropout, node_i, tile.node(node_j), keep_i, keep_j);
            const T w_i = p * keep_i, w_j = q * keep_j;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) t[d] = x[d] + w_i * n.v_i[d] + w_j * n.v_j[d];
            norm_gelu_row_backward(t, static_cast<const T*>(gamma), static_cast<const T*>(de1) + row * D, dt, dgamma,
                                   dbeta, scratch, D);
            T dp = 0, dq = 0;
#pragma omp simd reduction(+ : dp, dq)
            for (int64_t d = 0; d < D; ++d) {
              dp += dt[d] * n.v_i[d];
              dq += dt[d] * n.v_j[d];
            }
            const T dlogit = (dp * keep_i - dq * keep_j) * p * q * scale;
            if (summed) {
              const int64_t column = (a * tile.O + o) * tile.K + v;
              T* __restrict column_u = static_cast<T*>(sums.column_u) + column * D;
              T* __restrict column_v = static_cast<T*>(sums.column_v) + column * D;
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) {
                const T du = dlogit * x[d];
                row_u[d] += du;
                column_u[d] -= du;
                row_v[d] += w_i * dt[d];
                column_v[d] += w_j * dt[d];
              }
              row_c += dlogit;
              static_cast<T*>(sums.column_c)[column] -= dlogit;
            }
            if (de) {
              T* __restrict out = static_cast<T*>(de) + row * D;
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) out[d] = dt[d] + dlogit * (n.u_i[d] - n.u_j[d]);
            }
          }
        if (summed) static_cast<T*>(sums.row_c)[unit * tile.K + i] = row_c;
      }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const GateCpu gate = {forward, backward};
}

}  // namespace gcahng
