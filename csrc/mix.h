// Mixing on a tile, in both directions of its pairs of classes. See docs/math/mix.md.
//
// A mix is numbered like the negatives: forward (A, K, O): anchor class and view, offset of the negatives' class; and
// behind them, back (A, O', K) with O' = O - mirrored: the anchors are the columns, the negatives the anchor class's
// views.
#pragma once
#include "common/arguments.h"
#include "common/tile.h"
#include "cpu/blocks.h"
#include "cpu/tables.h"

namespace gcahng {

constexpr int64_t mixes_of(const Tile& tile) { return tile.A * tile.K * (2 * tile.O - tile.mirrored); }

struct MixInputs {
  const void* z;       // (classes + reach, K, D)
  const void* d_plus;  // (classes + reach, K): the distances to the positives
  const void* kappa;   // (K, K)
  const void* pull;    // (1,)
};

struct MixForward {
  DType dtype;
  Tile tile;
  MixInputs inputs;
  const void* theta;       // (T, D)
  void* negatives;         // (mixes, D): N, or null
  void *logits, *squares;  // (mixes,) each: a . N and |N|^2, or both null
  int64_t D;
  DType edge_type;
};

struct MixBackwardTheta {
  DType dtype;
  Tile tile;
  MixInputs inputs;
  const void* dn;  // (mixes, D)
  void* dtheta;    // (T, D), both directions together
  int64_t D;
  DType edge_type;
};

// The gradient of N is either dn itself, or that of logits a . N and of |N|^2, square N + dlogits a, and then the
// anchor's own part of the logits, dlogits N, is added. A class's mixes with itself are no negatives: dlogits leaves
// them out, dn has them.
struct MixBackwardZ {
  DType dtype;
  Tile tile;
  MixInputs inputs;
  const void* theta;    // (T, D)
  const void* dlogits;  // (mixes,), or null
  double square;        // the weight of |N|^2, beside dlogits
  const void* dn;       // (mixes, D), or null: exactly one of it and dlogits is given
  void* dz;             // (classes + reach, K, D), added to
  void* dd_plus;        // (classes + reach, K), added to
  int64_t D;
  DType edge_type;
};

// The tile's part of dz, of D values, and of dd_plus, of one.
struct MixSums {
  EndSums z, d_plus;
};

struct MixCpu {
  // Units, all of them.
  void (*forward)(const MixForward& args, int64_t begin, int64_t end);
  void (*backward_theta)(const MixBackwardTheta& args, int64_t begin, int64_t end);
  void (*backward_z)(const MixBackwardZ& args, const MixSums& sums, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(MixCpu, mix)

namespace cuda {

int launch_mix_forward(const MixForward& args, void* stream);
int launch_mix_backward_theta(const MixBackwardTheta& args, void* stream);
int64_t mix_backward_z_scratch(const MixBackwardZ& args);
int launch_mix_backward_z(const MixBackwardZ& args, void* scratch, void* stream);

}  // namespace cuda
}  // namespace gcahng
