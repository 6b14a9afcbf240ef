// The CPU implementations of the engine's stages (gcahng/ops/_stages.py declares them). Results are written into
// tensors that the engine owns and reuses; sums are formed unit by unit and added up in order, whatever the number of
// threads.
#include <algorithm>

#include "bindings_sums.h"
#include "mlp_out.h"
#include "cpu/dispatch.h"
#include "edge_start.h"
#include "edge_to_node.h"
#include "gate.h"
#include "head.h"
#include "mlp_in.h"
#include "mix.h"
#include "norm_gelu.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;
using torch::stable::parallel_for;

constexpr int64_t kBlock = 32;  // rows whose sums are formed together

int64_t grain(int64_t values) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, values)); }
int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

DType type_of(const Tensor& tensor, const char* op) { return dtype_of(tensor, op, false); }

void norm_gelu(const Tensor& t, const Tensor& gamma, const Tensor& beta, const Maybe& y, const Maybe& low) {
  constexpr const char* op = "gcahng::norm_gelu_";
  const DType dtype = type_of(t, op), low_type = low ? type_of(*low, op) : dtype;
  const int64_t D = width_of(t), T = t.numel() / D;
  const void *pt = data(t, T * D, dtype, op, "t"), *pg = data(gamma, D, dtype, op, "gamma"),
             *pb = data(beta, D, dtype, op, "beta");
  void *py = data(y, T * D, dtype, op, "y"), *pl = data(low, T * D, low_type, op, "low");
  const auto& stem = GCAHNG_CPU(norm_gelu);
  parallel_for(0, T, grain(4 * D), [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, low_type, pt, pg, pb, py, pl, begin, end, D);
  });
}

void edge_start_fwd(const Ints& tile_, const Tensor& x, const Maybe& e, const Maybe& low) {
  constexpr const char* op = "gcahng::edge_start_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(x, op), low_type = low ? type_of(*low, op) : dtype;
  const int64_t D = width_of(x), T = tile.rows();
  const void* px = nodes(x, tile, D, dtype, op, "x");
  void *pe = data(e, T * D, dtype, op, "e"), *pl = data(low, T * D, low_type, op, "low");
  const auto& stem = GCAHNG_CPU(edge_start);
  parallel_for(0, tile.units(), 1,
               [=, &stem](int64_t begin, int64_t end) { stem.forward(dtype, low_type, tile, px, pe, pl, begin, end, D); });
}

void edge_start_bwd(const Ints& tile_, const Tensor& x, const Tensor& de, const Tensor& dx) {
  constexpr const char* op = "gcahng::edge_start_bwd_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = sum_type_of(de, op);
  const int64_t D = width_of(de), rows = tile.units() * tile.K * D, columns = tile.A * tile.O * tile.K * D;
  const void *px = nodes(x, tile, D, dtype, op, "x"), *pe = data(de, tile.rows() * D, dtype, op, "de");
  void* into = nodes(dx, tile, D, dtype, op, "dx");
  Scratch scratch(de, dtype, rows + columns);
  void *row = scratch.take(rows), *column = scratch.take(columns);
  const auto& stem = GCAHNG_CPU(edge_start);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward(dtype, tile, px, pe, row, column, begin, end, D);
  });
  add_nodes(dtype, tile, row, column, 0, into, D);
}

Dropout dropout_of(const Ints& d, double scale, const Tensor& draw) {
  STD_TORCH_CHECK(d.size() == 4, "gcahng::gate_: dropout is (seed, layer, threshold, tied)");
  return {static_cast<uint64_t>(d[0]),
          static_cast<uint32_t>(d[1]),
          static_cast<uint32_t>(*static_cast<const int64_t*>(draw.const_data_ptr())),
          static_cast<uint32_t>(d[2]),
          scale,
          d[3] != 0};
}

