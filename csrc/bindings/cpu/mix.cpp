#include "../mix.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const MixForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(mix);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }

  static void run(const MixBackwardTheta& args, const Call&) {
    const auto& stem = GCAHNG_CPU(mix);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.backward_theta(args, begin, end); });
  }

  static void run(const MixBackwardZ& args, const Call& call) {
    Scratch scratch(call, args.dtype, end_values(args.tile, args.D + 1));
    const MixSums sums{.z = take_ends(scratch, args.tile, args.D), .d_plus = take_ends(scratch, args.tile, 1)};
    const auto& stem = GCAHNG_CPU(mix);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.backward_z(args, sums, begin, end); });
    add_nodes(args.dtype, args.tile, sums.z, 0, args.dz, args.D);
    add_nodes(args.dtype, args.tile, sums.d_plus, 0, args.dd_plus, 1);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("mix_fwd_", TORCH_BOX(&mix_fwd<OnCpu>));
  m.impl("mix_bwd_theta_", TORCH_BOX(&mix_bwd_theta<OnCpu>));
  m.impl("mix_bwd_z_", TORCH_BOX(&mix_bwd_z<OnCpu>));
}

}  // namespace gcahng::binding
