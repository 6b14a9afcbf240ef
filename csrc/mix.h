// Mixing on a tile, in both directions of its pairs of classes. See docs/math/mix.md. float or double throughout.
//
// A mix is numbered like the negatives: forward (A, K, O): anchor class and view, offset of the negatives' class; and
// behind them, back (A, O', K) with O' = O - mirrored: the anchors are the columns, the negatives the anchor class's
// views.
#pragma once
#include "common/tile.h"
#include "cpu/tables.h"

namespace gcahng {

// Node tensors of classes + reach classes: z (., K, D) and d_plus (., K), the distances to the positives; kappa (K, K).
struct MixInputs {
  const void *z, *d_plus, *kappa;
  const void* pull;  // (1)
};
// Sums of one tile: rows (units, K, D | 1) and columns (A, O, K, D | 1), of z and of d_plus.
struct MixSums {
  void *row_z, *row_d, *column_z, *column_d;
};

struct MixCpu {
  // Units [begin, end): theta (T, D) -> negatives (mixes, D) if not null, and a . N and |N|^2 (mixes,) if not null.
  void (*forward)(DType dtype, const Tile& tile, MixInputs in, const void* theta, void* negatives, void* logits,
                  void* squares, int64_t begin, int64_t end, int64_t D);
  // Units [begin, end): dn (mixes, D) -> dtheta (T, D), both directions together.
  void (*backward_theta)(DType dtype, const Tile& tile, MixInputs in, const void* dn, void* dtheta, int64_t begin,
                         int64_t end, int64_t D);
  // Units [begin, end): dlogits (mixes,), and the weight of |N|^2 -> sums of dz and of d(d_plus). A class's mixes with
  // itself are left out.
  void (*backward_z)(DType dtype, const Tile& tile, MixInputs in, const void* theta, const void* dlogits, double square,
                     MixSums sums, int64_t begin, int64_t end, int64_t D);
};
GCAHNG_CPU_TABLES(MixCpu, mix)

namespace cuda {

// Launchers return a cudaError_t as a number, 0 for success. stream is a cudaStream_t; scratch: of as many values of
// the tile's type as the function before it says.
// theta (T, D) -> negatives (mixes, D) if not null, and logits = a . N and squares = |N|^2 (mixes,) if not null.
int launch_mix_forward(DType dtype, const Tile& tile, MixInputs in, const void* theta, void* negatives, void* logits,
                       void* squares, int64_t D, void* stream);
// dn (mixes, D) -> dtheta (T, D), both directions together.
int launch_mix_backward_theta(DType dtype, const Tile& tile, MixInputs in, const void* dn, void* dtheta, int64_t D,
                              void* stream);
int64_t mix_backward_z_scratch(const Tile& tile, int64_t D);
// dlogits (mixes,), and the weight of |N|^2: adds to dz (classes + reach, K, D) and d_d_plus (classes + reach, K). A
// class's mixes with itself are left out.
int launch_mix_backward_z(DType dtype, const Tile& tile, MixInputs in, const void* theta, const void* dlogits,
                          double square, void* dz, void* d_d_plus, void* scratch, int64_t D, void* stream);

}  // namespace cuda

}  // namespace gcahng
