// 1 - cos of a tile's negatives and their anchors, and its gradient. Raw pointers of dtype f32 or f64.
#pragma once
#include "common/dtype.h"
#include "cpu/tables.h"

namespace gcahng {

struct SimilarityCpu {
  // Rows [begin, end) of loss (N,), 0 where counted (N,) is not set; adds scale * its gradient to dn (N, D) unless
  // null. anchors (n, D), node (N,): whose a row's is; negatives (N, D).
  void (*forward)(DType dtype, const void* anchors, const int64_t* node, const void* negatives, const bool* counted,
                  double scale, void* loss, void* dn, int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(SimilarityCpu, similarity)

namespace cuda {

// The launcher returns a cudaError_t as a number, 0 for success. stream is a cudaStream_t. All N rows, as above.
int launch_similarity(DType dtype, const void* anchors, const int64_t* node, const void* negatives, const bool* counted,
                      double scale, void* loss, void* dn, int64_t N, int64_t D, void* stream);

}  // namespace cuda

}  // namespace gcahng
