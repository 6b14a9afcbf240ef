// The CPU implementations of the stages that form the generator's losses (gcahng/ops/_stages.py declares them).
#include "bindings_sums.h"
#include "cpu/dispatch.h"
#include "cross_entropy.h"
#include "diversity.h"
#include "similarity.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;

constexpr int64_t kValuesAtOnce = 16384;  // that a thread takes

void cross_entropy(const Tensor& logits, const Tensor& bias, const Tensor& labels, double scale, const Tensor& loss,
                   const Maybe& d) {
  constexpr const char* op = "gcahng::cross_entropy_";
  const DType dtype = dtype_of(bias, op, false), low_type = dtype_of(logits, op, false);
  const int64_t M = width_of(logits), R = logits.numel() / M;
  const void *pl = data(logits, R * M, low_type, op, "logits"), *pb = data(bias, M, dtype, op, "bias");
  const int64_t* pc = indices(labels, R, op, "labels");
  void *po = data(loss, R, dtype, op, "loss"), *pd = data(d, R * M, low_type, op, "d");
  const auto& stem = GCAHNG_CPU(cross_entropy);
  parallel_for(0, R, std::max<int64_t>(1, kValuesAtOnce / M), [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, low_type, pl, pb, pc, scale, po, pd, begin, end, M);
  });
}

void similarity(const Tensor& anchors, const Tensor& node, const Tensor& negatives, const Tensor& counted, double scale,
                const Tensor& loss, const Maybe& dn) {
  constexpr const char* op = "gcahng::similarity_";
  const DType dtype = dtype_of(negatives, op, false);
  const int64_t D = width_of(negatives), N = negatives.numel() / D;
  STD_TORCH_CHECK(width_of(anchors) == D, op, ": anchors must have the negatives' ", D, " channels");
  const void *pa = data(anchors, anchors.numel(), dtype, op, "anchors"),
             *px = data(negatives, N * D, dtype, op, "negatives");
  const int64_t* pn = indices(node, N, op, "node");
  const bool* pc = flags(counted, N, op, "counted");
  void *po = data(loss, N, dtype, op, "loss"), *pd = data(dn, N * D, dtype, op, "dn");
  const auto& stem = GCAHNG_CPU(similarity);
  parallel_for(0, N, std::max<int64_t>(1, kValuesAtOnce / D), [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, pa, pn, px, pc, scale, po, pd, begin, end, D);
  });
}

void diversity_fwd(const Ints& tile_, const Tensor& theta, const Tensor& sum, const Tensor& square) {
  constexpr const char* op = "gcahng::diversity_fwd_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = sum_type_of(theta, op);
  const int64_t D = width_of(theta), rows = tile.units() * tile.K * D, columns = tile.A * tile.O * tile.K * D;
  const void* pt = data(theta, tile.rows() * D, dtype, op, "theta");
  void *into = nodes(sum, tile, D, dtype, op, "sum"), *into_square = nodes(square, tile, D, dtype, op, "square");
  Scratch scratch(theta, dtype, 2 * rows + columns);
  void *row = scratch.take(rows), *squares = scratch.take(rows), *column = scratch.take(columns);
  const auto& stem = GCAHNG_CPU(diversity);
  parallel_for(0, tile.units(), 1, [=, &stem](int64_t begin, int64_t end) {
    stem.forward(dtype, tile, pt, row, column, squares, begin, end, D);
  });
  add_nodes(dtype, tile, row, column, tile.mirrored, into, D);
  add_nodes(dtype, tile, squares, nullptr, tile.O, into_square, D);
}

void diversity_bwd(const Ints& tile_, const Tensor& theta, const Tensor& mean, const Tensor& scale,
                   const Tensor& dtheta) {
  constexpr const char* op = "gcahng::diversity_bwd_";
  const Tile tile = tile_of(tile_, op);
  const DType dtype = sum_type_of(theta, op);
  const int64_t D = width_of(theta), T = tile.rows();
  const void *pt = data(theta, T * D, dtype, op, "theta"), *pm = nodes(mean, tile, D, dtype, op, "mean"),
             *ps = data(scale, 1, dtype, op, "scale");
  void* pd = data(dtheta, T * D, dtype, op, "dtheta");
  const auto& stem = GCAHNG_CPU(diversity);
  parallel_for(0, tile.units(), 1,
               [=, &stem](int64_t begin, int64_t end) { stem.backward(dtype, tile, pt, pm, ps, pd, begin, end, D); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy));
  m.impl("similarity_", TORCH_BOX(&similarity));
  m.impl("diversity_fwd_", TORCH_BOX(&diversity_fwd));
  m.impl("diversity_bwd_", TORCH_BOX(&diversity_bwd));
}
