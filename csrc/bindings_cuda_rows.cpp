// The CUDA implementations of the engine's row-wise stages (gcahng/ops/_stages.py declares them). Results are written
// into tensors that the engine owns; partial sums live in scratch of torch's allocator, on its stream.
#include "bindings_cuda.h"
#include "bindings_stages.h"
#include "mlp_out.h"
#include "head.h"
#include "mlp_in.h"
#include "norm_gelu.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;

constexpr int64_t kMaxDim = 1024;

// The width of an edge or, times 4, of its hidden layer.
int64_t width_up_to(const Tensor& tensor, int64_t most, const char* op) {
  const int64_t width = width_of(tensor);
  STD_TORCH_CHECK(width >= 1 && width <= most, op, ": ", width, " channels; the kernels take 1 to ", most);
  return width;
}

void norm_gelu(const Tensor& t, const Tensor& gamma, const Tensor& beta, const Maybe& y, const Maybe& low) {
  constexpr const char* op = "gcahng::norm_gelu_";
  const DeviceGuard guard = guarded(op, t, gamma, beta, y, low);
  const DType dtype = type_of(t, op), low_type = low_type_of(low, dtype, op);
  const int64_t D = width_up_to(t, kMaxDim, op), T = t.numel() / D;
  check(cuda::launch_norm_gelu_forward(dtype, low_type, data(t, T * D, dtype, op, "t"),
                                       data(gamma, D, dtype, op, "gamma"), data(beta, D, dtype, op, "beta"),
                                       data(y, T * D, dtype, op, "y"), data(low, T * D, low_type, op, "low"), T, D,
                                       current_stream(t)),
        op);
}

void mlp_in_fwd(const Tensor& h, const Tensor& b, const Tensor& g, const Tensor& mean, const Tensor& rstd) {
  constexpr const char* op = "gcahng::mlp_in_fwd_";
  const DeviceGuard guard = guarded(op, h, b, g, mean, rstd);
  const DType dtype = type_of(b, op), low_type = low_type_of(h, dtype, op);
  const int64_t W = width_up_to(h, 4 * kMaxDim, op), T = h.numel() / W;
  check(cuda::launch_mlp_in_forward(dtype, low_type, data(h, T * W, low_type, op, "h"), data(b, W, dtype, op, "b"),
                                    data(g, T * W, low_type, op, "g"), data(mean, T, dtype, op, "mean"),
                                    data(rstd, T, dtype, op, "rstd"), T, W, current_stream(h)),
        op);
}

void mlp_in_bwd(const Tensor& h, const Tensor& b, const Tensor& dn, const Tensor& mean, const Tensor& rstd,
                const Tensor& m1, const Tensor& m2, const Tensor& g, const Tensor& dh, const Maybe& db) {
  constexpr const char* op = "gcahng::mlp_in_bwd_";
  const DeviceGuard guard = guarded(op, h, b, dn, mean, rstd, m1, m2, g, dh, db);
  const DType dtype = type_of(b, op), low_type = low_type_of(h, dtype, op);
  const int64_t W = width_up_to(h, 4 * kMaxDim, op), T = h.numel() / W;
  Scratch scratch(b, dtype, db ? cuda::mlp_in_backward_scratch(T, W) : 0);
  check(cuda::launch_mlp_in_backward(
            dtype, low_type, data(h, T * W, low_type, op, "h"), data(b, W, dtype, op, "b"),
            data(dn, T * W, low_type, op, "dn"), data(mean, T, dtype, op, "mean"), data(rstd, T, dtype, op, "rstd"),
            data(m1, T, dtype, op, "m1"), data(m2, T, dtype, op, "m2"), data(g, T * W, low_type, op, "g"),
            data(dh, T * W, low_type, op, "dh"), data(db, W, dtype, op, "db"), scratch.at, T, W, current_stream(h)),
        op);
}

void mlp_out_fwd(const Tensor& out, const Tensor& e1, const Tensor& mean, const Tensor& rstd, const Tensor& w,
               const Tensor& d, const Tensor& gamma, const Tensor& beta, const Tensor& s, const Maybe& y,
               const Maybe& low) {
  constexpr const char* op = "gcahng::mlp_out_fwd_";
  const DeviceGuard guard = guarded(op, out, e1, mean, rstd, w, d, gamma, beta, s, y, low);
  const DType dtype = type_of(e1, op), low_type = low_type_of(out, dtype, op);
  const int64_t D = width_up_to(e1, kMaxDim, op), T = e1.numel() / D;
  check(cuda::launch_mlp_out_forward(
            dtype, low_type, data(out, T * D, low_type, op, "out"), data(e1, T * D, dtype, op, "e1"),
            data(mean, T, dtype, op, "mean"), data(rstd, T, dtype, op, "rstd"), data(w, D, dtype, op, "w"),
            data(d, D, dtype, op, "d"), data(gamma, D, dtype, op, "gamma"), data(beta, D, dtype, op, "beta"),
            data(s, T * D, dtype, op, "s"), data(y, T * D, dtype, op, "y"), data(low, T * D, low_type, op, "low"), T, D,
            current_stream(e1)),
        op);
}

