#include "../edge_start.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const EdgeStartForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(edge_start);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }

  static void run(const EdgeStartBackward& args, const Call& call) {
    Scratch scratch(call, args.dtype, end_values(args.tile, args.D));
    const EndSums sums = take_ends(scratch, args.tile, args.D);
    const auto& stem = GCAHNG_CPU(edge_start);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.backward(args, sums, begin, end); });
    add_nodes(args.dtype, args.tile, sums, 0, args.dx, args.D);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("edge_start_fwd_", TORCH_BOX(&edge_start_fwd<OnCpu>));
  m.impl("edge_start_bwd_", TORCH_BOX(&edge_start_bwd<OnCpu>));
}

}  // namespace gcahng::binding
