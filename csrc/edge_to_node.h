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

namespace cuda {

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t; scratch: of as many values of
// the accumulating type as the function before it says.
int64_t edge_to_node_forward_scratch(const Tile& tile, int64_t D);
// Adds the tile's sums to sum (classes + reach, K, D); p (T, D) in the products' type, b (D,).
int launch_edge_to_node_forward(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b, void* sum,
                                void* scratch, int64_t D, void* stream);
int64_t edge_to_node_backward_scratch(const Tile& tile, int64_t D);
// ds (classes + reach, K, D) -> dp (T, D; may be p); adds to db (D,), or null, and scratch is then not needed.
int launch_edge_to_node_backward(DType dtype, DType low_type, const Tile& tile, const void* p, const void* b,
                                 const void* ds, void* dp, void* db, void* scratch, int64_t D, void* stream);

}  // namespace cuda

}  // namespace gcahng