void gate_fwd(const Ints& tile_, const Ints& dropout_, double scale, const Tensor& draw, const Tensor& u,
              const Tensor& c, const Tensor& v, const Tensor& gamma, const Tensor& beta, const Tensor& e,
              const Tensor& e1, const Maybe& low, const Tensor& p, const Tensor& q) {
  constexpr const char* op = "gcahng::gate_fwd_";
  const Tile tile = tile_of(tile_, op);
  const Dropout dropout = dropout_of(dropout_, scale, draw);
  const DType dtype = type_of(e, op), low_type = low ? type_of(*low, op) : dtype;
  const int64_t D = width_of(e), T = tile.rows();
  const GateTokens tokens{nodes(u, tile, D, dtype, op, "u"), nodes(c, tile, 1, dtype, op, "c"),
                          nodes(v, tile, D, dtype, op, "v")};
  const void *pg = data(gamma, D, dtype, op, "gamma"), *pb = data(beta, D, dtype, op, "beta"),
             *pe = data(e, T * D, dtype, op, "e");
  void *p1 = data(e1, T * D, dtype, op, "e1"), *pl = data(low, T * D, low_type, op, "low");
  const GateSaved saved{data(p, T, dtype, op, "p"), data(q, T, dtype, op, "q")};
  const auto& stem = GCAHNG_CPU(gate);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, low_type, tile, dropout, tokens, pg, pb, pe, p1, pl, saved, begin, end, D);
  });
}

void gate_bwd(const Ints& tile_, const Ints& dropout_, double scale, const Tensor& draw, const Tensor& u,
              const Tensor& c, const Tensor& v, const Tensor& gamma, const Tensor& e, const Tensor& de1,
              const Tensor& p, const Tensor& q, const Maybe& de, const Maybe& du, const Maybe& dc, const Maybe& dv,
              const Maybe& dgamma, const Maybe& dbeta) {
  constexpr const char* op = "gcahng::gate_bwd_";
  const Tile tile = tile_of(tile_, op);
  const Dropout dropout = dropout_of(dropout_, scale, draw);
  const DType dtype = type_of(e, op);
  const int64_t D = width_of(e), T = tile.rows(), units = tile.units(), K = tile.K, columns = tile.A * tile.O * K;
  const GateTokens tokens{nodes(u, tile, D, dtype, op, "u"), nodes(c, tile, 1, dtype, op, "c"),
                          nodes(v, tile, D, dtype, op, "v")};
  const void *pg = data(gamma, D, dtype, op, "gamma"), *pe = data(e, T * D, dtype, op, "e"),
             *p1 = data(de1, T * D, dtype, op, "de1");
  void* pd = data(de, T * D, dtype, op, "de");
  const GateSaved saved{data(p, T, dtype, op, "p"), data(q, T, dtype, op, "q")};
  const bool summed = du.has_value();
  GateSums sums{};
  const int64_t values = summed ? units * K * (2 * D + 1) + columns * (2 * D + 1) + 2 * units * D : 1;
  Scratch scratch(e, dtype, values);
  if (summed) {
    sums.row_u = scratch.take(units * K * D);
    sums.row_v = scratch.take(units * K * D);
    sums.row_c = scratch.take(units * K);
    sums.column_u = scratch.take(columns * D);
    sums.column_v = scratch.take(columns * D);
    sums.column_c = scratch.take(columns);
    sums.dgamma = scratch.take(units * D);
    sums.dbeta = scratch.take(units * D);
  }
  const auto& stem = GCAHNG_CPU(gate);
  parallel_for(0, units, 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward(dtype, tile, dropout, tokens, pg, pe, p1, saved, pd, sums, begin, end, D);
  });
  if (!summed) return;
  add_nodes(dtype, tile, sums.row_u, sums.column_u, 0, nodes(*du, tile, D, dtype, op, "du"), D);
  add_nodes(dtype, tile, sums.row_v, sums.column_v, 0, nodes(*dv, tile, D, dtype, op, "dv"), D);
  add_nodes(dtype, tile, sums.row_c, sums.column_c, 0, nodes(*dc, tile, 1, dtype, op, "dc"), 1);
  add_blocks(dtype, sums.dgamma, units, data(*dgamma, D, dtype, op, "dgamma"), D);
  add_blocks(dtype, sums.dbeta, units, data(*dbeta, D, dtype, op, "dbeta"), D);
}

