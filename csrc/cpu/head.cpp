#include "../head.h"

#include "rows.h"

namespace gcahng {
namespace {

// Logistic function, by exp of what is not positive.
inline float logistic(float x) {
  const float e = exp_negative(x < 0 ? x : -x);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}
inline double logistic(double x) { return sigmoid(x); }

void moments(DType dtype, const Tile& tile, const void* e, void* sums, int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      // In double: variances are differences of these sums, and edges may lie far from 0 for their spread.
      double* __restrict sum = static_cast<double*>(sums) + unit * D;
      double* __restrict square = sum + tile.units() * D;
      fill(sum, D);
      fill(square, D);
      for (int64_t i = 0; i < tile.K; ++i)
        for (int64_t o = o0; o < o1; ++o) {
          const double weight = o >= tile.mirrored ? 2.0 : 1.0;
          for (int64_t v = 0; v < tile.K; ++v) {
            const T* __restrict x = static_cast<const T*>(e) + tile.row(a, i, o, v) * D;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const double value = x[d];
              sum[d] += weight * value;
              square[d] += weight * value * value;
            }
          }
        }
    }
  });
}

void forward(DType dtype, DType low_type, const void* p, const void* b, void* theta, int64_t begin, int64_t end,
             int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    const T* bias = static_cast<const T*>(b);
    for (int64_t r = begin; r < end; ++r) {
      const L* in = static_cast<const L*>(p) + r * D;
      T* out = static_cast<T*>(theta) + r * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[d] = logistic(load(in, d) + bias[d]);
    }
  });
}

void backward(DType dtype, DType low_type, const void* theta, const void* dtheta, void* dpre, void* sums, int64_t begin,
              int64_t end, int64_t block, int64_t T_rows, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, none, D);
    for (int64_t unit = begin; unit < end; ++unit) {
      T* __restrict sum = sums ? static_cast<T*>(sums) + unit * D : none;
      fill(sum, D);
      const int64_t stop = (unit + 1) * block < T_rows ? (unit + 1) * block : T_rows;
      for (int64_t r = unit * block; r < stop; ++r) {
        const T *t = static_cast<const T*>(theta) + r * D, *g = static_cast<const T*>(dtheta) + r * D;
        L* out = static_cast<L*>(dpre) + r * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const T value = g[d] * t[d] * (T(1) - t[d]);
          store(out, d, value);
          sum[d] += value;
        }
      }
    }
  });
}

void sum_up(DType dtype, DType low_type, const void* dy, const void* e, void* wide, void* sums, int64_t begin,
            int64_t end, int64_t block, int64_t blocks, int64_t T_rows, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    for (int64_t unit = begin; unit < end; ++unit) {
      T* __restrict sum = static_cast<T*>(sums) + unit * D;
      T* __restrict along = sum + blocks * D;
      fill(sum, D);
      fill(along, D);
      const int64_t stop = (unit + 1) * block < T_rows ? (unit + 1) * block : T_rows;
      for (int64_t r = unit * block; r < stop; ++r) {
        const L* g = static_cast<const L*>(dy) + r * D;
        const T* __restrict x = static_cast<const T*>(e) + r * D;
        T* out = static_cast<T*>(wide) + r * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          const T value = load(g, d);
          out[d] = value;
          sum[d] += value;
          along[d] += value * x[d];
        }
      }
    }
  });
}

void norm(DType dtype, const Tile& tile, const void* dy, const void* e, const void* scale, const void* a_,
          const void* b_, void* de, int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    const T* __restrict by = static_cast<const T*>(scale);
    const T* __restrict flat = static_cast<const T*>(a_);
    const T* __restrict along = static_cast<const T*>(b_);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      for (int64_t i = 0; i < tile.K; ++i)
        for (int64_t o = o0; o < o1; ++o) {
          const T weight = o >= tile.mirrored ? T(2) : T(1);
          for (int64_t v = 0; v < tile.K; ++v) {
            const int64_t row = tile.row(a, i, o, v);
            const T* g = static_cast<const T*>(dy) + row * D;
            const T* __restrict x = static_cast<const T*>(e) + row * D;
            T* out = static_cast<T*>(de) + row * D;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) out[d] = by[d] * (g[d] - weight * (flat[d] + along[d] * x[d]));
          }
        }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const HeadCpu head = {moments, forward, backward, sum_up, norm};
}

}  // namespace gcahng
