#include "../edge_start.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t begin,
              int64_t end, int64_t D) {
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

void backward(DType dtype, const Tile& tile, const void* x, const void* de, void* rows, void* columns,
                       int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    const T* nodes = static_cast<const T*>(x);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      fill(static_cast<T*>(columns) + (a * tile.O + o0) * tile.K * D, (o1 - o0) * tile.K * D);
      for (int64_t i = 0; i < tile.K; ++i) {
        const T* __restrict p = nodes + tile.anchor(a, i) * D;
        T* __restrict row = static_cast<T*>(rows) + (unit * tile.K + i) * D;
        fill(row, D);
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const T* __restrict q = nodes + tile.column(a, o, v) * D;
            const T* __restrict g = static_cast<const T*>(de) + tile.row(a, i, o, v) * D;
            T* __restrict column = static_cast<T*>(columns) + ((a * tile.O + o) * tile.K + v) * D;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              row[d] += g[d] * q[d];
              column[d] += g[d] * p[d];
            }
          }
      }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const EdgeStartCpu edge_start = {forward, backward};
}

}  // namespace gcahng
