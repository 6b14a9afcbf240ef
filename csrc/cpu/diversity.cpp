#include "../diversity.h"

#include "tiles.h"

namespace gcahng {
namespace {

void forward(const DiversityForward& args, const DiversitySums& sums, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, D);
    const auto thetas = edge_rows<T>(args.theta, args.edge_type, D);
    for (int64_t number = begin; number < end; ++number) {
      const Unit unit = unit_of(args.tile, number);
      const auto sum = start_sums<T>(sums.sum, args.tile, unit, D);
      for (int64_t i = 0; i < args.tile.K; ++i) {
        T* __restrict square = typed<T>(sums.square) + (number * args.tile.K + i) * D;
        fill(square, D);
        each_edge(args.tile, unit, i, [&](const Edge& edge) {
          const T* __restrict theta = thetas.read(edge.row, wide);
          T* __restrict row = sum.row(i);
          T* __restrict column = sum.column(edge);
          if (edge.mirrored) {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const T x = theta[d] - T(0.5);
              row[d] += x;
              column[d] += x;
              square[d] += T(2) * x * x;
            }
          } else {
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const T x = theta[d] - T(0.5);
              row[d] += x;
              square[d] += x * x;
            }
          }
        });
      }
    }
  });
}

void backward(const DiversityBackward& args, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, 2 * D);
    const auto thetas = edge_rows<T>(args.theta, args.edge_type, D),
               into = edge_rows<T>(args.dtheta, args.edge_type, D);
    const T scale = *typed<T>(args.scale);
    const T* mean = typed<T>(args.mean);
    for (int64_t number = begin; number < end; ++number)
      each_edge(args.tile, unit_of(args.tile, number), [&](const Edge& edge) {
        const T* __restrict theta = thetas.read(edge.row, wide);
        const T* __restrict mean_i = mean + edge.anchor * D;
        const T* __restrict mean_j = mean + edge.column * D;
        T* __restrict dtheta = into.change(edge.row, wide + D);
        if (edge.mirrored) {
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) dtheta[d] += scale * ((theta[d] - mean_i[d]) + (theta[d] - mean_j[d]));
        } else {
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) dtheta[d] += scale * (theta[d] - mean_i[d]);
        }
        into.put(edge.row, dtheta);
      });
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const DiversityCpu diversity = {forward, backward};
}

}  // namespace gcahng
