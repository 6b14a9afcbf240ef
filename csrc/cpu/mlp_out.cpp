#include "../mlp_out.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, DType low_type, const void* out, const void* e1, const void* mean, const void* rstd,
             const void* w, const void* d, const void* gamma, const void* beta, void* s, void* y, void* low,
             int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, scratch, D);
    const T *fold = static_cast<const T*>(w), *shift = static_cast<const T*>(d);
    for (int64_t r = begin; r < end; ++r) {
      const L* __restrict o = static_cast<const L*>(out) + r * D;
      const T* __restrict residual = static_cast<const T*>(e1) + r * D;
      T* __restrict sum = static_cast<T*>(s) + r * D;
      const T center = static_cast<const T*>(mean)[r], inverse = static_cast<const T*>(rstd)[r];
#pragma omp simd
      for (int64_t k = 0; k < D; ++k) sum[k] = (load(o, k) - center * fold[k]) * inverse + shift[k] + residual[k];
      if (y || low)
        norm_gelu_row(sum, static_cast<const T*>(gamma), static_cast<const T*>(beta),
                      y ? static_cast<T*>(y) + r * D : nullptr, low ? static_cast<L*>(low) + r * D : nullptr, scratch,
                      D);
    }
  });
}

void backward(DType dtype, DType low_type, const void* s, const void* e1, const void* dy, const void* mean,
              const void* rstd, const void* w, const void* d, const void* gamma, void* ds, void* low, void* scaled,
              void* m1, void* m2, void* sums, int64_t begin, int64_t end, int64_t block, int64_t blocks, int64_t T_rows,
              int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, scratch, 2 * D);
    const T* __restrict fold = static_cast<const T*>(w), * __restrict shift = static_cast<const T*>(d);
    T* all = static_cast<T*>(sums);
    for (int64_t unit = begin; unit < end; ++unit) {
      T *dgamma = nullptr, *dbeta = nullptr, *total = nullptr, *means = nullptr;
      if (all) {
        dgamma = all + unit * D;
        dbeta = dgamma + blocks * D;
        total = dbeta + blocks * D;
        means = total + blocks * D;
        fill(dgamma, D);
        fill(dbeta, D);
        fill(total, D);
        fill(means, D);
      }
      const int64_t stop = (unit + 1) * block < T_rows ? (unit + 1) * block : T_rows;
      for (int64_t r = unit * block; r < stop; ++r) {
        const T* __restrict sum = static_cast<const T*>(s) + r * D;
        const T* __restrict residual = static_cast<const T*>(e1) + r * D;
        T* out = static_cast<T*>(ds) + r * D;
        norm_gelu_row_backward(sum, static_cast<const T*>(gamma), static_cast<const T*>(dy) + r * D, out, dgamma, dbeta,
                               scratch, D);
        const T center = static_cast<const T*>(mean)[r], inverse = static_cast<const T*>(rstd)[r];
        T first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
        for (int64_t k = 0; k < D; ++k) {
          first += out[k] * fold[k];
          second += out[k] * (sum[k] - residual[k] - shift[k]);
        }
        static_cast<T*>(m1)[r] = first / T(4 * D);
        static_cast<T*>(m2)[r] = second / T(4 * D);
        if (low) {
          L* __restrict narrowed = static_cast<L*>(low) + r * D;
#pragma omp simd
          for (int64_t k = 0; k < D; ++k) store(narrowed, k, out[k]);
        }
        if (scaled) {
          L* __restrict narrowed = static_cast<L*>(scaled) + r * D;
#pragma omp simd
          for (int64_t k = 0; k < D; ++k) store(narrowed, k, out[k] * inverse);
        }
        if (all) {
#pragma omp simd
          for (int64_t k = 0; k < D; ++k) {
            total[k] += out[k];
            means[k] += out[k] * inverse * center;
          }
        }
      }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const MlpOutCpu mlp_out = {forward, backward};
}

}  // namespace gcahng