void mlp_in_fwd(const Tensor& h, const Tensor& b, const Tensor& g, const Tensor& mean, const Tensor& rstd) {
  constexpr const char* op = "gcahng::mlp_in_fwd_";
  const DType dtype = type_of(b, op), low_type = type_of(h, op);
  const int64_t W = width_of(h), T = h.numel() / W;
  const void *ph = data(h, T * W, low_type, op, "h"), *pb = data(b, W, dtype, op, "b");
  void *pg = data(g, T * W, low_type, op, "g"), *pm = data(mean, T, dtype, op, "mean"),
       *pr = data(rstd, T, dtype, op, "rstd");
  const auto& stem = GCAHNG_CPU(mlp_in);
  parallel_for(0, T, grain(4 * W), [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, low_type, ph, pb, pg, pm, pr, begin, end, W);
  });
}

void mlp_in_bwd(const Tensor& h, const Tensor& b, const Tensor& dn, const Tensor& mean, const Tensor& rstd,
                const Tensor& m1, const Tensor& m2, const Tensor& g, const Tensor& dh, const Maybe& db) {
  constexpr const char* op = "gcahng::mlp_in_bwd_";
  const DType dtype = type_of(b, op), low_type = type_of(h, op);
  const int64_t W = width_of(h), T = h.numel() / W, blocks = blocks_of(T);
  const void *ph = data(h, T * W, low_type, op, "h"), *pb = data(b, W, dtype, op, "b"),
             *pn = data(dn, T * W, low_type, op, "dn"), *pm = data(mean, T, dtype, op, "mean"),
             *pr = data(rstd, T, dtype, op, "rstd"), *p1 = data(m1, T, dtype, op, "m1"),
             *p2 = data(m2, T, dtype, op, "m2");
  void *pg = data(g, T * W, low_type, op, "g"), *pd = data(dh, T * W, low_type, op, "dh");
  Scratch scratch(b, dtype, db ? blocks * W : 1);
  void* part = db ? scratch.take(blocks * W) : nullptr;
  const auto& stem = GCAHNG_CPU(mlp_in);
  parallel_for(0, blocks, 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward(dtype, low_type, ph, pb, pn, pm, pr, p1, p2, pg, pd, part, begin, end, kBlock, T, W);
  });
  if (db) add_blocks(dtype, part, blocks, data(*db, W, dtype, op, "db"), W);
}

void mlp_out_fwd(const Tensor& out, const Tensor& e1, const Tensor& mean, const Tensor& rstd, const Tensor& w,
               const Tensor& d, const Tensor& gamma, const Tensor& beta, const Tensor& s, const Maybe& y,
               const Maybe& low) {
  constexpr const char* op = "gcahng::mlp_out_fwd_";
  const DType dtype = type_of(e1, op), low_type = type_of(out, op);
  const int64_t D = width_of(e1), T = e1.numel() / D;
  const void *po = data(out, T * D, low_type, op, "out"), *pe = data(e1, T * D, dtype, op, "e1"),
             *pm = data(mean, T, dtype, op, "mean"), *pr = data(rstd, T, dtype, op, "rstd"),
             *pw = data(w, D, dtype, op, "w"), *pd = data(d, D, dtype, op, "d"),
             *pg = data(gamma, D, dtype, op, "gamma"), *pb = data(beta, D, dtype, op, "beta");
  void *ps = data(s, T * D, dtype, op, "s"), *py = data(y, T * D, dtype, op, "y"),
       *pl = data(low, T * D, low_type, op, "low");
  const auto& stem = GCAHNG_CPU(mlp_out);
  parallel_for(0, T, grain(4 * D), [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, low_type, po, pe, pm, pr, pw, pd, pg, pb, ps, py, pl, begin, end, D);
  });
}

