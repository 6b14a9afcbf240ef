#include "../mlp_in.h"

#include "rows.h"

namespace gcahng {
namespace {

constexpr int64_t kRun = 256;  // terms summed before they join the total: the error grows as the root of the runs

void forward(const MlpInForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t W = args.W;
    GCAHNG_SCRATCH(T, scratch, W);
    const T* bias = typed<T>(args.bias);
    for (int64_t r = begin; r < end; ++r) {
      const L* h = typed<L>(args.h) + r * W;
      L* g = typed<L>(args.g) + r * W;
      T sum = 0, square = 0;
      for (int64_t first = 0; first < W; first += kRun) {
        const int64_t stop = first + kRun < W ? first + kRun : W;
        T run = 0;
#pragma omp simd reduction(+ : run)
        for (int64_t d = first; d < stop; ++d) {
          const T value = store(g, d, gelu(load(h, d) + bias[d]));
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
      typed<T>(args.mean)[r] = center;
      typed<T>(args.rstd)[r] = inverse_root(square / T(W) + T(kNormEps));
    }
  });
}

void backward(const MlpInBackward& args, void* db, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t W = args.W;
    const T* __restrict bias = typed<T>(args.bias);
    GCAHNG_SCRATCH(T, none, W);
    for (int64_t block = begin; block < end; ++block) {
      T* __restrict sum = db ? typed<T>(db) + block * W : none;
      fill(sum, W);
      each_row(block, args.T, [&](int64_t r) {
        const L* h = typed<L>(args.h) + r * W;
        const L* dn = typed<L>(args.dn) + r * W;
        L* g = typed<L>(args.g) + r * W;
        L* dh = typed<L>(args.dh) + r * W;
        const T center = typed<T>(args.rows.mean)[r], inverse = typed<T>(args.rows.rstd)[r];
        const T mean_dn = typed<T>(args.rows.mean_dn)[r], along = typed<T>(args.rows.mean_n_dn)[r] * inverse;
#pragma omp simd
        for (int64_t d = 0; d < W; ++d) {
          const T x = load(h, d) + bias[d];
          const T cdf = normal_cdf(x);
          const T rounded = store(g, d, x * cdf);
          const T dg = (load(dn, d) - mean_dn - (rounded - center) * along) * inverse;
          const T value = dg * gelu_slope(x, cdf);
          store(dh, d, value);
          sum[d] += value;
        }
      });
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const MlpInCpu mlp_in = {forward, backward};
}

}  // namespace gcahng
