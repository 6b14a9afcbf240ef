#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/similarity.cu"
#include "arguments.h"

using namespace gcahng;

static SimilarityForward similarity(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .anchors = in.data(),
          .node = in.indices(),
          .negatives = in.data(),
          .counted = in.flags(),
          .scale = in.number(),
          .loss = in.data(),
          .dn = in.data(),
          .N = in.whole(),
          .D = in.whole()};
}
GCAHNG_EMULATE(similarity, launch_similarity_forward)
