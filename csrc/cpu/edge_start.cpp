#include "../edge_start.h"

#include "rows.h"

namespace gcahng {
namespace {

template <class T>
void forward(const T* __restrict x_i, const T* __restrict x_j, T* __restrict e, int64_t begin, int64_t end, int64_t J,
             int64_t D) {
  for (int64_t i = begin; i < end; ++i) {
    const T* a = x_i + i * D;
    for (int64_t j = 0; j < J; ++j) {
      const T* b = x_j + j * D;
      T* row = e + (i * J + j) * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) row[d] = narrow<T>(widen(a[d]) * widen(b[d]));
    }
  }
}

constexpr int64_t kChannels = 512;  // of sums kept on the stack
constexpr int64_t kRun = 32;        // terms summed before they join the total: the error grows as the root of the runs

// out[o, :] = sum over s < count of g[o * outer + s * inner + :] * x[s, :], for o in [begin, end).
template <class T>
void node_sum(const T* __restrict g, const T* __restrict x, T* __restrict out, int64_t begin, int64_t end,
              int64_t count, int64_t D, int64_t outer, int64_t inner) {
  compute_t<T> total[kChannels], run[kChannels];
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t first = 0; first < D; first += kChannels) {
      const int64_t width = D - first < kChannels ? D - first : kChannels;
      for (int64_t d = 0; d < width; ++d) total[d] = 0;
      for (int64_t s = 0; s < count;) {
        const int64_t stop = s + kRun < count ? s + kRun : count;
        for (int64_t d = 0; d < width; ++d) run[d] = 0;
        for (; s < stop; ++s) {
          const T* a = g + o * outer + s * inner + first;
          const T* b = x + s * D + first;
#pragma omp simd
          for (int64_t d = 0; d < width; ++d) run[d] += widen(a[d]) * widen(b[d]);
        }
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) total[d] += run[d];
      }
      T* row = out + o * D + first;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) row[d] = narrow<T>(total[d]);
    }
  }
}

void forward_any(DType dtype, const void* x_i, const void* x_j, void* e, int64_t begin, int64_t end, int64_t J,
                 int64_t D) {
  with_type<false>(dtype, [&]<class T>(T*) {
    forward(static_cast<const T*>(x_i), static_cast<const T*>(x_j), static_cast<T*>(e), begin, end, J, D);
  });
}

void backward_i_any(DType dtype, const void* grad_e, const void* x_j, void* dx_i, int64_t begin, int64_t end, int64_t J,
                    int64_t D) {
  with_type<false>(dtype, [&]<class T>(T*) {
    node_sum(static_cast<const T*>(grad_e), static_cast<const T*>(x_j), static_cast<T*>(dx_i), begin, end, J, D, J * D,
             D);
  });
}

void backward_j_any(DType dtype, const void* grad_e, const void* x_i, void* dx_j, int64_t begin, int64_t end, int64_t I,
                    int64_t J, int64_t D) {
  with_type<false>(dtype, [&]<class T>(T*) {
    node_sum(static_cast<const T*>(grad_e), static_cast<const T*>(x_i), static_cast<T*>(dx_j), begin, end, I, D, D,
             J * D);
  });
}

void tile_any(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t begin,
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

void tile_backward_any(DType dtype, const Tile& tile, const void* x, const void* de, void* rows, void* columns,
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
extern const EdgeStartCpu edge_start = {forward_any, backward_i_any, backward_j_any, tile_any, tile_backward_any};
}

}  // namespace gcahng
