#include "../edge_start.h"

#include "tiles.h"

namespace gcahng {
namespace {

void forward(const EdgeStartForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    const T* nodes = typed<T>(args.x);
    for (int64_t number = begin; number < end; ++number)
      each_edge(args.tile, unit_of(args.tile, number), [&](const Edge& edge) {
        const T* __restrict x_i = nodes + edge.anchor * D;
        const T* __restrict x_j = nodes + edge.column * D;
        if (args.out.full) {
          T* __restrict out = typed<T>(args.out.full) + edge.row * D;
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) out[d] = x_i[d] * x_j[d];
        }
        if (args.out.low) {
          L* __restrict out = typed<L>(args.out.low) + edge.row * D;
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) store(out, d, x_i[d] * x_j[d]);
        }
      });
  });
}

void backward(const EdgeStartBackward& args, const EndSums& sums, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, D);
    const auto gradients = edge_rows<T>(args.de, args.edge_type, D);
    const T* nodes = typed<T>(args.x);
    for (int64_t number = begin; number < end; ++number) {
      const Unit unit = unit_of(args.tile, number);
      const auto dx = start_sums<T>(sums, args.tile, unit, D);
      for (int64_t i = 0; i < args.tile.K; ++i) {
        each_edge(args.tile, unit, i, [&](const Edge& edge) {
          const T* __restrict x_i = nodes + edge.anchor * D;
          const T* __restrict x_j = nodes + edge.column * D;
          const T* __restrict de = gradients.read(edge.row, wide);
          T* __restrict row = dx.row(i);
          T* __restrict column = dx.column(edge);
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) {
            row[d] += de[d] * x_j[d];
            column[d] += de[d] * x_i[d];
          }
        });
      }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const EdgeStartCpu edge_start = {forward, backward};
}

}  // namespace gcahng
