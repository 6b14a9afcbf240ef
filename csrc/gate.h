// The gate: attention of an edge to its two nodes, and LayerNorm(GELU(.)) behind it. See docs/math/gate.md.
#pragma once
#include "common/arguments.h"
#include "common/philox.h"
#include "common/tile.h"
#include "cpu/blocks.h"
#include "cpu/tables.h"

namespace gcahng {

// u and v (classes + reach, K, D), c (classes + reach, K).
struct GateTokens {
  const void *u, *c, *v;
};

struct GateForward {
  DType dtype, low_type;
  Tile tile;
  Dropout dropout;
  GateTokens tokens;
  NormWeights norm;
  const void* e;              // (T, D)
  EdgesOut out;               // e1
  void *weight_i, *weight_j;  // (T,) each: the attention weights of an edge's nodes, before dropout; they sum to 1
  int64_t D;
  DType edge_type;
};

// Gradients that a tile's sums are added to: du and dv (classes + reach, K, D), dc (classes + reach, K), dgamma and
// dbeta (D,). All, or none: null.
struct GateGradients {
  void *du, *dc, *dv, *dgamma, *dbeta;
};

struct GateBackward {
  DType dtype;
  Tile tile;
  Dropout dropout;
  GateTokens tokens;
  NormWeights norm;
  const void* e;                    // (T, D)
  const void* de1;                  // (T, D)
  const void *weight_i, *weight_j;  // (T,) each, as the forward wrote them
  void* de;                         // (T, D), or null; may be de1
  GateGradients sums;
  int64_t D;
  DType edge_type;
};

// The tile's part of GateGradients: u and v of D values, c of one; dgamma and dbeta (units, D).
struct GateSums {
  EndSums u, c, v;
  void *dgamma, *dbeta;
};

struct GateCpu {
  // Units.
  void (*forward)(const GateForward& args, int64_t begin, int64_t end);
  // Units. sums: null pointers where args.sums are.
  void (*backward)(const GateBackward& args, const GateSums& sums, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(GateCpu, gate)

namespace cuda {

// D is at most 1024.
int launch_gate_forward(const GateForward& args, void* stream);
int64_t gate_backward_scratch(const GateBackward& args);
int launch_gate_backward(const GateBackward& args, void* scratch, void* stream);

}  // namespace cuda
}  // namespace gcahng
