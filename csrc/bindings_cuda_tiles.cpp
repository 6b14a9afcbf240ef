// The CUDA implementations of the engine's stages that know the tile (gcahng/ops/_stages.py declares them). Results are
// written into tensors that the engine owns; partial sums live in scratch of torch's allocator, on its stream.
#include "bindings_cuda.h"
#include "bindings_stages.h"
#include "edge_start.h"
#include "edge_to_node.h"
#include "gate.h"
#include "mix.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;

void edge_start_fwd(const Ints& tile_, const Tensor& x, const Maybe& e, const Maybe& low) {
  constexpr const char* op = "gcahng::edge_start_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, x, e, low);
  const DType dtype = type_of(x, op), low_type = low_type_of(low, dtype, op);
  const int64_t D = width_of(x), T = tile.rows();
  check(cuda::launch_edge_start_forward(dtype, low_type, tile, nodes(x, tile, D, dtype, op, "x"),
                                     data(e, T * D, dtype, op, "e"), data(low, T * D, low_type, op, "low"), D,
                                     current_stream(x)),
        op);
}

void edge_start_bwd(const Ints& tile_, const Tensor& x, const Tensor& de, const Tensor& dx) {
  constexpr const char* op = "gcahng::edge_start_bwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, x, de, dx);
  const DType dtype = type_of(de, op);
  const int64_t D = width_of(de);
  const Scratch scratch(de, dtype, cuda::edge_start_backward_scratch(tile, D));
  check(cuda::launch_edge_start_backward(dtype, tile, nodes(x, tile, D, dtype, op, "x"),
                                              data(de, tile.rows() * D, dtype, op, "de"),
                                              nodes(dx, tile, D, dtype, op, "dx"), scratch.at, D, current_stream(de)),
        op);
}

void edge_to_node_fwd(const Ints& tile_, const Tensor& p, const Tensor& b, const Tensor& sum) {
  constexpr const char* op = "gcahng::edge_to_node_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, p, b, sum);
  const DType dtype = type_of(b, op), low_type = low_type_of(p, dtype, op);
  const int64_t D = width_of(p), T = tile.rows();
  const Scratch scratch(b, dtype, cuda::edge_to_node_forward_scratch(tile, D));
  check(cuda::launch_edge_to_node_forward(dtype, low_type, tile, data(p, T * D, low_type, op, "p"),
                                          data(b, D, dtype, op, "b"), nodes(sum, tile, D, dtype, op, "sum"), scratch.at,
                                          D, current_stream(p)),
        op);
}

void edge_to_node_bwd(const Ints& tile_, const Tensor& p, const Tensor& b, const Tensor& ds, const Tensor& dp,
                      const Maybe& db) {
  constexpr const char* op = "gcahng::edge_to_node_bwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, p, b, ds, dp, db);
  const DType dtype = type_of(b, op), low_type = low_type_of(p, dtype, op);
  const int64_t D = width_of(p), T = tile.rows();
  const Scratch scratch(b, dtype, db ? cuda::edge_to_node_backward_scratch(tile, D) : 0);
  check(cuda::launch_edge_to_node_backward(dtype, low_type, tile, data(p, T * D, low_type, op, "p"),
                                           data(b, D, dtype, op, "b"), nodes(ds, tile, D, dtype, op, "ds"),
                                           data(dp, T * D, low_type, op, "dp"), data(db, D, dtype, op, "db"),
                                           scratch.at, D, current_stream(p)),
        op);
}

// draw stays on the device.
Dropout dropout_of(const Ints& d, double scale, const char* op) {
  STD_TORCH_CHECK(d.size() == 4, op, ": dropout is (seed, layer, threshold, tied)");
  return {static_cast<uint64_t>(d[0]), static_cast<uint32_t>(d[1]), 0, static_cast<uint32_t>(d[2]), scale, d[3] != 0};
}

