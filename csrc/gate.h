// The gate: attention of an edge to its two nodes, and LayerNorm(GELU(.)) behind it. See docs/math/gate.md.
#pragma once
#include "common/philox.h"
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

// Node tensors of classes + reach classes: u, v (., K, D), c (., K).
struct GateTokens {
  const void *u, *c, *v;
};
// What the backward needs of the forward, a value an edge each (T,): p, 1 - p.
struct GateSaved {
  void *p, *q;
};
// Sums of one tile: rows of u, c, v (units, K, D | 1 | D), columns (A, O, K, D | 1 | D), dgamma and dbeta (units, D).
struct GateSums {
  void *row_u, *row_c, *row_v, *column_u, *column_c, *column_v, *dgamma, *dbeta;
};

struct GateCpu {
  // Units [begin, end): e (T, D) -> e1 and low (T, D; low may be null).
  void (*forward)(DType dtype, DType low_type, const Tile& tile, const Dropout& dropout, GateTokens tokens,
                  const void* gamma, const void* beta, const void* e, void* e1, void* low, GateSaved saved,
                  int64_t begin, int64_t end, int64_t D);
  // Units [begin, end): de1 (T, D) -> de (T, D; null: not wanted; may be de1) and the sums (null pointers: not wanted).
  void (*backward)(DType dtype, const Tile& tile, const Dropout& dropout, GateTokens tokens, const void* gamma,
                   const void* e, const void* de1, GateSaved saved, void* de, GateSums sums, int64_t begin, int64_t end,
                   int64_t D);
};
GCAHNG_CPU_TABLES(GateCpu, gate)

namespace cuda {

// Gradients that a tile adds to: of u, c, v (classes + reach, K, D | 1 | D), gamma and beta (D,). All, or none.
struct GateGradients {
  void *du, *dc, *dv, *dgamma, *dbeta;
};

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t; draw is a number on the device,
// which stands for dropout.draw. D is at most 1024.
// e (T, D) -> e1 and low (T, D; low may be null), and saved.
int launch_gate_forward(DType dtype, DType low_type, const Tile& tile, Dropout dropout, const int64_t* draw,
                        GateTokens tokens, const void* gamma, const void* beta, const void* e, void* e1, void* low,
                        GateSaved saved, int64_t D, void* stream);
// Values of the accumulating type that the backward's scratch holds where gradients of tokens are wanted.
int64_t gate_backward_scratch(const Tile& tile, int64_t D);
// de1 (T, D) -> de (T, D; null: not wanted; may be de1); adds to the gradients (null pointers: not wanted).
int launch_gate_backward(DType dtype, const Tile& tile, Dropout dropout, const int64_t* draw, GateTokens tokens,
                         const void* gamma, const void* e, const void* de1, GateSaved saved, void* de,
                         GateGradients into, void* scratch, int64_t D, void* stream);

}  // namespace cuda

}  // namespace gcahng
