#include "../gate.h"

#include "tiles.h"

namespace gcahng {
namespace {

// An edge's rows of the tokens, and what multiplies its attention weights.
template <class T>
struct Ends {
  const T *u_i, *u_j, *v_i, *v_j;
  T c_i, c_j, mask_i, mask_j;
};

template <class Args, class T>
inline Ends<T> ends_of(const Args& args, const Edge& edge, T*) {
  const int64_t i = edge.anchor, j = edge.column, D = args.D;
  const T *u = typed<T>(args.tokens.u), *c = typed<T>(args.tokens.c), *v = typed<T>(args.tokens.v);
  T mask_i, mask_j;
  masks_of(args.dropout, i, args.tile.node(j), mask_i, mask_j);
  return {u + i * D, u + j * D, v + i * D, v + j * D, c[i], c[j], mask_i, mask_j};
}

void forward(const GateForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T* type, L*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, t, 3 * D);
    const auto edges = edge_rows<T>(args.e, args.edge_type, D);
    const T scale = inverse_root(T(D));
    T* full = typed<T>(args.out.full);
    L* low = typed<L>(args.out.low);
    for (int64_t number = begin; number < end; ++number)
      each_edge(args.tile, unit_of(args.tile, number), [&](const Edge& edge) {
        const auto n = ends_of(args, edge, type);
        const T* __restrict e = edges.read(edge.row, t + 2 * D);
        T logit = 0;
#pragma omp simd reduction(+ : logit)
        for (int64_t d = 0; d < D; ++d) logit += e[d] * (n.u_i[d] - n.u_j[d]);
        logit = (logit + (n.c_i - n.c_j)) * scale;
        const T weight_i = sigmoid(logit), weight_j = sigmoid(-logit);
        typed<T>(args.weight_i)[edge.row] = weight_i;
        typed<T>(args.weight_j)[edge.row] = weight_j;
        const T w_i = weight_i * n.mask_i, w_j = weight_j * n.mask_j;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) t[d] = e[d] + w_i * n.v_i[d] + w_j * n.v_j[d];
        norm_gelu_row(t, typed<T>(args.norm.gamma), typed<T>(args.norm.beta), full ? full + edge.row * D : nullptr,
                      low ? low + edge.row * D : nullptr, t + D, D);
      });
  });
}

// A unit's sums. Null pointers where none are wanted.
template <class T>
struct TokenSums {
  UnitSums<T> u, c, v;
  T *dgamma, *dbeta;
};

template <class T>
inline TokenSums<T> start_sums(const GateSums& sums, const Tile& tile, const Unit& unit, int64_t D) {
  if (!sums.dgamma) return {};
  T *dgamma = typed<T>(sums.dgamma) + unit.number * D, *dbeta = typed<T>(sums.dbeta) + unit.number * D;
  fill(dgamma, D);
  fill(dbeta, D);
  return {start_sums<T>(sums.u, tile, unit, D), start_sums<T>(sums.c, tile, unit, 1),
          start_sums<T>(sums.v, tile, unit, D), dgamma, dbeta};
}

void backward(const GateBackward& args, const GateSums& sums, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T* type) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, t, 7 * D);
    T *dt = t + D, *scratch = t + 2 * D, *wide = t + 4 * D;
    const auto edges = edge_rows<T>(args.e, args.edge_type, D), upstream = edge_rows<T>(args.de1, args.edge_type, D),
               into = edge_rows<T>(args.de, args.edge_type, D);
    const T scale = inverse_root(T(D));
    for (int64_t number = begin; number < end; ++number) {
      const Unit unit = unit_of(args.tile, number);
      const auto own = start_sums<T>(sums, args.tile, unit, D);
      for (int64_t i = 0; i < args.tile.K; ++i) {
        T row_c = 0;
        each_edge(args.tile, unit, i, [&](const Edge& edge) {
          const auto n = ends_of(args, edge, type);
          const T* __restrict e = edges.read(edge.row, wide);
          const T weight_i = typed<T>(args.weight_i)[edge.row], weight_j = typed<T>(args.weight_j)[edge.row];
          const T w_i = weight_i * n.mask_i, w_j = weight_j * n.mask_j;
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) t[d] = e[d] + w_i * n.v_i[d] + w_j * n.v_j[d];
          norm_gelu_row_backward(t, typed<T>(args.norm.gamma), upstream.read(edge.row, wide + D), dt, own.dgamma,
                                 own.dbeta, scratch, D);
          T dw_i = 0, dw_j = 0;
#pragma omp simd reduction(+ : dw_i, dw_j)
          for (int64_t d = 0; d < D; ++d) {
            dw_i += dt[d] * n.v_i[d];
            dw_j += dt[d] * n.v_j[d];
          }
          const T dlogit = (dw_i * n.mask_i - dw_j * n.mask_j) * weight_i * weight_j * scale;
          if (own.dgamma) {
            T* __restrict row_u = own.u.row(i);
            T* __restrict row_v = own.v.row(i);
            T* __restrict column_u = own.u.column(edge);
            T* __restrict column_v = own.v.column(edge);
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const T du = dlogit * e[d];
              row_u[d] += du;
              column_u[d] -= du;
              row_v[d] += w_i * dt[d];
              column_v[d] += w_j * dt[d];
            }
            row_c += dlogit;
            *own.c.column(edge) -= dlogit;
          }
          if (args.de) {
            T* __restrict de = into.room(edge.row, wide + 2 * D);
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) de[d] = dt[d] + dlogit * (n.u_i[d] - n.u_j[d]);
            into.put(edge.row, de);
          }
        });
        if (own.dgamma) *own.c.row(i) = row_c;
      }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const GateCpu gate = {forward, backward};
}

}  // namespace gcahng
