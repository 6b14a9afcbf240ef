#include "../mlp_in.h"

#include "rows.h"

namespace gcahng {
namespace {

constexpr int64_t kRun = 256;  // terms summed before they join the total: the error grows as the root of the runs

void forward(DType dtype, DType low_type, const void* h, const void* b, void* g, void* mean, void* rstd, int64_t begin,
             int64_t end, int64_t W) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, scratch, W);
    const T* bias = static_cast<const T*>(b);
    for (int64_t r = begin; r < end; ++r) {
      const L* in = static_cast<const L*>(h) + r * W;
      L* out = static_cast<L*>(g) + r * W;
      T sum = 0, square = 0;
      for (int64_t first = 0; first < W; first += kRun) {
        const int64_t stop = first + kRun < W ? first + kRun : W;
        T run = 0;
#pragma omp simd reduction(+ : run)
        for (int64_t d = first; d < stop; ++d) {
          const T value = store(out, d, gelu(load(in, d) + bias[d]));
          scratch[d] = value;
          run += value;
        }
        sum += run;
      }
      const T center = sum / T(W);
      for (int64_t first = 0; first < W; first += kRun) {
        const int64_t stop = first + kRun < W ? first + kRun : W;
        T run = 0;
#pragma omp simd reduction(+ : run)
        for (int64_t d = first; d < stop; ++d) run += (scratch[d] - center) * (scratch[d] - center);
        square += run;
      }
      static_cast<T*>(mean)[r] = center;
      static_cast<T*>(rstd)[r] = inverse_root(square / T(W) + T(kNormEps));
    }
  });
}

void backward(DType dtype, DType low_type, const void* h, const void* b, const void* dn, const void* mean,
              const void* rstd, const void* m1, const void* m2, void* g, void* dh, void* db, int64_t begin, int64_t end,
              int64_t block, int64_t T_rows, int64_t W) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    const T* __restrict bias = static_cast<const T*>(b);
    GCAHNG_SCRATCH(T, none, W);
    for (int64_t unit = begin; unit < end; ++unit) {
      T* __restrict sum = db ? static_cast<T*>(db) + unit * W : none;
      fill(sum, W);
      const int64_t stop = (unit + 1) * block < T_rows ? (unit + 1) * block : T_rows;
      for (int64_t r = unit * block; r < stop; ++r) {
        const L* in = static_cast<const L*>(h) + r * W;
        const L* d_in = static_cast<const L*>(dn) + r * W;
        L* out = static_cast<L*>(g) + r * W;
        L* d_out = static_cast<L*>(dh) + r * W;
        const T center = static_cast<const T*>(mean)[r], inverse = static_cast<const T*>(rstd)[r];
        const T a = static_cast<const T*>(m1)[r], c = static_cast<const T*>(m2)[r] * inverse;
#pragma omp simd
        for (int64_t d = 0; d < W; ++d) {
          const T x = load(in, d) + bias[d];
          const T cdf = normal_cdf(x);
          const T rounded = store(out, d, x * cdf);
          const T dg = (load(d_in, d) - a - (rounded - center) * c) * inverse;
          const T value = dg * gelu_slope(x, cdf);
          store(d_out, d, value);
          sum[d] += value;
        }
      }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const MlpInCpu mlp_in = {forward, backward};
}

}  // namespace gcahng
