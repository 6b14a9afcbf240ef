#include "../diversity.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, const Tile& tile, const void* theta, void* rows, void* columns, void* squares, int64_t begin,
             int64_t end, int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      fill(static_cast<T*>(columns) + (a * tile.O + o0) * tile.K * D, (o1 - o0) * tile.K * D);
      for (int64_t i = 0; i < tile.K; ++i) {
        T* __restrict row = static_cast<T*>(rows) + (unit * tile.K + i) * D;
        T* __restrict square = static_cast<T*>(squares) + (unit * tile.K + i) * D;
        fill(row, D);
        fill(square, D);
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const T* __restrict in = static_cast<const T*>(theta) + tile.row(a, i, o, v) * D;
            T* __restrict column = static_cast<T*>(columns) + ((a * tile.O + o) * tile.K + v) * D;
            if (o >= tile.mirrored) {
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) {
                const T x = in[d] - T(0.5);
                row[d] += x;
                column[d] += x;
                square[d] += T(2) * x * x;
              }
            } else {
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) {
                const T x = in[d] - T(0.5);
                row[d] += x;
                square[d] += x * x;
              }
            }
          }
      }
    }
  });
}

void backward(DType dtype, const Tile& tile, const void* theta, const void* mean, const void* scale, void* dtheta,
              int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, dtype, [&]<class T, class L>(T*, L*) {
    const T by = *static_cast<const T*>(scale);
    const T* means = static_cast<const T*>(mean);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      for (int64_t i = 0; i < tile.K; ++i)
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const int64_t row = tile.row(a, i, o, v);
            const T* __restrict in = static_cast<const T*>(theta) + row * D;
            const T* __restrict mean_i = means + tile.anchor(a, i) * D;
            const T* __restrict mean_j = means + tile.column(a, o, v) * D;
            T* __restrict out = static_cast<T*>(dtheta) + row * D;
            if (o >= tile.mirrored) {
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) out[d] += by * ((in[d] - mean_i[d]) + (in[d] - mean_j[d]));
            } else {
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) out[d] += by * (in[d] - mean_i[d]);
            }
          }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const DiversityCpu diversity = {forward, backward};
}

}  // namespace gcahng
