// The row-wise ends of the coefficient head: theta = sigmoid(product + bias) behind its product, sums for its
// BatchNorm, and the way back. See docs/math/head.md.
#pragma once
#include "common/arguments.h"
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

struct HeadMoments {
  DType dtype;
  Tile tile;
  const void* e;  // (T, D)
  void* sums;     // (2, D), f64: sums of e and of its square are added, each edge once for each pair it stands for
  int64_t D;
  DType edge_type;
};

struct HeadForward {
  DType dtype, low_type;
  const void* product;  // (T, D), low_type
  const void* bias;     // (D,)
  void* theta;          // (T, D)
  int64_t T, D;
  DType edge_type;
};

struct HeadBackward {
  DType dtype, low_type;
  const void *theta, *dtheta;  // (T, D) each
  void* dpre;                  // (T, D), low_type: dtheta theta (1 - theta)
  void* sum;                   // (D,), to which dpre's sum is added, or null
  int64_t T, D;
  DType edge_type;
};

struct HeadSums {
  DType dtype, low_type;
  const void* dy;  // (T, D), low_type
  const void* e;   // (T, D), normalized
  void* wide;      // (T, D): dy in dtype
  void* sums;      // (2, D): the sums of dy and of dy e are added
  int64_t T, D;
  DType edge_type;
};

struct HeadNorm {
  DType dtype;
  Tile tile;
  const void *dy, *e;         // (T, D) each, e normalized
  const void *scale, *a, *b;  // (D,) each
  void* de;                   // (T, D): scale (dy - w (a + b e)), w: the pairs that the edge stands for; may be dy
  int64_t D;
  DType edge_type;
};

struct HeadCpu {
  // Units. sums (2, units, D), in double.
  void (*moments)(const HeadMoments& args, void* sums, int64_t begin, int64_t end);
  // Rows.
  void (*forward)(const HeadForward& args, int64_t begin, int64_t end);
  // Blocks. sum (blocks, D), or null where args.sum is.
  void (*backward)(const HeadBackward& args, void* sum, int64_t begin, int64_t end);
  // Blocks. sums (2, blocks, D).
  void (*sums)(const HeadSums& args, void* sums, int64_t begin, int64_t end);
  // Units.
  void (*norm)(const HeadNorm& args, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(HeadCpu, head)

namespace cuda {

int64_t head_moments_scratch(const HeadMoments& args);  // in double
int launch_head_moments(const HeadMoments& args, void* scratch, void* stream);
int launch_head_forward(const HeadForward& args, void* stream);
int64_t head_backward_scratch(const HeadBackward& args);
int launch_head_backward(const HeadBackward& args, void* scratch, void* stream);
int64_t head_sums_scratch(const HeadSums& args);
int launch_head_sums(const HeadSums& args, void* scratch, void* stream);
int launch_head_norm(const HeadNorm& args, void* stream);

}  // namespace cuda
}  // namespace gcahng
