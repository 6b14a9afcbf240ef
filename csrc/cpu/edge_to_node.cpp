#include "../edge_to_node.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b, void* rows, void* columns,
             int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    const T* __restrict bias = static_cast<const T*>(b);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      fill(static_cast<T*>(columns) + (a * tile.O + o0) * tile.K * D, (o1 - o0) * tile.K * D);
      for (int64_t i = 0; i < tile.K; ++i) {
        T* __restrict row = static_cast<T*>(rows) + (unit * tile.K + i) * D;
        fill(row, D);
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const L* __restrict in = static_cast<const L*>(p) + tile.row(a, i, o, v) * D;
            T* __restrict column = static_cast<T*>(columns) + ((a * tile.O + o) * tile.K + v) * D;
            if (o >= tile.mirrored) {
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) {
                const T g = gelu(load(in, d) + bias[d]);
                row[d] += g;
                column[d] += g;
              }
            } else {
#pragma omp simd
              for (int64_t d = 0; d < D; ++d) row[d] += gelu(load(in, d) + bias[d]);
            }
          }
      }
    }
  });
}

void backward(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b, const void* ds, void* dp,
              void* db, int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    const T* __restrict bias = static_cast<const T*>(b);
    GCAHNG_SCRATCH(T, none, D);
    GCAHNG_SCRATCH(T, zero, D);
    fill(zero, D);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = unit / tile.chunks(), o0 = unit % tile.chunks() * tile.width();
      const int64_t o1 = o0 + tile.width() < tile.O ? o0 + tile.width() : tile.O;
      T* __restrict sum = db ? static_cast<T*>(db) + unit * D : none;
      fill(sum, D);
      for (int64_t i = 0; i < tile.K; ++i)
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t v = 0; v < tile.K; ++v) {
            const int64_t row = tile.row(a, i, o, v);
            const L* in = static_cast<const L*>(p) + row * D;
            L* out = static_cast<L*>(dp) + row * D;
            const T* ds_i = static_cast<const T*>(ds) + tile.anchor(a, i) * D;
            const T* ds_j = o >= tile.mirrored ? static_cast<const T*>(ds) + tile.column(a, o, v) * D : zero;
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const T x = load(in, d) + bias[d];
              const T value = (ds_i[d] + ds_j[d]) * gelu_slope(x, normal_cdf(x));
              store(out, d, value);
              sum[d] += value;
            }
          }
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const EdgeToNodeCpu edge_to_node = {forward, backward};
}

}  // namespace gcahng
