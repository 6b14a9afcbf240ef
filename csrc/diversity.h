// What J_div needs of a tile of coefficients, and its gradient (docs/math/losses.md). Raw pointers of dtype f32 or f64.
#pragma once
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

struct DiversityCpu {
  // Units [begin, end), theta (T, D) -> sums of x = theta - 1/2 over the unit's offsets, rows (units, K, D), and over
  // the anchor's views, columns (A, O, K, D), mirrored offsets alone; squares (units, K, D): of x^2, twice that where
  // an edge stands for both directions.
  void (*forward)(DType dtype, const Tile& tile, const void* theta, void* rows, void* columns, void* squares,
                  int64_t begin, int64_t end, int64_t D);
  // Units [begin, end): adds scale (theta - mean_i), and scale (theta - mean_j) where an edge stands for both
  // directions, to dtheta (T, D). theta (T, D), mean (classes + reach, K, D), scale (1,).
  void (*backward)(DType dtype, const Tile& tile, const void* theta, const void* mean, const void* scale, void* dtheta,
                   int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(DiversityCpu, diversity)

namespace cuda {

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t; scratch: of as many values of
// dtype as the function before it says.
int64_t diversity_forward_scratch(const Tile& tile, int64_t D);
// Adds a tile's sums of theta - 1/2 at both ends of its edges to sum, and of its squares, times the directions that an
// edge stands for, at their anchors to square; both (classes + reach, K, D). theta (T, D).
int launch_diversity_forward(DType dtype, const Tile& tile, const void* theta, void* sum, void* square, void* scratch,
                             int64_t D, void* stream);
// As the CPU's, all of a tile.
int launch_diversity_backward(DType dtype, const Tile& tile, const void* theta, const void* mean, const void* scale,
                              void* dtheta, int64_t D, void* stream);

}  // namespace cuda

}  // namespace gcahng