void mlp_out_bwd(const Tensor& s, const Tensor& e1, const Tensor& dy, const Tensor& mean, const Tensor& rstd,
               const Tensor& w, const Tensor& d, const Tensor& gamma, const Tensor& ds, const Tensor& low,
               const Tensor& scaled, const Tensor& m1, const Tensor& m2, const Maybe& sums) {
  constexpr const char* op = "gcahng::mlp_out_bwd_";
  const DType dtype = type_of(e1, op), low_type = type_of(low, op);
  const int64_t D = width_of(e1), T = e1.numel() / D, blocks = blocks_of(T);
  const void *ps = data(s, T * D, dtype, op, "s"), *pe = data(e1, T * D, dtype, op, "e1"),
             *py = data(dy, T * D, dtype, op, "dy"), *pm = data(mean, T, dtype, op, "mean"),
             *pr = data(rstd, T, dtype, op, "rstd"), *pw = data(w, D, dtype, op, "w"), *pd = data(d, D, dtype, op, "d"),
             *pg = data(gamma, D, dtype, op, "gamma");
  void *po = data(ds, T * D, dtype, op, "ds"), *pl = data(low, T * D, low_type, op, "low"),
       *pc = data(scaled, T * D, low_type, op, "scaled"), *p1 = data(m1, T, dtype, op, "m1"),
       *p2 = data(m2, T, dtype, op, "m2");
  if (pl == po) pl = nullptr;  // of one type: ds itself is the operand
  Scratch scratch(e1, dtype, sums ? 4 * blocks * D : 1);
  void* part = sums ? scratch.take(4 * blocks * D) : nullptr;
  const auto& stem = GCAHNG_CPU(mlp_out);
  parallel_for(0, blocks, 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward(dtype, low_type, ps, pe, py, pm, pr, pw, pd, pg, po, pl, pc, p1, p2, part, begin, end, kBlock, blocks,
                  T, D);
  });
  if (!sums) return;
  char* into = static_cast<char*>(data(*sums, 4 * D, dtype, op, "sums"));
  for (int64_t k = 0; k < 4; ++k)
    add_blocks(dtype, static_cast<char*>(part) + k * blocks * D * scratch.size, blocks, into + k * D * scratch.size, D);
}

void edge_to_node_fwd(const Ints& tile_, const Tensor& p, const Tensor& b, const Tensor& sum) {
  constexpr const char* op = "gcahng::edge_to_node_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(b, op), low_type = type_of(p, op);
  const int64_t D = width_of(p), T = tile.rows(), rows = tile.units() * tile.K * D,
                columns = tile.A * tile.O * tile.K * D;
  const void *pp = data(p, T * D, low_type, op, "p"), *pb = data(b, D, dtype, op, "b");
  void* into = nodes(sum, tile, D, dtype, op, "sum");
  Scratch scratch(b, dtype, rows + columns);
  void *row = scratch.take(rows), *column = scratch.take(columns);
  const auto& stem = GCAHNG_CPU(edge_to_node);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, low_type, tile, pp, pb, row, column, begin, end, D);
  });
  add_nodes(dtype, tile, row, column, tile.mirrored, into, D);
}

void edge_to_node_bwd(const Ints& tile_, const Tensor& p, const Tensor& b, const Tensor& ds, const Tensor& dp,
                      const Maybe& db) {
  constexpr const char* op = "gcahng::edge_to_node_bwd_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(b, op), low_type = type_of(p, op);
  const int64_t D = width_of(p), T = tile.rows(), units = tile.units();
  const void *pp = data(p, T * D, low_type, op, "p"), *pb = data(b, D, dtype, op, "b"),
             *ps = nodes(ds, tile, D, dtype, op, "ds");
  void* pd = data(dp, T * D, low_type, op, "dp");
  Scratch scratch(b, dtype, db ? units * D : 1);
  void* part = db ? scratch.take(units * D) : nullptr;
  const auto& stem = GCAHNG_CPU(edge_to_node);
  parallel_for(0, units, 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward(dtype, low_type, tile, pp, pb, ps, pd, part, begin, end, D);
  });
  if (db) add_blocks(dtype, part, units, data(*db, D, dtype, op, "db"), D);
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
  const DType dtype = type_of(z, op);
  const int64_t D = width_of(z), count = mixes_of(tile);
  const MixInputs in = mix_inputs(tile, z, d_plus, kappa, pull, dtype, op);
  const void* pt = data(theta, tile.rows() * D, dtype, op, "theta");
  void *pn = data(negatives, count * D, dtype, op, "negatives"), *pl = data(logits, count, dtype, op, "logits"),
       *ps = data(squares, count, dtype, op, "squares");
  STD_TORCH_CHECK(!pl == !ps, op, ": logits and squares are given together");
  const auto& stem = GCAHNG_CPU(mix);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, tile, in, pt, pn, pl, ps, begin, end, D);
  });
}

