// The CUDA implementations of the ops that gcahng/ops/_schemas.py declares.
#include <tuple>

#include "bindings_cuda.h"
#include "edge_start.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;

Tensor edge_start_fwd(const Tensor& x_i, const Tensor& x_j) {
  constexpr const char* op = "gcahng::edge_start_fwd";
  const auto [I, J, D] = pair_shape(x_i, x_j, op);
  const DType dtype = dtype_of(x_i, op, true);
  const DeviceGuard guard(x_i.get_device_index());
  const Tensor a = matched(x_i, x_i, {I, D}, op, "x_i"), b = matched(x_j, x_i, {J, D}, op, "x_j");
  Tensor e = torch::stable::new_empty(x_i, {I, J, D});
  check(cuda::launch_edge_start_forward(dtype, a.const_data_ptr(), b.const_data_ptr(), e.mutable_data_ptr(), I, J, D,
                                        current_stream(x_i)),
        op);
  return e;
}

std::tuple<Tensor, Tensor> edge_start_bwd(const Tensor& grad_e, const Tensor& x_i, const Tensor& x_j) {
  constexpr const char* op = "gcahng::edge_start_bwd";
  const auto [I, J, D] = pair_shape(x_i, x_j, op);
  const DType dtype = dtype_of(x_i, op, true);
  const DeviceGuard guard(x_i.get_device_index());
  const Tensor a = matched(x_i, x_i, {I, D}, op, "x_i"), b = matched(x_j, x_i, {J, D}, op, "x_j");
  const Tensor g = matched(grad_e, x_i, {I, J, D}, op, "grad_e");
  Tensor dx_i = torch::stable::new_empty(x_i, {I, D}), dx_j = torch::stable::new_empty(x_i, {J, D});
  check(
      cuda::launch_edge_start_backward(dtype, g.const_data_ptr(), a.const_data_ptr(), b.const_data_ptr(),
                                       dx_i.mutable_data_ptr(), dx_j.mutable_data_ptr(), I, J, D, current_stream(x_i)),
      op);
  return {dx_i, dx_j};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("edge_start_fwd", TORCH_BOX(&edge_start_fwd));
  m.impl("edge_start_bwd", TORCH_BOX(&edge_start_bwd));
}
