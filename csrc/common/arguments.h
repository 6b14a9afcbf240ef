// What the headers of the stems, csrc/<stem>.h, share.
//
// Each op's arguments are one struct, from the binding to the kernel: raw pointers, each with its shape. T is the
// number of edges (rows), D their channels. `dtype`, f32 or f64, is the type of weights and sums: what has no other
// type. `low_type` is that of the products' operands: dtype itself or, for f32, bf16, and on CUDA f16. `edge_type` is
// that of edges, their gradients and coefficients: dtype or, beside f32, bf16; on CUDA then low_type is bf16, too.
//
// A struct of functions is the CPU's. They work on rows, blocks of rows or units of a tile [begin, end); sums over rows
// go to places of their own, which the binding adds up in order.
//
// The functions launch_* are CUDA's. They work on the whole tile, and return a cudaError_t as a number, 0 for success;
// stream is a cudaStream_t. `scratch` holds as many values of dtype as the function <stem>_<...>_scratch says.
#pragma once
#include "dtype.h"

namespace gcahng {

// Edges (T, D) as they leave a stage, as they are and as operands of products. Either may be null.
struct EdgesOut {
  void* full;
  void* low;
};

// Where a stage leaves `edges`, of edge_type, and `low`, a copy in the products' type. Narrow edges have no copy beside
// them: they are the products' operands themselves.
inline EdgesOut edges_out(DType dtype, DType edge_type, void* edges, void* low) {
  return edge_type == dtype ? EdgesOut{edges, low} : EdgesOut{nullptr, edges};
}

// Of a LayerNorm over D channels, (D,) each.
struct NormWeights {
  const void *gamma, *beta;
};

// Mean and 1/sigma of each row's hidden channels, (T, 1) each.
struct RowMoments {
  const void *mean, *rstd;
};

}  // namespace gcahng
