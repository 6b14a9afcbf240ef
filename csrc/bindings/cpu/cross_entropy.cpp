#include "../cross_entropy.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const CrossEntropyForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(cross_entropy);
    each_row(args.R, 2 * args.M, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) { m.impl("cross_entropy_", TORCH_BOX(&cross_entropy<OnCpu>)); }

}  // namespace gcahng::binding
