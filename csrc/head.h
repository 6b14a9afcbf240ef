// The row-wise ends of the coefficient head: theta = sigmoid(p + b) behind its product, sums for its BatchNorm, and the
// way back. See docs/math/head.md.
#pragma once
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

struct HeadCpu {
  // Units [begin, end) of a tile: sums over the ordered pairs they stand for, of e and of e squared, e (T, D) -> sums
  // (2, units, D), in double.
  void (*moments)(DType dtype, const Tile& tile, const void* e, void* sums, int64_t begin, int64_t end, int64_t D);
  // Rows [begin, end): p (T, D) in the products' type, b (D,) -> theta (T, D).
  void (*forward)(DType dtype, DType low_type, const void* p, const void* b, void* theta, int64_t begin, int64_t end,
                  int64_t D);
  // Blocks [begin, end) of `block` rows: dtheta, theta (T, D) -> dpre = dtheta theta (1 - theta) in the products' type
  // (T, D), sums (blocks, D) of it, or null.
  void (*backward)(DType dtype, DType low_type, const void* theta, const void* dtheta, void* dpre, void* sums,
                   int64_t begin, int64_t end, int64_t block, int64_t T, int64_t D);
  // Blocks: dy (T, D) in the products' type and the normalised e (T, D) -> wide (T, D), dy as it is stored; sums
  // (2, blocks, D) of dy and of dy e.
  void (*sums)(DType dtype, DType low_type, const void* dy, const void* e, void* wide, void* sums, int64_t begin,
               int64_t end, int64_t block, int64_t blocks, int64_t T, int64_t D);
  // Units [begin, end): de (T, D; may be dy) = scale (dy - w (a + b e)), e normalised, w: how many ordered pairs
  // an edge stands for.
  void (*norm)(DType dtype, const Tile& tile, const void* dy, const void* e, const void* scale, const void* a,
               const void* b, void* de, int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(HeadCpu, head)

namespace cuda {

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t. low_type may be f16, too.
// Adds to sums (2, D), in double: e (T, D). scratch: head_scratch values, in double.
int launch_head_moments(DType dtype, const Tile& tile, const void* e, void* sums, void* scratch, int64_t D,
                        void* stream);
// p (T, D), b (D,) -> theta (T, D).
int launch_head_forward(DType dtype, DType low_type, const void* p, const void* b, void* theta, int64_t T, int64_t D,
                        void* stream);
// theta and dtheta (T, D) -> dpre (T, D); adds to sum (D,) or null. scratch: head_scratch values; may be null where sum
// is.
int launch_head_backward(DType dtype, DType low_type, const void* theta, const void* dtheta, void* dpre, void* sum,
                         void* scratch, int64_t T, int64_t D, void* stream);
// dy and e (T, D) -> wide (T, D); adds to sums (2, D). scratch: head_scratch values.
int launch_head_sums(DType dtype, DType low_type, const void* dy, const void* e, void* wide, void* sums, void* scratch,
                     int64_t T, int64_t D, void* stream);
// dy and e (T, D), scale, a, b (D,) -> de (T, D; may be dy).
int launch_head_norm(DType dtype, const Tile& tile, const void* dy, const void* e, const void* scale, const void* a,
                     const void* b, void* de, int64_t D, void* stream);
int64_t head_scratch(int64_t T, int64_t D);

}  // namespace cuda

}  // namespace gcahng
