// Edge start: e_ij = x_i x_j per channel, and its backward, two node sums. See docs/math/edge_start.md.
#pragma once
#include "common/arguments.h"
#include "common/tile.h"
#include "cpu/blocks.h"
#include "cpu/tables.h"

namespace gcahng {

struct EdgeStartForward {
  DType dtype, low_type;
  Tile tile;
  const void* x;  // (classes + reach, K, D)
  EdgesOut out;
  int64_t D;
};

struct EdgeStartBackward {
  DType dtype;
  Tile tile;
  const void* x;   // (classes + reach, K, D)
  const void* de;  // (T, D)
  void* dx;        // (classes + reach, K, D): sums of de x_j at anchors and of de x_i at columns are added to it
  int64_t D;
  DType edge_type;
};

struct EdgeStartCpu {
  // Units.
  void (*forward)(const EdgeStartForward& args, int64_t begin, int64_t end);
  // Units. sums of D values, which are dx's.
  void (*backward)(const EdgeStartBackward& args, const EndSums& sums, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(EdgeStartCpu, edge_start)

namespace cuda {

int launch_edge_start_forward(const EdgeStartForward& args, void* stream);
int64_t edge_start_backward_scratch(const EdgeStartBackward& args);
int launch_edge_start_backward(const EdgeStartBackward& args, void* scratch, void* stream);

}  // namespace cuda
}  // namespace gcahng
