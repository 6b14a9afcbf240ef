#include "../cross_entropy.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(const CrossEntropyForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t M = args.M;
    const T* __restrict bias = typed<T>(args.bias);
    const T scale = T(args.scale);
    for (int64_t r = begin; r < end; ++r) {
      const L* logits = typed<L>(args.logits) + r * M;
      T most = load(logits, 0) + bias[0];
#pragma omp simd reduction(max : most)
      for (int64_t m = 0; m < M; ++m) {
        const T x = load(logits, m) + bias[m];
        most = x > most ? x : most;
      }
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t m = 0; m < M; ++m) sum += exp_negative(load(logits, m) + bias[m] - most);
      const int64_t label = args.labels[r];
      typed<T>(args.loss)[r] = logarithm(sum) - (load(logits, label) + bias[label] - most);
      if (!args.d) continue;
      L* d = typed<L>(args.d) + r * M;
      const T each = scale / sum;
      const T own = exp_negative(load(logits, label) + bias[label] - most) * each - scale;
#pragma omp simd
      for (int64_t m = 0; m < M; ++m) store(d, m, exp_negative(load(logits, m) + bias[m] - most) * each);
      store(d, label, own);
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const CrossEntropyCpu cross_entropy = {forward};
}

}  // namespace gcahng
