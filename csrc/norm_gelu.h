// LayerNorm(GELU(t)) of a tile's rows.
#pragma once
#include "common/arguments.h"
#include "cpu/tables.h"

namespace gcahng {

struct NormGeluForward {
  DType dtype, low_type;
  const void* t;  // (T, D)
  NormWeights norm;
  EdgesOut out;
  int64_t T, D;
  DType edge_type;
};

struct NormGeluCpu {
  // Rows.
  void (*forward)(const NormGeluForward& args, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(NormGeluCpu, norm_gelu)

namespace cuda {

// D is at most 1024.
int launch_norm_gelu_forward(const NormGeluForward& args, void* stream);

}  // namespace cuda
}  // namespace gcahng