void mlp_out_bwd(const Tensor& s, const Tensor& e1, const Tensor& dy, const Tensor& mean, const Tensor& rstd,
               const Tensor& w, const Tensor& d, const Tensor& gamma, const Tensor& ds, const Tensor& low,
               const Tensor& scaled, const Tensor& m1, const Tensor& m2, const Maybe& sums) {
  constexpr const char* op = "gcahng::mlp_out_bwd_";
  const DeviceGuard guard = guarded(op, s, e1, dy, mean, rstd, w, d, gamma, ds, low, scaled, m1, m2, sums);
  const DType dtype = type_of(e1, op), low_type = low_type_of(low, dtype, op);
  const int64_t D = width_up_to(e1, kMaxDim, op), T = e1.numel() / D;
  Scratch scratch(e1, dtype, sums ? cuda::mlp_out_backward_scratch(T, D) : 0);
  check(cuda::launch_mlp_out_backward(
            dtype, low_type, data(s, T * D, dtype, op, "s"), data(e1, T * D, dtype, op, "e1"),
            data(dy, T * D, dtype, op, "dy"), data(mean, T, dtype, op, "mean"), data(rstd, T, dtype, op, "rstd"),
            data(w, D, dtype, op, "w"), data(d, D, dtype, op, "d"), data(gamma, D, dtype, op, "gamma"),
            data(ds, T * D, dtype, op, "ds"), data(low, T * D, low_type, op, "low"),
            data(scaled, T * D, low_type, op, "scaled"), data(m1, T, dtype, op, "m1"), data(m2, T, dtype, op, "m2"),
            data(sums, 4 * D, dtype, op, "sums"), scratch.at, T, D, current_stream(e1)),
        op);
}

void head_moments(const Ints& tile_, const Tensor& e, const Tensor& sums) {
  constexpr const char* op = "gcahng::head_moments_";
  const DeviceGuard guard = guarded(op, e, sums);
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(e, op);
  const int64_t D = width_of(e), T = tile.rows();
  Scratch scratch(sums, DType::f64, cuda::head_scratch(T, D));
  check(cuda::launch_head_moments(dtype, tile, data(e, T * D, dtype, op, "e"),
                                  data(sums, 2 * D, DType::f64, op, "sums"), scratch.at, D, current_stream(e)),
        op);
}

void head_fwd(const Tensor& p, const Tensor& b, const Tensor& theta) {
  constexpr const char* op = "gcahng::head_fwd_";
  const DeviceGuard guard = guarded(op, p, b, theta);
  const DType dtype = type_of(b, op), low_type = low_type_of(p, dtype, op);
  const int64_t D = width_of(p), T = p.numel() / D;
  check(cuda::launch_head_forward(dtype, low_type, data(p, T * D, low_type, op, "p"), data(b, D, dtype, op, "b"),
                                  data(theta, T * D, dtype, op, "theta"), T, D, current_stream(p)),
        op);
}

void head_bwd(const Tensor& theta, const Tensor& dtheta, const Tensor& dpre, const Maybe& sum) {
  constexpr const char* op = "gcahng::head_bwd_";
  const DeviceGuard guard = guarded(op, theta, dtheta, dpre, sum);
  const DType dtype = type_of(theta, op), low_type = low_type_of(dpre, dtype, op);
  const int64_t D = width_of(theta), T = theta.numel() / D;
  Scratch scratch(theta, dtype, sum ? cuda::head_scratch(T, D) : 0);
  check(cuda::launch_head_backward(dtype, low_type, data(theta, T * D, dtype, op, "theta"),
                                   data(dtheta, T * D, dtype, op, "dtheta"), data(dpre, T * D, low_type, op, "dpre"),
                                   data(sum, D, dtype, op, "sum"), scratch.at, T, D, current_stream(theta)),
        op);
}

void head_sums(const Tensor& dy, const Tensor& e, const Tensor& wide, const Tensor& sums) {
  constexpr const char* op = "gcahng::head_sums_";
  const DeviceGuard guard = guarded(op, dy, e, wide, sums);
  const DType dtype = type_of(e, op), low_type = low_type_of(dy, dtype, op);
  const int64_t D = width_of(e), T = e.numel() / D;
  Scratch scratch(e, dtype, cuda::head_scratch(T, D));
  check(cuda::launch_head_sums(dtype, low_type, data(dy, T * D, low_type, op, "dy"), data(e, T * D, dtype, op, "e"),
                               data(wide, T * D, dtype, op, "wide"), data(sums, 2 * D, dtype, op, "sums"), scratch.at,
                               T, D, current_stream(e)),
        op);
}

void head_norm(const Ints& tile_, const Tensor& dy, const Tensor& e, const Tensor& scale, const Tensor& a,
               const Tensor& b, const Tensor& de) {
  constexpr const char* op = "gcahng::head_norm_";
  const DeviceGuard guard = guarded(op, dy, e, scale, a, b, de);
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(e, op);
  const int64_t D = width_of(e), T = tile.rows();
  check(cuda::launch_head_norm(dtype, tile, data(dy, T * D, dtype, op, "dy"), data(e, T * D, dtype, op, "e"),
                               data(scale, D, dtype, op, "scale"), data(a, D, dtype, op, "a"),
                               data(b, D, dtype, op, "b"), data(de, T * D, dtype, op, "de"), D, current_stream(e)),
        op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("norm_gelu_", TORCH_BOX(&norm_gelu));
  m.impl("mlp_in_fwd_", TORCH_BOX(&mlp_in_fwd));
  m.impl("mlp_in_bwd_", TORCH_BOX(&mlp_in_bwd));
  m.impl("mlp_out_fwd_", TORCH_BOX(&mlp_out_fwd));
  m.impl("mlp_out_bwd_", TORCH_BOX(&mlp_out_bwd));
  m.impl("head_moments_", TORCH_BOX(&head_moments));
  m.impl("head_fwd_", TORCH_BOX(&head_fwd));
  m.impl("head_bwd_", TORCH_BOX(&head_bwd));
  m.impl("head_sums_", TORCH_BOX(&head_sums));
  m.impl("head_norm_", TORCH_BOX(&head_norm));
}