void mix_bwd_theta(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
                   const Tensor& dn, const Tensor& dtheta) {
  constexpr const char* op = "gcahng::mix_bwd_theta_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(z, op);
  const int64_t D = width_of(z);
  const MixInputs in = mix_inputs(tile, z, d_plus, kappa, pull, dtype, op);
  const void* pn = data(dn, mixes_of(tile) * D, dtype, op, "dn");
  void* pt = data(dtheta, tile.rows() * D, dtype, op, "dtheta");
  const auto& stem = GCAHNG_CPU(mix);
  parallel_for(0, tile.units(), 1,
               [=, &stem](int64_t begin, int64_t end) { stem.backward_theta(dtype, tile, in, pn, pt, begin, end, D); });
}

void mix_bwd_z(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
               const Tensor& theta, const Tensor& dlogits, double square, const Tensor& dz, const Tensor& d_d_plus) {
  constexpr const char* op = "gcahng::mix_bwd_z_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(z, op);
  const int64_t D = width_of(z), K = tile.K, rows = tile.units() * K, columns = tile.A * tile.O * K;
  const MixInputs in = mix_inputs(tile, z, d_plus, kappa, pull, dtype, op);
  const void *pt = data(theta, tile.rows() * D, dtype, op, "theta"),
             *pg = data(dlogits, mixes_of(tile), dtype, op, "dlogits");
  void *into_z = nodes(dz, tile, D, dtype, op, "dz"), *into_d = nodes(d_d_plus, tile, 1, dtype, op, "d_d_plus");
  Scratch scratch(z, dtype, (rows + columns) * (D + 1));
  const MixSums sums{scratch.take(rows * D), scratch.take(rows), scratch.take(columns * D), scratch.take(columns)};
  const auto& stem = GCAHNG_CPU(mix);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward_z(dtype, tile, in, pt, pg, square, sums, begin, end, D);
  });
  add_nodes(dtype, tile, sums.row_z, sums.column_z, 0, into_z, D);
  add_nodes(dtype, tile, sums.row_d, sums.column_d, 0, into_d, 1);
}

void head_moments(const Ints& tile_, const Tensor& e, const Tensor& sums) {
  constexpr const char* op = "gcahng::head_moments_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(e, op);
  const int64_t D = width_of(e), units = tile.units();
  const void* pe = data(e, tile.rows() * D, dtype, op, "e");
  double* into = static_cast<double*>(data(sums, 2 * D, DType::f64, op, "sums"));
  Scratch scratch(sums, DType::f64, 2 * units * D);
  double* part = static_cast<double*>(scratch.take(2 * units * D));
  const auto& stem = GCAHNG_CPU(head);
  parallel_for(0, units, 1,
               [=, &stem](int64_t begin, int64_t end) { stem.moments(dtype, tile, pe, part, begin, end, D); });
  add_in_order(part, units, D, into, D);
  add_in_order(part + units * D, units, D, into + D, D);
}

void head_fwd(const Tensor& p, const Tensor& b, const Tensor& theta) {
  constexpr const char* op = "gcahng::head_fwd_";
  const DType dtype = type_of(b, op), low_type = type_of(p, op);
  const int64_t D = width_of(p), T = p.numel() / D;
  const void *pp = data(p, T * D, low_type, op, "p"), *pb = data(b, D, dtype, op, "b");
  void* pt = data(theta, T * D, dtype, op, "theta");
  const auto& stem = GCAHNG_CPU(head);
  parallel_for(0, T, grain(2 * D),
               [=, &stem](int64_t begin, int64_t end) { stem.forward(dtype, low_type, pp, pb, pt, begin, end, D); });
}

