// Cross entropy of a tile's negatives under the classifier, and its gradient, a row of logits at a time. Raw pointers;
// DType says what they point to: dtype f32 or f64 for bias and loss, low_type for the logits.
#pragma once
#include "common/dtype.h"
#include "cpu/tables.h"

namespace gcahng {

struct CrossEntropyCpu {
  // Rows [begin, end) of loss (R,) and, unless null, of d (R, M) = scale * dloss/dlogits, from logits (R, M) without
  // their bias (M,), and labels (R,). d may be the logits.
  void (*forward)(DType dtype, DType low_type, const void* logits, const void* bias, const int64_t* labels,
                  double scale, void* loss, void* d, int64_t begin, int64_t end, int64_t M);
};
GCAHNG_CPU_TABLES(CrossEntropyCpu, cross_entropy)

namespace cuda {

// The launcher returns a cudaError_t as a number, 0 for success. stream is a cudaStream_t. low_type may be f16, too.
// All R rows, as above.
int launch_cross_entropy(DType dtype, DType low_type, const void* logits, const void* bias, const int64_t* labels,
                         double scale, void* loss, void* d, int64_t R, int64_t M, void* stream);

}  // namespace cuda

}  // namespace gcahng
