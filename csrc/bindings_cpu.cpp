// The CPU implementations of the ops that gcahng/ops/_schemas.py declares. Threads are shared out here, by rows of a
// result, so that no sum depends on their number.
#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "edge_start.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;

// Rows that are worth a thread of their own, each of so many values.
int64_t grain(int64_t values) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, values)); }

Tensor edge_start_fwd(const Tensor& x_i, const Tensor& x_j) {
  constexpr const char* op = "gcahng::edge_start_fwd";
  const auto [I, J, D] = pair_shape(x_i, x_j, op);
  const DType dtype = dtype_of(x_i, op, false);
  const Tensor a = matched(x_i, x_i, {I, D}, op, "x_i"), b = matched(x_j, x_i, {J, D}, op, "x_j");
  Tensor e = torch::stable::new_empty(x_i, {I, J, D});
  const auto& stem = GCAHNG_CPU(edge_start);
  const void *pa = a.const_data_ptr(), *pb = b.const_data_ptr();
  void* pe = e.mutable_data_ptr();
  torch::stable::parallel_for(0, I, grain(J * D), [=, &stem, J = J, D = D](int64_t begin, int64_t end) {
    stem.forward(dtype, pa, pb, pe, begin, end, J, D);
  });
  return e;
}

std::tuple<Tensor, Tensor> edge_start_bwd(const Tensor& grad_e, const Tensor& x_i, const Tensor& x_j) {
  constexpr const char* op = "gcahng::edge_start_bwd";
  const auto [I, J, D] = pair_shape(x_i, x_j, op);
  const DType dtype = dtype_of(x_i, op, false);
  const Tensor a = matched(x_i, x_i, {I, D}, op, "x_i"), b = matched(x_j, x_i, {J, D}, op, "x_j");
  const Tensor g = matched(grad_e, x_i, {I, J, D}, op, "grad_e");
  Tensor dx_i = torch::stable::new_empty(x_i, {I, D}), dx_j = torch::stable::new_empty(x_i, {J, D});
  const auto& stem = GCAHNG_CPU(edge_start);
  const void *pg = g.const_data_ptr(), *pa = a.const_data_ptr(), *pb = b.const_data_ptr();
  void *pi = dx_i.mutable_data_ptr(), *pj = dx_j.mutable_data_ptr();
  torch::stable::parallel_for(0, I, grain(J * D), [=, &stem, J = J, D = D](int64_t begin, int64_t end) {
    stem.backward_i(dtype, pg, pb, pi, begin, end, J, D);
  });
  torch::stable::parallel_for(0, J, grain(I * D), [=, &stem, I = I, J = J, D = D](int64_t begin, int64_t end) {
    stem.backward_j(dtype, pg, pa, pj, begin, end, I, J, D);
  });
  return {dx_i, dx_j};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("edge_start_fwd", TORCH_BOX(&edge_start_fwd));
  m.impl("edge_start_bwd", TORCH_BOX(&edge_start_bwd));
}
