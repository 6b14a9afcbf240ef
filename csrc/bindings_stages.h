// What the bindings of the engine's stages share: checks of their arguments, and scratch.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "bindings.h"
#include "common/tile.h"

namespace gcahng::binding {

using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

constexpr int64_t kMaxViews = 64;

inline Tile tile_of(const Ints& t, const char* op) {
  STD_TORCH_CHECK(t.size() == 7, op, ": tile is (A, K, O, first, offset, mirrored, classes)");
  STD_TORCH_CHECK(t[1] <= kMaxViews, op, ": at most ", kMaxViews, " samples a class");
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6]};
}

inline int64_t width_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// The data of a tensor that must be contiguous, of this many values and this type.
inline void* data(const Tensor& tensor, int64_t values, DType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == values, op, ": ", name, " must be contiguous, of ",
                  values, " values");
  STD_TORCH_CHECK(dtype_of(tensor, op, true) == dtype, op, ": ", name,
                  " has another dtype than the op's other arguments ask for");
  return tensor.mutable_data_ptr();
}
inline void* data(const Maybe& tensor, int64_t values, DType dtype, const char* op, const char* name) {
  return tensor.has_value() ? data(*tensor, values, dtype, op, name) : nullptr;
}
// Whole numbers, and flags.
inline const int64_t* indices(const Tensor& tensor, int64_t values, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == values && tensor.scalar_type() == ScalarType::Long, op,
                  ": ", name, " must be contiguous, of ", values, " int64 values");
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}
inline const bool* flags(const Tensor& tensor, int64_t values, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == values && tensor.scalar_type() == ScalarType::Bool, op,
                  ": ", name, " must be contiguous, of ", values, " bool values");
  return static_cast<const bool*>(tensor.const_data_ptr());
}
// A node tensor of whole classes, with the first ones repeated behind.
inline void* nodes(const Tensor& tensor, const Tile& tile, int64_t width, DType dtype, const char* op,
                   const char* name) {
  const int64_t classes = std::max(tile.first + tile.A, tile.first + tile.A + tile.offset + tile.O - 1);
  STD_TORCH_CHECK(tensor.numel() >= classes * tile.K * width, op, ": ", name, " has too few nodes for the tile");
  return data(tensor, tensor.numel(), dtype, op, name);
}

// Scratch of the accumulating type.
struct Scratch {
  Tensor tensor;
  char* at;
  int64_t size;
  Scratch(const Tensor& like, DType dtype, int64_t values)
      : tensor(torch::stable::new_empty(like, {values})),
        at(static_cast<char*>(tensor.mutable_data_ptr())),
        size(dtype == DType::f64 ? 8 : 4) {}
  void* take(int64_t values) {
    void* here = at;
    at += values * size;
    return here;
  }
};

}  // namespace gcahng::binding
