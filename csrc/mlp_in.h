// The first half of the edge MLP: bias, GELU and row moments behind the first product, and its backward between two
// products. See docs/math/edge_mlp.md. W = 4D is the number of hidden channels.
#pragma once
#include "common/arguments.h"
#include "cpu/tables.h"

namespace gcahng {

struct MlpInForward {
  DType dtype, low_type;
  const void* h;      // (T, W), low_type: the product, without its bias
  const void* bias;   // (W,)
  void* g;            // (T, W), low_type: GELU(h + bias); may be h
  void *mean, *rstd;  // (T,) each, of g's rows
  int64_t T, W;
};

// What the gradient of a row's LayerNorm needs of it, (T, 1) each: its moments, and the means of dn and of dn times the
// normalized row.
struct NormRows {
  const void *mean, *rstd, *mean_dn, *mean_n_dn;
};

struct MlpInBackward {
  DType dtype, low_type;
  const void* h;     // (T, W), low_type
  const void* bias;  // (W,)
  const void* dn;    // (T, W), low_type: the gradient of the normalized rows
  NormRows rows;
  void* g;   // (T, W), low_type; may be h
  void* dh;  // (T, W), low_type; may be dn
  void* db;  // (W,), to which dh's sum is added, or null
  int64_t T, W;
};

struct MlpInCpu {
  // Rows.
  void (*forward)(const MlpInForward& args, int64_t begin, int64_t end);
  // Blocks. db (blocks, W), or null where args.db is.
  void (*backward)(const MlpInBackward& args, void* db, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(MlpInCpu, mlp_in)

namespace cuda {

// W is at most 4096.
int launch_mlp_in_forward(const MlpInForward& args, void* stream);
int64_t mlp_in_backward_scratch(const MlpInBackward& args);
int launch_mlp_in_backward(const MlpInBackward& args, void* scratch, void* stream);

}  // namespace cuda
}  // namespace gcahng