void head_bwd(const Tensor& theta, const Tensor& dtheta, const Tensor& dpre, const Maybe& sum) {
  constexpr const char* op = "gcahng::head_bwd_";
  const DType dtype = type_of(theta, op), low_type = type_of(dpre, op);
  const int64_t D = width_of(theta), T = theta.numel() / D, blocks = blocks_of(T);
  const void *pt = data(theta, T * D, dtype, op, "theta"), *pg = data(dtheta, T * D, dtype, op, "dtheta");
  void* pp = data(dpre, T * D, low_type, op, "dpre");
  Scratch scratch(theta, dtype, sum ? blocks * D : 1);
  void* part = sum ? scratch.take(blocks * D) : nullptr;
  const auto& stem = GCAHNG_CPU(head);
  parallel_for(0, blocks, 1, [=, &stem](int64_t begin, int64_t end) {
    stem.backward(dtype, low_type, pt, pg, pp, part, begin, end, kBlock, T, D);
  });
  if (sum) add_blocks(dtype, part, blocks, data(*sum, D, dtype, op, "sum"), D);
}

void head_sums(const Tensor& dy, const Tensor& e, const Tensor& wide, const Tensor& sums) {
  constexpr const char* op = "gcahng::head_sums_";
  const DType dtype = type_of(e, op), low_type = type_of(dy, op);
  const int64_t D = width_of(e), T = e.numel() / D, blocks = blocks_of(T);
  const void *pg = data(dy, T * D, low_type, op, "dy"), *pe = data(e, T * D, dtype, op, "e");
  void* pw = data(wide, T * D, dtype, op, "wide");
  Scratch scratch(e, dtype, 2 * blocks * D);
  void* part = scratch.take(2 * blocks * D);
  const auto& stem = GCAHNG_CPU(head);
  parallel_for(0, blocks, 1, [=, &stem](int64_t begin, int64_t end) {
    stem.sums(dtype, low_type, pg, pe, pw, part, begin, end, kBlock, blocks, T, D);
  });
  char* into = static_cast<char*>(data(sums, 2 * D, dtype, op, "sums"));
  for (int64_t k = 0; k < 2; ++k)
    add_blocks(dtype, static_cast<char*>(part) + k * blocks * D * scratch.size, blocks, into + k * D * scratch.size, D);
}

void head_norm(const Ints& tile_, const Tensor& dy, const Tensor& e, const Tensor& scale, const Tensor& a,
               const Tensor& b, const Tensor& de) {
  constexpr const char* op = "gcahng::head_norm_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = type_of(e, op);
  const int64_t D = width_of(e), T = tile.rows();
  const void *pg = data(dy, T * D, dtype, op, "dy"), *pe = data(e, T * D, dtype, op, "e"),
             *ps = data(scale, D, dtype, op, "scale"), *pa = data(a, D, dtype, op, "a"),
             *pb = data(b, D, dtype, op, "b");
  void* pd = data(de, T * D, dtype, op, "de");
  const auto& stem = GCAHNG_CPU(head);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.norm(dtype, tile, pg, pe, ps, pa, pb, pd, begin, end, D);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("norm_gelu_", TORCH_BOX(&norm_gelu));
  m.impl("edge_start_fwd_", TORCH_BOX(&edge_start_fwd));
  m.impl("edge_start_bwd_", TORCH_BOX(&edge_start_bwd));
  m.impl("gate_fwd_", TORCH_BOX(&gate_fwd));
  m.impl("gate_bwd_", TORCH_BOX(&gate_bwd));
  m.impl("mlp_in_fwd_", TORCH_BOX(&mlp_in_fwd));
  m.impl("mlp_in_bwd_", TORCH_BOX(&mlp_in_bwd));
  m.impl("mlp_out_fwd_", TORCH_BOX(&mlp_out_fwd));
  m.impl("mlp_out_bwd_", TORCH_BOX(&mlp_out_bwd));
  m.impl("edge_to_node_fwd_", TORCH_BOX(&edge_to_node_fwd));
  m.impl("edge_to_node_bwd_", TORCH_BOX(&edge_to_node_bwd));
  m.impl("mix_fwd_", TORCH_BOX(&mix_fwd));
  m.impl("mix_bwd_theta_", TORCH_BOX(&mix_bwd_theta));
  m.impl("mix_bwd_z_", TORCH_BOX(&mix_bwd_z));
  m.impl("head_moments_", TORCH_BOX(&head_moments));
  m.impl("head_fwd_", TORCH_BOX(&head_fwd));
  m.impl("head_bwd_", TORCH_BOX(&head_bwd));
  m.impl("head_sums_", TORCH_BOX(&head_sums));
  m.impl("head_norm_", TORCH_BOX(&head_norm));
}
