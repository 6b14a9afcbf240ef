#include "../norm_gelu.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(DType dtype, DType low_type, const void* t, const void* gamma, const void* beta, void* y, void* low,
             int64_t begin, int64_t end, int64_t D) {
  with_types(dtype, low_type, [&]<class T, class L>(T*, L*) {
    GCAHNG_SCRATCH(T, scratch, D);
    for (int64_t r = begin; r < end; ++r) {
      norm_gelu_row(static_cast<const T*>(t) + r * D, static_cast<const T*>(gamma), static_cast<const T*>(beta),
                    y ? static_cast<T*>(y) + r * D : nullptr, low ? static_cast<L*>(low) + r * D : nullptr, scratch, D);
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const NormGeluCpu norm_gelu = {forward};
}

}  // namespace gcahng
