#include "../diversity.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const DiversityForward& args, const Call& call) {
    const Tile& tile = args.tile;
    const int64_t rows = tile.units() * tile.K * args.D;
    Scratch scratch(call, args.dtype, end_values(tile, args.D) + rows);
    const DiversitySums sums{.sum = take_ends(scratch, tile, args.D), .square = scratch.take(rows)};
    const auto& stem = GCAHNG_CPU(diversity);
    each_unit(tile, [&](int64_t begin, int64_t end) { stem.forward(args, sums, begin, end); });
    add_nodes(args.dtype, tile, sums.sum, tile.mirrored, args.sum, args.D);
    add_nodes(args.dtype, tile, {sums.square, nullptr}, tile.O, args.square, args.D);  // nothing at columns
  }

  static void run(const DiversityBackward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(diversity);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.backward(args, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("diversity_fwd_", TORCH_BOX(&diversity_fwd<OnCpu>));
  m.impl("diversity_bwd_", TORCH_BOX(&diversity_bwd<OnCpu>));
}

}  // namespace gcahng::binding
