// The CUDA implementations of the stages that form the generator's losses (gcahng/ops/_stages.py declares them).
#include "bindings_cuda.h"
#include "bindings_stages.h"
#include "cross_entropy.h"
#include "diversity.h"
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

void diversity_fwd(const Ints& tile_, const Tensor& theta, const Tensor& sum, const Tensor& square) {
  constexpr const char* op = "gcahng::diversity_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, theta, sum, square);
  const DType dtype = type_of(theta, op);
  const int64_t D = width_of(theta);
  const Scratch scratch(theta, dtype, cuda::diversity_forward_scratch(tile, D));
  check(cuda::launch_diversity_forward(
            dtype, tile, data(theta, tile.rows() * D, dtype, op, "theta"), nodes(sum, tile, D, dtype, op, "sum"),
            nodes(square, tile, D, dtype, op, "square"), scratch.at, D, current_stream(theta)),
        op);
}

void diversity_bwd(const Ints& tile_, const Tensor& theta, const Tensor& mean, const Tensor& scale,
                   const Tensor& dtheta) {
  constexpr const char* op = "gcahng::diversity_bwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, theta, mean, scale, dtheta);
  const DType dtype = type_of(theta, op);
  const int64_t D = width_of(theta), T = tile.rows();
  check(cuda::launch_diversity_backward(dtype, tile, data(theta, T * D, dtype, op, "theta"),
                                        nodes(mean, tile, D, dtype, op, "mean"), data(scale, 1, dtype, op, "scale"),
                                        data(dtheta, T * D, dtype, op, "dtheta"), D, current_stream(theta)),
        op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy));
  m.impl("similarity_", TORCH_BOX(&similarity));
  m.impl("diversity_fwd_", TORCH_BOX(&diversity_fwd));
  m.impl("diversity_bwd_", TORCH_BOX(&diversity_bwd));
}
