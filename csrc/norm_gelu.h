// LayerNorm(GELU(t)) of a tile's rows. Raw pointers; DType says what they point to: dtype f32 or f64 for edges,
// low_type for the operands of products.
#pragma once
#include "common/dtype.h"
#include "cpu/tables.h"

namespace gcahng {

struct NormGeluCpu {
  // Rows [begin, end) of y and low (T, D) from t (T, D), gamma and beta (D,). y or low may be null.
  void (*forward)(DType dtype, DType low_type, const void* t, const void* gamma, const void* beta, void* y, void* low,
                  int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(NormGeluCpu, norm_gelu)

namespace cuda {

// The launcher returns a cudaError_t as a number, 0 for success. stream is a cudaStream_t. low_type may be f16, too; D
// <= 1024. y and low (T, D) from t (T, D), gamma and beta (D,). y or low may be null.
int launch_norm_gelu_forward(DType dtype, DType low_type, const void* t, const void* gamma, const void* beta, void* y,
                             void* low, int64_t T, int64_t D, void* stream);

}  // namespace cuda

}  // namespace gcahng
