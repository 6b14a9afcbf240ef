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

}  // namespace gcahng
