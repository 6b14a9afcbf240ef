// Edge start: e_ij = x_i x_j per channel, and its backward, two node sums. Raw pointers; DType says what they point to.
#pragma once
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

struct EdgeStartCpu {
  // Rows [begin, end) of e (I, J, D) from x_i (I, D) and x_j (J, D).
  void (*forward)(DType dtype, const void* x_i, const void* x_j, void* e, int64_t begin, int64_t end, int64_t J,
                  int64_t D);
  // Rows [begin, end) of dx_i (I, D): dx_i = sum over j, in order, of grad_e (I, J, D) times x_j (J, D).
  void (*backward_i)(DType dtype, const void* grad_e, const void* x_j, void* dx_i, int64_t begin, int64_t end,
                     int64_t J, int64_t D);
  // Rows [begin, end) of dx_j (J, D): dx_j = sum over i, in order, of grad_e (I, J, D) times x_i (I, D).
  void (*backward_j)(DType dtype, const void* grad_e, const void* x_i, void* dx_j, int64_t begin, int64_t end,
                     int64_t I, int64_t J, int64_t D);
  // Units [begin, end) of e and low (T, D) = x_i x_j, x (classes + reach, K, D). low may be null.
  void (*tile)(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t begin,
               int64_t end, int64_t D);
  // Units [begin, end): de (T, D), the gradient of e -> sums of de x_j over the unit's offsets, rows (units, K, D), and
  // of de x_i over the anchor's views, columns (A, O, K, D). x (classes + reach, K, D).
  void (*tile_backward)(DType dtype, const Tile& tile, const void* x, const void* de, void* rows, void* columns,
                        int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(EdgeStartCpu, edge_start)

namespace cuda {

// All return a cudaError_t as a number, 0 for success. stream is a cudaStream_t.
// e (I, J, D) from x_i (I, D) and x_j (J, D).
int launch_edge_start_forward(DType dtype, const void* x_i, const void* x_j, void* e, int64_t I, int64_t J, int64_t D,
                              void* stream);
// dx_i (I, D) and dx_j (J, D) from grad_e (I, J, D), x_i (I, D) and x_j (J, D).
int launch_edge_start_backward(DType dtype, const void* grad_e, const void* x_i, const void* x_j, void* dx_i,
                               void* dx_j, int64_t I, int64_t J, int64_t D, void* stream);
// e and low (T, D) = x_i x_j of a tile's edges, x (classes + reach, K, D). e or low may be null.
int launch_edge_start_tile(DType dtype, DType low_type, const Tile& tile, const void* x, void* e, void* low, int64_t D,
                           void* stream);
// Adds the sums of de x_j at anchors and of de x_i at columns to dx (classes + reach, K, D); x as dx, de (T, D), of
// dtype f32 or f64. scratch: of as many values of dtype as the function before it says.
int64_t edge_start_tile_backward_scratch(const Tile& tile, int64_t D);
int launch_edge_start_tile_backward(DType dtype, const Tile& tile, const void* x, const void* de, void* dx,
                                    void* scratch, int64_t D, void* stream);

}  // namespace cuda
}  // namespace gcahng
