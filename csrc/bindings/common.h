// What the bindings share: checks of an op's tensors (torch's stable ABI), their raw pointers, and scratch.
//
// csrc/bindings/<stem>.h has a function for each op. Its flat arguments are the op's schema, which the NamedTuples of
// gcahng/engine/stages/<stem>.py spell out in the same order; it checks them, fills the struct of csrc/<stem>.h, and
// hands that to Device::run. There is a Device for each stem in csrc/bindings/{cpu,cuda}/<stem>.cpp.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/dtype.h"
#include "../common/tile.h"

namespace gcahng::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// What a device's code takes: float16 beside bfloat16, and at most so many channels of an edge where an op says so.
struct Limits {
  bool half;
  int64_t channels;
};

inline int64_t width_of(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }
inline int64_t rows_of(const Tensor& tensor) { return tensor.numel() / width_of(tensor); }

// One call of an op, on the device of `like`.
class Call {
 public:
  Call(const char* op, const Tensor& like, Limits limits) : op(op), like(like), limits_(limits) {}

  const char* const op;
  const Tensor like;

  // The accumulating type, which is this tensor's.
  DType accumulating(const Tensor& tensor, const char* name) const {
    const DType dtype = dtype_of(tensor, name);
    STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, op, ": ", name,
                    " is of another type; it must be float32 or float64");
    return dtype;
  }

  // The products' type, which is this tensor's, beside the accumulating one.
  DType product(const Tensor& tensor, DType dtype, const char* name) const {
    const DType low = dtype_of(tensor, name);
    STD_TORCH_CHECK(low == dtype || (dtype == DType::f32 && low != DType::f64), op, ": ", name,
                    " is of another type; it must be of the accumulating type or, beside float32, ", narrow_types());
    return low;
  }
  DType product(const Maybe& tensor, DType dtype, const char* name) const {
    return tensor.has_value() ? product(*tensor, dtype, name) : dtype;
  }

  // The type of edges, which is this tensor's: the accumulating one or, beside float32, bfloat16.
  DType edges(const Tensor& tensor, DType dtype, const char* name) const {
    const DType type = dtype_of(tensor, name);
    STD_TORCH_CHECK(type == dtype || (dtype == DType::f32 && type == DType::bf16), op, ": ", name,
                    " is of another type; it must be of the accumulating type or, beside float32, bfloat16");
    return type;
  }
  // The accumulating type of an op that takes no other tensor of it than such edges.
  DType accumulating_edges(const Tensor& tensor, const char* name) const {
    return dtype_of(tensor, name) == DType::bf16 ? DType::f32 : accumulating(tensor, name);
  }

  // The channels of an edge tensor or, divided by `hidden`, of its hidden layer.
  int64_t channels(const Tensor& tensor, const char* name, int64_t hidden = 1) const {
    const int64_t width = width_of(tensor);
    STD_TORCH_CHECK(width >= 1 && width / hidden <= limits_.channels, op, ": ", name, " has ", width,
                    " channels; it must have 1 to ", hidden * limits_.channels);
    return width;
  }

  gcahng::Tile tile(const Ints& t) const {
    STD_TORCH_CHECK(t.size() == 7, op, ": tile has ", t.size(),
                    " numbers; it must be (A, K, O, first, offset, mirrored, classes)");
    STD_TORCH_CHECK(t[1] <= kMaxViews, op, ": tile has ", t[1], " samples a class; it must have ", kMaxViews,
                    " at most");
    return {t[0], t[1], t[2], t[3], t[4], t[5], t[6]};
  }

  // The data of a contiguous tensor of this many values and this type.
  void* data(const Tensor& tensor, int64_t values, DType dtype, const char* name) const {
    STD_TORCH_CHECK(dtype_of(tensor, name) == dtype, op, ": ", name,
                    " is of another type than the op's other arguments ask for");
    return memory(tensor, values, name);
  }
  void* data(const Maybe& tensor, int64_t values, DType dtype, const char* name) const {
    return tensor.has_value() ? data(*tensor, values, dtype, name) : nullptr;
  }
  const int64_t* indices(const Tensor& tensor, int64_t values, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, op, ": ", name, " is of another type; it must be int64");
    return static_cast<const int64_t*>(memory(tensor, values, name));
  }
  const bool* flags(const Tensor& tensor, int64_t values, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Bool, op, ": ", name, " is of another type; it must be bool");
    return static_cast<const bool*>(memory(tensor, values, name));
  }

  // A node tensor (classes + reach, K, width): of whole classes, with the first ones repeated behind.
  void* nodes(const Tensor& tensor, const gcahng::Tile& tile, int64_t width, DType dtype, const char* name) const {
    const int64_t classes = std::max(tile.first + tile.A, tile.first + tile.A + tile.offset + tile.O - 1);
    STD_TORCH_CHECK(tensor.numel() >= classes * tile.K * width, op, ": ", name, " has too few nodes for the tile");
    return data(tensor, tensor.numel(), dtype, name);
  }
  void* nodes(const Maybe& tensor, const gcahng::Tile& tile, int64_t width, DType dtype, const char* name) const {
    return tensor.has_value() ? nodes(*tensor, tile, width, dtype, name) : nullptr;
  }

 private:
  const char* narrow_types() const { return limits_.half ? "bfloat16 or float16" : "bfloat16"; }

  DType dtype_of(const Tensor& tensor, const char* name) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::f32;
      case ScalarType::Double:
        return DType::f64;
      case ScalarType::BFloat16:
        return DType::bf16;
      case ScalarType::Half:
        if (limits_.half) return DType::f16;
        break;
      default:
        break;
    }
    STD_TORCH_CHECK(false, op, ": ", name, " is of another type; it must be float32, float64, ", narrow_types());
  }

  void* memory(const Tensor& tensor, int64_t values, const char* name) const {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == values, op, ": ", name, " must be contiguous, of ",
                    values, " values");
    STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name,
                    " is on another device; all tensors must be on one device");
    return tensor.mutable_data_ptr();
  }

  const Limits limits_;
};

// Scratch of a type of sums, f32 or f64.
class Scratch {
 public:
  Scratch(const Call& call, DType dtype, int64_t values)
      : size_(dtype == DType::f64 ? 8 : 4),
        tensor_(torch::stable::new_empty(call.like, {values},
                                         dtype == DType::f64 ? ScalarType::Double : ScalarType::Float)),
        at_(static_cast<char*>(tensor_.mutable_data_ptr())) {}

  // The next values.
  void* take(int64_t values) {
    void* here = at_;
    at_ += values * size_;
    return here;
  }

 private:
  int64_t size_;
  Tensor tensor_;
  char* at_;
};

}  // namespace gcahng::binding
