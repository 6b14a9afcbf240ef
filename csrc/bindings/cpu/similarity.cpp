#include "../similarity.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const SimilarityForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(similarity);
    each_row(args.N, 2 * args.D, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) { m.impl("similarity_", TORCH_BOX(&similarity<OnCpu>)); }

}  // namespace gcahng::binding
