// The CUDA implementations of the stages that judge negatives (gcahng/ops/_stages.py declares them).
#include "bindings_cuda.h"
#include "bindings_stages.h"
#include "cross_entropy.h"
#include "similarity.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;

void cross_entropy(const Tensor& logits, const Tensor& bias, const Tensor& labels, double scale, const Tensor& loss,
                   const Maybe& d) {
  constexpr const char* op = "gcahng::cross_entropy_";
  const DeviceGuard guard = guarded(op, logits, bias, labels, loss, d);
  const DType dtype = type_of(bias, op), low_type = low_type_of(logits, dtype, op);
  const int64_t M = width_of(logits), R = logits.numel() / M;
  check(cuda::launch_cross_entropy(dtype, low_type, data(logits, R * M, low_type, op, "logits"),
                                   data(bias, M, dtype, op, "bias"), indices(labels, R, op, "labels"), scale,
                                   data(loss, R, dtype, op, "loss"), data(d, R * M, low_type, op, "d"), R, M,
                                   current_stream(logits)),
        op);
}

void similarity(const Tensor& anchors, const Tensor& node, const Tensor& negatives, const Tensor& counted, double scale,
                const Tensor& loss, const Maybe& dn) {
  constexpr const char* op = "gcahng::similarity_";
  const DeviceGuard guard = guarded(op, negatives, anchors, node, counted, loss, dn);
  const DType dtype = type_of(negatives, op);
  const int64_t D = width_of(negatives), N = negatives.numel() / D;
  STD_TORCH_CHECK(width_of(anchors) == D, op, ": anchors must have the negatives' ", D, " channels");
  check(cuda::launch_similarity(dtype, data(anchors, anchors.numel(), dtype, op, "anchors"),
                                indices(node, N, op, "node"), data(negatives, N * D, dtype, op, "negatives"),
                                flags(counted, N, op, "counted"), scale, data(loss, N, dtype, op, "loss"),
                                data(dn, N * D, dtype, op, "dn"), N, D, current_stream(negatives)),
        op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy));
  m.impl("similarity_", TORCH_BOX(&similarity));
}
