#include "../norm_gelu.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(const NormGeluForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, scratch, 2 * D);
    const auto t = edge_rows<T>(args.t, args.edge_type, D);
    T* full = typed<T>(args.out.full);
    L* low = typed<L>(args.out.low);
    for (int64_t r = begin; r < end; ++r)
      norm_gelu_row(t.read(r, scratch + D), typed<T>(args.norm.gamma), typed<T>(args.norm.beta),
                    full ? full + r * D : nullptr, low ? low + r * D : nullptr, scratch, D);
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const NormGeluCpu norm_gelu = {forward};
}

}  // namespace gcahng
