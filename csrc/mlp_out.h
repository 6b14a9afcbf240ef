// The end of the edge MLP: LayerNorm's fold, residual, and LayerNorm(GELU(.)), and its backward before the products.
// See docs/math/edge_mlp.md.
#pragma once
#include "common/dtype.h"
#include "cpu/tables.h"

namespace gcahng {

struct MlpOutCpu {
  // Rows [begin, end): out = g W2'^T (T, D) in the products' type -> s = (out - mean w) rstd + d + e1 (T, D), then
  // y and low (T, D) = LayerNorm(GELU(s)); y and low may be null.
  void (*forward)(DType dtype, DType low_type, const void* out, const void* e1, const void* mean, const void* rstd,
                  const void* w, const void* d, const void* gamma, const void* beta, void* s, void* y, void* low,
                  int64_t begin, int64_t end, int64_t D);
  // Blocks [begin, end) of `block` rows: dy (T, D) -> ds (T, D; may be dy), ds and ds rstd in the products' type, and
  // the row means m1 and m2 (T,) that LayerNorm's gradient over the 4D hidden channels needs. sums (4, blocks, D), or
  // null: of dgamma, dbeta, ds, and ds rstd mean.
  void (*backward)(DType dtype, DType low_type, const void* s, const void* e1, const void* dy, const void* mean,
                   const void* rstd, const void* w, const void* d, const void* gamma, void* ds, void* low, void* scaled,
                   void* m1, void* m2, void* sums, int64_t begin, int64_t end, int64_t block, int64_t blocks, int64_t T,
                   int64_t D);
};
GCAHNG_CPU_TABLES(MlpOutCpu, mlp_out)

namespace cuda {

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t. low_type may be f16, too; D <=
// 1024. out and e1 (T, D), mean and rstd (T,), w, d, gamma, beta (D,) -> s, y and low (T, D); y and low may be null.
int launch_mlp_out_forward(DType dtype, DType low_type, const void* out, const void* e1, const void* mean,
                         const void* rstd, const void* w, const void* d, const void* gamma, const void* beta, void* s,
                         void* y, void* low, int64_t T, int64_t D, void* stream);
// s, e1 and dy (T, D), mean and rstd (T,), w, d, gamma (D,) -> ds (T, D; may be dy), low (T, D; may be ds) and scaled
// (T, D), m1 and m2 (T,); adds to sums (4, D) or null. scratch: of sums' type, so many values; may be null where sums
// is.
int launch_mlp_out_backward(DType dtype, DType low_type, const void* s, const void* e1, const void* dy, const void* mean,
                          const void* rstd, const void* w, const void* d, const void* gamma, void* ds, void* low,
                          void* scaled, void* m1, void* m2, void* sums, void* scratch, int64_t T, int64_t D,
                          void* stream);
int64_t mlp_out_backward_scratch(int64_t T, int64_t D);

}  // namespace cuda

}  // namespace gcahng
