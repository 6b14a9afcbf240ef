// Each node's sum over its edges of GELU(p + b), p = e W^T, and its backward. See docs/math/edge_to_node.md.
#pragma once
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

struct EdgeToNodeCpu {
  // Units [begin, end): p (T, D) in the products' type, b (D,) -> sums over the unit's offsets, rows (units, K, D), and
  // over the anchor's views, columns (A, O, K, D), mirrored offsets alone.
  void (*forward)(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b, void* rows,
                  void* columns, int64_t begin, int64_t end, int64_t D);
  // Units [begin, end): ds (classes + reach, K, D), the gradient of the sums -> dp (T, D; may be p), db (units, D) or
  // null.
  void (*backward)(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b, const void* ds,
                   void* dp, void* db, int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(EdgeToNodeCpu, edge_to_node)

}  // namespace gcahng
