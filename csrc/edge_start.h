// Edge start: e_ij = x_i x_j per channel, and its backward, two node sums.
#pragma once
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

struct EdgeStartCpu {
  // Units [begin, end) of e and low (T, D) = x_i x_j, x (classes + reach, K, D). low may be null.
  void (*forward)(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t begin,
               int64_t end, int64_t D);
  // Units [begin, end): de (T, D), the gradient of e -> sums of de x_j over the unit's offsets, rows (units, K, D), and
  // of de x_i over the anchor's views, columns (A, O, K, D). x (classes + reach, K, D).
  void (*backward)(DType dtype, const Tile& tile, const void* x, const void* de, void* rows, void* columns,
                        int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(EdgeStartCpu, edge_start)

namespace cuda {

// All return a cudaError_t as a number, 0 for success. stream is a cudaStream_t.
// e and low (T, D) = x_i x_j of a tile's edges, x (classes + reach, K, D). e or low may be null.
int launch_edge_start_forward(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t D,
                           void* stream);
// Adds the sums of de x_j at anchors and of de x_i at columns to dx (classes + reach, K, D); x as dx, de (T, D), of
// dtype f32 or f64. scratch: of as many values of dtype as the function before it says.
int64_t edge_start_backward_scratch(const Tile& tile, int64_t D);
int launch_edge_start_backward(DType dtype, const Tile& tile, const void* x, const void* de, void* dx,
                                    void* scratch, int64_t D, void* stream);

}  // namespace cuda
}  // namespace gcahng