int64_t gate_width(const Tensor& e, const char* op) {
  constexpr int64_t kMost = 1024;
  const int64_t D = width_of(e);
  STD_TORCH_CHECK(D <= kMost, op, ": ", D, " channels; the kernels take 1 to ", kMost);
  return D;
}

GateTokens tokens_of(const Tile& tile, const Tensor& u, const Tensor& c, const Tensor& v, int64_t D, DType dtype,
                     const char* op) {
  return {nodes(u, tile, D, dtype, op, "u"), nodes(c, tile, 1, dtype, op, "c"), nodes(v, tile, D, dtype, op, "v")};
}

void gate_fwd(const Ints& tile_, const Ints& dropout_, double scale, const Tensor& draw, const Tensor& u,
              const Tensor& c, const Tensor& v, const Tensor& gamma, const Tensor& beta, const Tensor& e,
              const Tensor& e1, const Maybe& low, const Tensor& p, const Tensor& q) {
  constexpr const char* op = "gcahng::gate_fwd_";
  const Tile tile = tile_of(tile_, op);
  const Dropout dropout = dropout_of(dropout_, scale, op);
  const DeviceGuard guard = guarded(op, e, draw, u, c, v, gamma, beta, e1, low, p, q);
  const DType dtype = type_of(e, op), low_type = low_type_of(low, dtype, op);
  const int64_t D = gate_width(e, op), T = tile.rows();
  check(cuda::launch_gate_forward(dtype, low_type, tile, dropout, indices(draw, 1, op, "draw"),
                                  tokens_of(tile, u, c, v, D, dtype, op), data(gamma, D, dtype, op, "gamma"),
                                  data(beta, D, dtype, op, "beta"), data(e, T * D, dtype, op, "e"),
                                  data(e1, T * D, dtype, op, "e1"), data(low, T * D, low_type, op, "low"),
                                  {data(p, T, dtype, op, "p"), data(q, T, dtype, op, "q")}, D, current_stream(e)),
        op);
}

void gate_bwd(const Ints& tile_, const Ints& dropout_, double scale, const Tensor& draw, const Tensor& u,
              const Tensor& c, const Tensor& v, const Tensor& gamma, const Tensor& e, const Tensor& de1,
              const Tensor& p, const Tensor& q, const Maybe& de, const Maybe& du, const Maybe& dc, const Maybe& dv,
              const Maybe& dgamma, const Maybe& dbeta) {
  constexpr const char* op = "gcahng::gate_bwd_";
  const Tile tile = tile_of(tile_, op);
  const Dropout dropout = dropout_of(dropout_, scale, op);
  const DeviceGuard guard = guarded(op, e, draw, u, c, v, gamma, de1, p, q, de, du, dc, dv, dgamma, dbeta);
  const DType dtype = type_of(e, op);
  const int64_t D = gate_width(e, op), T = tile.rows();
  const int64_t wanted = du.has_value() + dc.has_value() + dv.has_value() + dgamma.has_value() + dbeta.has_value();
  STD_TORCH_CHECK(wanted == 0 || wanted == 5, op, ": du, dc, dv, dgamma and dbeta are given together");
  cuda::GateGradients into{};
  if (wanted)
    into = {nodes(*du, tile, D, dtype, op, "du"), nodes(*dc, tile, 1, dtype, op, "dc"),
            nodes(*dv, tile, D, dtype, op, "dv"), data(dgamma, D, dtype, op, "dgamma"),
            data(dbeta, D, dtype, op, "dbeta")};
  const Scratch scratch(e, dtype, wanted ? cuda::gate_backward_scratch(tile, D) : 0);
  check(cuda::launch_gate_backward(dtype, tile, dropout, indices(draw, 1, op, "draw"),
                                   tokens_of(tile, u, c, v, D, dtype, op), data(gamma, D, dtype, op, "gamma"),
                                   data(e, T * D, dtype, op, "e"), data(de1, T * D, dtype, op, "de1"),
                                   {data(p, T, dtype, op, "p"), data(q, T, dtype, op, "q")},
                                   data(de, T * D, dtype, op, "de"), into, scratch.at, D, current_stream(e)),
        op);
}

