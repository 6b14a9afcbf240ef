#include "../norm_gelu.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const NormGeluForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(norm_gelu);
    each_row(args.T, 4 * args.D, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) { m.impl("norm_gelu_", TORCH_BOX(&norm_gelu<OnCpu>)); }

}  // namespace gcahng::binding
