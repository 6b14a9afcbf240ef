#include "../edge_to_node.h"

#include "tiles.h"

namespace gcahng {
namespace {

void forward(const EdgeToNodeForward& args, const EndSums& sums, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    const T* __restrict bias = typed<T>(args.bias);
    for (int64_t number = begin; number < end; ++number) {
      const Unit unit = unit_of(args.tile, number);
      const auto sum = start_sums<T>(sums, args.tile, unit, D);
      for (int64_t i = 0; i < args.tile.K; ++i) {
        each_edge(args.tile, unit, i, [&](const Edge& edge) {
          const L* __restrict product = typed<L>(args.product) + edge.row * D;
          T* __restrict row = sum.row(i);
          T* __restrict column = sum.column(edge);
          if (edge.mirrored) {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const T g = gelu(load(product, d) + bias[d]);
              row[d] += g;
              column[d] += g;
            }
          } else {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) row[d] += gelu(load(product, d) + bias[d]);
          }
        });
      }
    }
  });
}

void backward(const EdgeToNodeBackward& args, void* db, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    const T* __restrict bias = typed<T>(args.bias);
    const T* ds = typed<T>(args.ds);
    GCAHNG_SCRATCH(T, none, D);
    GCAHNG_SCRATCH(T, zero, D);
    fill(zero, D);
    for (int64_t number = begin; number < end; ++number) {
      T* __restrict sum = db ? typed<T>(db) + number * D : none;
      fill(sum, D);
      each_edge(args.tile, unit_of(args.tile, number), [&](const Edge& edge) {
        const L* product = typed<L>(args.product) + edge.row * D;
        L* dp = typed<L>(args.dp) + edge.row * D;
        const T* ds_i = ds + edge.anchor * D;
        const T* ds_j = edge.mirrored ? ds + edge.column * D : zero;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const T x = load(product, d) + bias[d];
          const T value = (ds_i[d] + ds_j[d]) * gelu_slope(x, normal_cdf(x));
          store(dp, d, value);
          sum[d] += value;
        }
      });
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const EdgeToNodeCpu edge_to_node = {forward, backward};
}

}  // namespace gcahng
