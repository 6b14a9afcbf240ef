#include "../cross_entropy.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, DType low_type, const void* logits, const void* bias, const int64_t* labels, double scale_,
             void* loss, void* d, int64_t begin, int64_t end, int64_t M) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    const T* __restrict shift = static_cast<const T*>(bias);
    const T scale = T(scale_);
    for (int64_t r = begin; r < end; ++r) {
      const L* in = static_cast<const L*>(logits) + r * M;
      T most = load(in, 0) + shift[0];
#pragma omp simd reduction(max : most)
      for (int64_t m = 0; m < M; ++m) {
        const T x = load(in, m) + shift[m];
        most = x > most ? x : most;
      }
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t m = 0; m < M; ++m) sum += exp_negative(load(in, m) + shift[m] - most);
      const int64_t label = labels[r];
      static_cast<T*>(loss)[r] = logarithm(sum) - (load(in, label) + shift[label] - most);
      if (!d) continue;
      L* out = static_cast<L*>(d) + r * M;
      const T each = scale / sum;
      const T own = exp_negative(load(in, label) + shift[label] - most) * each - scale;
#pragma omp simd
      for (int64_t m = 0; m < M; ++m) store(out, m, exp_negative(load(in, m) + shift[m] - most) * each);
      store(out, label, own);
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const CrossEntropyCpu cross_entropy = {forward};
}

}  // namespace gcahng
