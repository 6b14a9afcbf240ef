// Each node's sum over its edges of GELU(product + bias), product = e W^T, and its backward. See
// docs/math/edge_to_node.md.
#pragma once
#include "common/arguments.h"
#include "common/tile.h"
#include "cpu/blocks.h"
#include "cpu/tables.h"

namespace gcahng {

struct EdgeToNodeForward {
  DType dtype, low_type;
  Tile tile;
  const void* product;  // (T, D), low_type
  const void* bias;     // (D,)
  void* sum;            // (classes + reach, K, D): the tile's sums are added to it
  int64_t D;
};

struct EdgeToNodeBackward {
  DType dtype, low_type;
  Tile tile;
  const void* product;  // (T, D), low_type
  const void* bias;     // (D,)
  const void* ds;       // (classes + reach, K, D), the gradient of the sums
  void* dp;             // (T, D), low_type, the gradient of the product; may be the product
  void* db;             // (D,), to which dp's sum is added, or null
  int64_t D;
};

struct EdgeToNodeCpu {
  // Units. sums of D values; columns have mirrored offsets alone.
  void (*forward)(const EdgeToNodeForward& args, const EndSums& sums, int64_t begin, int64_t end);
  // Units. db (units, D), or null where args.db is.
  void (*backward)(const EdgeToNodeBackward& args, void* db, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(EdgeToNodeCpu, edge_to_node)

namespace cuda {

int64_t edge_to_node_forward_scratch(const EdgeToNodeForward& args);
int launch_edge_to_node_forward(const EdgeToNodeForward& args, void* scratch, void* stream);
int64_t edge_to_node_backward_scratch(const EdgeToNodeBackward& args);
int launch_edge_to_node_backward(const EdgeToNodeBackward& args, void* scratch, void* stream);

}  // namespace cuda
}  // namespace gcahng
