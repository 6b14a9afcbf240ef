#include "../similarity.h"

#include "rows.h"

namespace gcahng {
namespace {

template <class T>
T norm_of(const T* x, int64_t n) {
  const T square = dot(x, x, n);
  return square > T(1e-16) ? square * inverse_root(square) : T(1e-8);
}

void forward(DType dtype, const void* anchors, const int64_t* node, const void* negatives, const bool* counted,
             double scale, void* loss, void* dn, int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    for (int64_t r = begin; r < end; ++r) {
      T& value = static_cast<T*>(loss)[r];
      value = 0;
      if (!counted[r]) continue;
      const T* __restrict a = static_cast<const T*>(anchors) + node[r] * D;
      const T* __restrict x = static_cast<const T*>(negatives) + r * D;
      const T norm_a = norm_of(a, D), norm_x = norm_of(x, D), cosine = dot(a, x, D) / (norm_a * norm_x);
      value = T(1) - cosine;
      if (!dn) continue;
      T* __restrict out = static_cast<T*>(dn) + r * D;
      const T along = T(scale) / norm_x, of_a = along / norm_a, of_x = along * cosine / norm_x;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) out[d] += of_x * x[d] - of_a * a[d];
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const SimilarityCpu similarity = {forward};
}

}  // namespace gcahng
