// How the CPU bindings of the stages add up what units of work have left in places of their own: in order, so that no
// sum depends on the number of threads.
#pragma once
#include "bindings_stages.h"

namespace gcahng::binding {

using torch::stable::parallel_for;

// The type of what is summed up.
inline DType sum_type_of(const Tensor& tensor, const char* op) {
  const DType dtype = dtype_of(tensor, op, false);
  STD_TORCH_CHECK(dtype != DType::bf16, op, ": float32 or float64 is needed");
  return dtype;
}

template <class T>
void add(const T* x, T* into, int64_t width) {
  for (int64_t w = 0; w < width; ++w) into[w] += x[w];
}

// into[w] += sum over u, in order, of part[u * stride + w], w < width; in double, for there may be many.
template <class T, class Into>
void add_in_order(const T* part, int64_t count, int64_t stride, Into* into, int64_t width) {
  constexpr int64_t kChunk = 64;
  double total[kChunk];
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t chunk = std::min(kChunk, width - first);
    for (int64_t w = 0; w < chunk; ++w) total[w] = into[first + w];
    for (int64_t u = 0; u < count; ++u)
      for (int64_t w = 0; w < chunk; ++w) total[w] += part[u * stride + first + w];
    for (int64_t w = 0; w < chunk; ++w) into[first + w] = static_cast<Into>(total[w]);
  }
}

template <class F>
void with_float(DType dtype, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

inline void add_blocks(DType dtype, const void* part, int64_t count, void* into, int64_t width) {
  with_float(dtype, [&]<class T>(T*) {
    parallel_for(0, width, 512, [=](int64_t begin, int64_t end) {
      add_in_order(static_cast<const T*>(part) + begin, count, width, static_cast<T*>(into) + begin, end - begin);
    });
  });
}

// Adds a tile's sums to a node tensor: rows (units, K, W), columns (A, O, K, W) from offset `skip` on.
inline void add_nodes(DType dtype, const Tile& tile, const void* rows, const void* columns, int64_t skip, void* into,
                      int64_t W) {
  with_float(dtype, [&]<class T>(T*) {
    const int64_t width = tile.K * W, chunks = tile.chunks();
    parallel_for(0, width, 256, [=](int64_t begin, int64_t end) {
      T* to = static_cast<T*>(into);
      for (int64_t a = 0; a < tile.A; ++a) {
        add_in_order(static_cast<const T*>(rows) + a * chunks * width + begin, chunks, width,
                     to + (tile.first + a) * width + begin, end - begin);
        for (int64_t o = skip; o < tile.O; ++o)
          add(static_cast<const T*>(columns) + (a * tile.O + o) * width + begin,
              to + (tile.first + a + tile.offset + o) * width + begin, end - begin);
      }
    });
  });
}

}  // namespace gcahng::binding
