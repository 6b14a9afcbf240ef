// What J_div needs of a tile of coefficients, and its gradient (docs/math/losses.md).
#pragma once
#include "common/arguments.h"
#include "common/tile.h"
#include "cpu/blocks.h"
#include "cpu/tables.h"

namespace gcahng {

struct DiversityForward {
  DType dtype;
  Tile tile;
  const void* theta;  // (T, D)
  void* sum;          // (classes + reach, K, D): sums of x = theta - 1/2 at both ends of the edges are added
  void* square;       // (classes + reach, K, D): sums of x^2 at the anchors are added, twice of an edge that stands for
                      // both directions
  int64_t D;
  DType edge_type;
};

struct DiversityBackward {
  DType dtype;
  Tile tile;
  const void* theta;  // (T, D)
  const void* mean;   // (classes + reach, K, D)
  const void* scale;  // (1,)
  void* dtheta;  // (T, D), to which scale (theta - mean_i) is added, and scale (theta - mean_j) where an edge stands
                 // for both directions
  int64_t D;
  DType edge_type;
};

// The tile's part of `sum`, of D values, columns of mirrored offsets alone; square (units, K, D).
struct DiversitySums {
  EndSums sum;
  void* square;
};

struct DiversityCpu {
  // Units.
  void (*forward)(const DiversityForward& args, const DiversitySums& sums, int64_t begin, int64_t end);
  void (*backward)(const DiversityBackward& args, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(DiversityCpu, diversity)

namespace cuda {

int64_t diversity_forward_scratch(const DiversityForward& args);
int launch_diversity_forward(const DiversityForward& args, void* scratch, void* stream);
int launch_diversity_backward(const DiversityBackward& args, void* stream);

}  // namespace cuda
}  // namespace gcahng
