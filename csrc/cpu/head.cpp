#include "../head.h"

#include "tiles.h"

namespace gcahng {
namespace {

// Logistic function, by exp of what is not positive.
inline float logistic(float x) {
  const float e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}
inline double logistic(double x) { return sigmoid(x); }

void moments(const HeadMoments& args, void* sums, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, D);
    const auto edges = edge_rows<T>(args.e, args.edge_type, D);
    for (int64_t number = begin; number < end; ++number) {
      // In double: variances are differences of these sums, and edges may lie far from 0 for their spread.
      double *unit_sum = typed<double>(sums) + number * D, *unit_square = unit_sum + args.tile.units() * D;
      fill(unit_sum, D);
      fill(unit_square, D);
      each_edge(args.tile, unit_of(args.tile, number), [&](const Edge& edge) {
        double* __restrict sum = unit_sum;
        double* __restrict square = unit_square;
        const double weight = edge.mirrored ? 2.0 : 1.0;
        const T* __restrict e = edges.read(edge.row, wide);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const double value = e[d];
          sum[d] += weight * value;
          square[d] += weight * value * value;
        }
      });
    }
  });
}

void forward(const HeadForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, D);
    const auto thetas = edge_rows<T>(args.theta, args.edge_type, D);
    const T* bias = typed<T>(args.bias);
    for (int64_t r = begin; r < end; ++r) {
      const L* product = typed<L>(args.product) + r * D;
      T* theta = thetas.room(r, wide);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) theta[d] = logistic(load(product, d) + bias[d]);
      thetas.put(r, theta);
    }
  });
}

void backward(const HeadBackward& args, void* sums, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, none, 3 * D);
    T* const wide = none + D;
    const auto thetas = edge_rows<T>(args.theta, args.edge_type, D),
               gradients = edge_rows<T>(args.dtheta, args.edge_type, D);
    for (int64_t block = begin; block < end; ++block) {
      T* __restrict sum = sums ? typed<T>(sums) + block * D : none;
      fill(sum, D);
      each_row(block, args.T, [&](int64_t r) {
        const T *theta = thetas.read(r, wide), *dtheta = gradients.read(r, wide + D);
        L* dpre = typed<L>(args.dpre) + r * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const T value = dtheta[d] * theta[d] * (T(1) - theta[d]);
          store(dpre, d, value);
          sum[d] += value;
        }
      });
    }
  });
}

void sum_up(const HeadSums& args, void* sums, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, scratch, 2 * D);
    const auto edges = edge_rows<T>(args.e, args.edge_type, D), into = edge_rows<T>(args.wide, args.edge_type, D);
    for (int64_t block = begin; block < end; ++block) {
      T* __restrict sum = typed<T>(sums) + block * D;
      T* __restrict along = sum + blocks_of(args.T) * D;
      fill(sum, D);
      fill(along, D);
      each_row(block, args.T, [&](int64_t r) {
        const L* dy = typed<L>(args.dy) + r * D;
        const T* __restrict e = edges.read(r, scratch);
        T* wide = into.room(r, scratch + D);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const T value = load(dy, d);
          wide[d] = value;
          sum[d] += value;
          along[d] += value * e[d];
        }
        into.put(r, wide);
      });
    }
  });
}

void norm(const HeadNorm& args, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, wide, 2 * D);
    const auto gradients = edge_rows<T>(args.dy, args.edge_type, D), edges = edge_rows<T>(args.e, args.edge_type, D),
               into = edge_rows<T>(args.de, args.edge_type, D);
    for (int64_t number = begin; number < end; ++number)
      each_edge(args.tile, unit_of(args.tile, number), [&](const Edge& edge) {
        const T weight = edge.mirrored ? T(2) : T(1);
        const T* __restrict scale = typed<T>(args.scale);
        const T* __restrict a = typed<T>(args.a);
        const T* __restrict b = typed<T>(args.b);
        const T* dy = gradients.read(edge.row, wide);
        const T* __restrict e = edges.read(edge.row, wide + D);
        T* de = into.room(edge.row, wide);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) de[d] = scale[d] * (dy[d] - weight * (a[d] + b[d] * e[d]));
        into.put(edge.row, de);
      });
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const HeadCpu head = {moments, forward, backward, sum_up, norm};
}

}  // namespace gcahng
