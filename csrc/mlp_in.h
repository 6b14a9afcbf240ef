// The hidden layer of the edge MLP: bias, GELU and row moments behind the first product, and its backward between two
// products. See docs/math/edge_mlp.md.
#pragma once
#include "common/dtype.h"
#include "cpu/tables.h"

namespace gcahng {

struct MlpInCpu {
  // Rows [begin, end): h (T, W) in the products' type, without its bias b (W,) -> g = GELU(h + b) (T, W; may be h), and
  // its row mean and 1/sigma (T,).
  void (*forward)(DType dtype, DType low_type, const void* h, const void* b, void* g, void* mean, void* rstd,
                  int64_t begin, int64_t end, int64_t W);
  // Blocks [begin, end) of `block` rows: dn (T, W), the gradient of LayerNorm's normalised rows -> dh (T, W; may be dn)
  // and g (T, W; may be h); m1 and m2 (T,): the row means of dn and of dn times the normalised rows. db (blocks, W):
  // sums of dh over a block, or null.
  void (*backward)(DType dtype, DType low_type, const void* h, const void* b, const void* dn, const void* mean,
                   const void* rstd, const void* m1, const void* m2, void* g, void* dh, void* db, int64_t begin,
                   int64_t end, int64_t block, int64_t T, int64_t W);
};
GCAHNG_CPU_TABLES(MlpInCpu, mlp_in)

namespace cuda {

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t. low_type may be f16, too; W <=
// 4096. h (T, W), b (W,) -> g (T, W; may be h), mean and rstd (T,).
int launch_mlp_in_forward(DType dtype, DType low_type, const void* h, const void* b, void* g, void* mean, void* rstd,
                          int64_t T, int64_t W, void* stream);
// h and dn (T, W), b (W,), mean, rstd, m1, m2 (T,) -> g (T, W; may be h), dh (T, W; may be dn); adds to db (W,) or
// null. scratch: of db's type, so many values; may be null where db is.
int launch_mlp_in_backward(DType dtype, DType low_type, const void* h, const void* b, const void* dn, const void* mean,
                           const void* rstd, const void* m1, const void* m2, void* g, void* dh, void* db, void* scratch,
                           int64_t T, int64_t W, void* stream);
int64_t mlp_in_backward_scratch(int64_t T, int64_t W);

}  // namespace cuda

}  // namespace gcahng
