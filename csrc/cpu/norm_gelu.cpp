#include "../norm_gelu.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, DType low_type, const void* t, const void* gamma, const void* beta, void* y, void* low,
             int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, scratch, D);
    for (int64_t r = begin; r < end; ++r) {
      norm_gelu_row(static_cast<const T*>(t) + r * D, static_cast<const T*>(gamma), static_cast<const T*>(beta),
                    y ? static_cast<T*>(y) + r * D : nullptr, low ? static_cast<L*>(low) + r * D : nullptr, scratch, D);
    }
  });
}

void start(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t begin, int64_t end,
           int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    const T* nodes = static_cast<const T*>(x);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      for (int64_t i = 0; i < tile.K; ++i)
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const T* __restrict p = nodes + tile.anchor(a, i) * D;
            const T* __restrict q = nodes + tile.column(a, o, v) * D;
            const int64_t row = tile.row(a, i, o, v);
            if (e) {
              T* __restrict out = static_cast<T*>(e) + row * D;
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) out[d] = p[d] * q[d];
            }
            if (low) {
              L* __restrict out = static_cast<L*>(low) + row * D;
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) store(out, d, p[d] * q[d]);
            }
          }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const NormGeluCpu norm_gelu = {forward, start};
}

}  // namespace gcahng
