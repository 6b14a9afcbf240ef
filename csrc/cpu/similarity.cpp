#include "../similarity.h"

#include "rows.h"

namespace gcahng {
namespace {

template <class T>
T norm_of(const T* x, int64_t n) {
  const T square = dot(x, x, n);
  return square > T(1e-16) ? square * inverse_root(square) : T(1e-8);
}

void forward(const SimilarityForward& args, int64_t begin, int64_t end) {
  with_accumulating(args.dtype, [&]<class T>(T*) {
    const int64_t D = args.D;
    for (int64_t r = begin; r < end; ++r) {
      T& loss = typed<T>(args.loss)[r];
      loss = 0;
      if (!args.counted[r]) continue;
      const T* __restrict a = typed<T>(args.anchors) + args.node[r] * D;
      const T* __restrict x = typed<T>(args.negatives) + r * D;
      const T norm_a = norm_of(a, D), norm_x = norm_of(x, D), cosine = dot(a, x, D) / (norm_a * norm_x);
      loss = T(1) - cosine;
      if (!args.dn) continue;
      T* __restrict dn = typed<T>(args.dn) + r * D;
      const T along = T(args.scale) / norm_x, of_a = along / norm_a, of_x = along * cosine / norm_x;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dn[d] += of_x * x[d] - of_a * a[d];
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const SimilarityCpu similarity = {forward};
}

}  // namespace gcahng
