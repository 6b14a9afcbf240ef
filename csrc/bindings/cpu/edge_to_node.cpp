#include "../edge_to_node.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const EdgeToNodeForward& args, const Call& call) {
    Scratch scratch(call, args.dtype, end_values(args.tile, args.D));
    const EndSums sums = take_ends(scratch, args.tile, args.D);
    const auto& stem = GCAHNG_CPU(edge_to_node);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.forward(args, sums, begin, end); });
    add_nodes(args.dtype, args.tile, sums, args.tile.mirrored, args.sum, args.D);
  }

  static void run(const EdgeToNodeBackward& args, const Call& call) {
    const int64_t units = args.tile.units();
    Scratch scratch(call, args.dtype, args.db ? units * args.D : 0);
    void* db = args.db ? scratch.take(units * args.D) : nullptr;
    const auto& stem = GCAHNG_CPU(edge_to_node);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.backward(args, db, begin, end); });
    if (db) add_partials(args.dtype, db, args.db, 1, units, args.D);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("edge_to_node_fwd_", TORCH_BOX(&edge_to_node_fwd<OnCpu>));
  m.impl("edge_to_node_bwd_", TORCH_BOX(&edge_to_node_bwd<OnCpu>));
}

}  // namespace gcahng::binding