int64_t mixes_of(const Tile& tile) { return tile.A * tile.K * (2 * tile.O - tile.mirrored); }

MixInputs mix_inputs(const Tile& tile, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
                     DType dtype, const char* op) {
  return {nodes(z, tile, width_of(z), dtype, op, "z"), nodes(d_plus, tile, 1, dtype, op, "d_plus"),
          data(kappa, tile.K * tile.K, dtype, op, "kappa"), data(pull, 1, dtype, op, "pull")};
}

void mix_fwd(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
             const Tensor& theta, const Maybe& negatives, const Maybe& logits, const Maybe& squares) {
  constexpr const char* op = "gcahng::mix_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, z, d_plus, kappa, pull, theta, negatives, logits, squares);
  const DType dtype = type_of(z, op);
  const int64_t D = width_of(z), count = mixes_of(tile);
  STD_TORCH_CHECK(logits.has_value() == squares.has_value(), op, ": logits and squares are given together");
  check(cuda::launch_mix_forward(
            dtype, tile, mix_inputs(tile, z, d_plus, kappa, pull, dtype, op),
            data(theta, tile.rows() * D, dtype, op, "theta"), data(negatives, count * D, dtype, op, "negatives"),
            data(logits, count, dtype, op, "logits"), data(squares, count, dtype, op, "squares"), D, current_stream(z)),
        op);
}

void mix_bwd_theta(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
                   const Tensor& dn, const Tensor& dtheta) {
  constexpr const char* op = "gcahng::mix_bwd_theta_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, z, d_plus, kappa, pull, dn, dtheta);
  const DType dtype = type_of(z, op);
  const int64_t D = width_of(z);
  check(cuda::launch_mix_backward_theta(dtype, tile, mix_inputs(tile, z, d_plus, kappa, pull, dtype, op),
                                        data(dn, mixes_of(tile) * D, dtype, op, "dn"),
                                        data(dtheta, tile.rows() * D, dtype, op, "dtheta"), D, current_stream(z)),
        op);
}

void mix_bwd_z(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
               const Tensor& theta, const Tensor& dlogits, double square, const Tensor& dz, const Tensor& d_d_plus) {
  constexpr const char* op = "gcahng::mix_bwd_z_";
  const Tile tile = tile_of(tile_, op);
  const DeviceGuard guard = guarded(op, z, d_plus, kappa, pull, theta, dlogits, dz, d_d_plus);
  const DType dtype = type_of(z, op);
  const int64_t D = width_of(z);
  const Scratch scratch(z, dtype, cuda::mix_backward_z_scratch(tile, D));
  check(cuda::launch_mix_backward_z(dtype, tile, mix_inputs(tile, z, d_plus, kappa, pull, dtype, op),
                                    data(theta, tile.rows() * D, dtype, op, "theta"),
                                    data(dlogits, mixes_of(tile), dtype, op, "dlogits"), square,
                                    nodes(dz, tile, D, dtype, op, "dz"),
                                    nodes(d_d_plus, tile, 1, dtype, op, "d_d_plus"), scratch.at, D, current_stream(z)),
        op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("edge_start_fwd_", TORCH_BOX(&edge_start_fwd));
  m.impl("edge_start_bwd_", TORCH_BOX(&edge_start_bwd));
  m.impl("edge_to_node_fwd_", TORCH_BOX(&edge_to_node_fwd));
  m.impl("edge_to_node_bwd_", TORCH_BOX(&edge_to_node_bwd));
  m.impl("gate_fwd_", TORCH_BOX(&gate_fwd));
  m.impl("gate_bwd_", TORCH_BOX(&gate_bwd));
  m.impl("mix_fwd_", TORCH_BOX(&mix_fwd));
  m.impl("mix_bwd_theta_", TORCH_BOX(&mix_bwd_theta));
  m.impl("mix_bwd_z_", TORCH_BOX(&mix_bwd_z));
}
