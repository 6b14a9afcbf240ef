// What the CPU bindings share: threads, and sums. Units of work leave their sums in places of their own, which are then
// added up in order, so that no sum depends on the number of threads.
#pragma once
#include "../../cpu/blocks.h"
#include "../../cpu/dispatch.h"
#include "../common.h"

namespace gcahng::binding {

using torch::stable::parallel_for;

struct Cpu {
  static constexpr Limits kLimits{/*half=*/false, /*channels=*/INT64_MAX / 4};
};

// run(begin, end) on rows of about so many values, on units of a tile, and on blocks of rows.
template <class F>
void each_row(int64_t rows, int64_t values, const F& run) {
  constexpr int64_t kValuesAtOnce = 32768;
  parallel_for(0, rows, std::max<int64_t>(1, kValuesAtOnce / std::max<int64_t>(1, values)), run);
}
template <class F>
void each_unit(const Tile& tile, const F& run) {
  parallel_for(0, tile.units(), 1, run);
}
template <class F>
void each_block(int64_t rows, const F& run) {
  parallel_for(0, blocks_of(rows), 1, run);
}

// into[w] += sum over u, in order, of part[u * stride + w], w < width; in double, for there may be many.
template <class T>
void add_in_order(const T* part, int64_t count, int64_t stride, T* into, int64_t width) {
  constexpr int64_t kChunk = 64;
  double total[kChunk];
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t chunk = std::min(kChunk, width - first);
    for (int64_t w = 0; w < chunk; ++w) total[w] = into[first + w];
    for (int64_t u = 0; u < count; ++u)
      for (int64_t w = 0; w < chunk; ++w) total[w] += part[u * stride + first + w];
    for (int64_t w = 0; w < chunk; ++w) into[first + w] = static_cast<T>(total[w]);
  }
}

template <class F>
void with_float(DType dtype, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

// into (planes, width) += the sums over count of part (planes, count, width).
inline void add_partials(DType dtype, const void* part, void* into, int64_t planes, int64_t count, int64_t width) {
  with_float(dtype, [&]<class T>(T*) {
    for (int64_t plane = 0; plane < planes; ++plane) {
      const T* from = static_cast<const T*>(part) + plane * count * width;
      T* to = static_cast<T*>(into) + plane * width;
      parallel_for(0, width, 512, [=](int64_t begin, int64_t end) {
        add_in_order(from + begin, count, width, to + begin, end - begin);
      });
    }
  });
}

// Places for a tile's sums of `width` values at both ends of its edges.
inline int64_t end_values(const Tile& tile, int64_t width) { return (tile.units() + tile.A * tile.O) * tile.K * width; }
inline EndSums take_ends(Scratch& scratch, const Tile& tile, int64_t width) {
  void* rows = scratch.take(tile.units() * tile.K * width);
  return {rows, scratch.take(tile.A * tile.O * tile.K * width)};
}

template <class T>
void add(const T* x, T* into, int64_t width) {
  for (int64_t w = 0; w < width; ++w) into[w] += x[w];
}

// Adds a tile's sums to a node tensor; those at columns from offset `skip` on.
inline void add_nodes(DType dtype, const Tile& tile, const EndSums& sums, int64_t skip, void* into, int64_t W) {
  with_float(dtype, [&]<class T>(T*) {
    const int64_t width = tile.K * W, chunks = tile.chunks();
    parallel_for(0, width, 256, [=](int64_t begin, int64_t end) {
      const T *rows = static_cast<const T*>(sums.rows), *columns = static_cast<const T*>(sums.columns);
      T* to = static_cast<T*>(into);
      for (int64_t a = 0; a < tile.A; ++a) {
        add_in_order(rows + a * chunks * width + begin, chunks, width, to + (tile.first + a) * width + begin,
                     end - begin);
        for (int64_t o = skip; o < tile.O; ++o)
          add(columns + (a * tile.O + o) * width + begin, to + (tile.first + a + tile.offset + o) * width + begin,
              end - begin);
      }
    });
  });
}

}  // namespace gcahng::binding
