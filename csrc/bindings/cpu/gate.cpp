#include "../gate.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const GateForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(gate);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }

  static void run(const GateBackward& args, const Call& call) {
    const DType dtype = args.dtype;
    const Tile& tile = args.tile;
    const int64_t D = args.D;
    const auto& stem = GCAHNG_CPU(gate);
    const bool wanted = args.sums.du != nullptr;
    Scratch scratch(call, dtype, wanted ? end_values(tile, 2 * D + 1) + 2 * tile.units() * D : 0);
    GateSums sums{};
    if (wanted)
      sums = {.u = take_ends(scratch, tile, D),
              .c = take_ends(scratch, tile, 1),
              .v = take_ends(scratch, tile, D),
              .dgamma = scratch.take(tile.units() * D),
              .dbeta = scratch.take(tile.units() * D)};
    each_unit(tile, [&](int64_t begin, int64_t end) { stem.backward(args, sums, begin, end); });
    if (!wanted) return;
    add_nodes(dtype, tile, sums.u, 0, args.sums.du, D);
    add_nodes(dtype, tile, sums.v, 0, args.sums.dv, D);
    add_nodes(dtype, tile, sums.c, 0, args.sums.dc, 1);
    add_partials(dtype, sums.dgamma, args.sums.dgamma, 1, tile.units(), D);
    add_partials(dtype, sums.dbeta, args.sums.dbeta, 1, tile.units(), D);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("gate_fwd_", TORCH_BOX(&gate_fwd<OnCpu>));
  m.impl("gate_bwd_", TORCH_BOX(&gate_bwd<OnCpu>));
}

}  // namespace gcahng::binding
