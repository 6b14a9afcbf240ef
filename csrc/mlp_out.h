// The second half of the edge MLP, behind its second product: LayerNorm's fold, residual, and LayerNorm(GELU(.)), and
// its backward before the products. See docs/math/edge_mlp.md.
#pragma once
#include "common/arguments.h"
#include "cpu/tables.h"

namespace gcahng {

// The hidden LayerNorm as it acts behind the second product: (product - mean w) rstd + d. (D,) each.
struct Fold {
  const void *w, *d;
};

struct MlpOutForward {
  DType dtype, low_type;
  const void* product;  // (T, D), low_type
  const void* e1;       // (T, D)
  RowMoments moments;
  Fold fold;
  NormWeights norm;
  void* s;       // (T, D): (product - mean w) rstd + d + e1
  EdgesOut out;  // LayerNorm(GELU(s))
  int64_t T, D;
  DType edge_type;
};

struct MlpOutBackward {
  DType dtype, low_type;
  const void *s, *e1;  // (T, D) each
  const void* dy;      // (T, D)
  RowMoments moments;
  Fold fold;
  const void* gamma;          // (D,)
  void* ds;                   // (T, D); may be dy
  void* low;                  // (T, D), ds in low_type; ds itself where the types are one
  void* scaled;               // (T, D), ds rstd in low_type
  void *mean_dn, *mean_n_dn;  // (T,) each, of NormRows (csrc/mlp_in.h)
  void* sums;                 // (4, D), to which the sums of dgamma, dbeta, ds, and ds rstd mean are added, or null
  int64_t T, D;
  DType edge_type;
};

struct MlpOutCpu {
  // Rows.
  void (*forward)(const MlpOutForward& args, int64_t begin, int64_t end);
  // Blocks. sums (4, blocks, D), or null where args.sums is.
  void (*backward)(const MlpOutBackward& args, void* sums, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(MlpOutCpu, mlp_out)

namespace cuda {

// D is at most 1024.
int launch_mlp_out_forward(const MlpOutForward& args, void* stream);
int64_t mlp_out_backward_scratch(const MlpOutBackward& args);
int launch_mlp_out_backward(const MlpOutBackward& args, void* scratch, void* stream);

}  // namespace cuda
}  // namespace gcahng
