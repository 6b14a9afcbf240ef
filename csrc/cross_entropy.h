// Cross entropy of a tile's negatives under the classifier, and its gradient, a row of logits at a time. R is the
// number of rows, M of classes.
#pragma once
#include "common/arguments.h"
#include "cpu/tables.h"

namespace gcahng {

struct CrossEntropyForward {
  DType dtype, low_type;
  const void* logits;     // (R, M), low_type, without their bias
  const void* bias;       // (M,)
  const int64_t* labels;  // (R,)
  double scale;
  void* loss;  // (R,)
  void* d;     // (R, M), low_type: scale dloss/dlogits, or null; may be the logits
  int64_t R, M;
};

struct CrossEntropyCpu {
  // Rows.
  void (*forward)(const CrossEntropyForward& args, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(CrossEntropyCpu, cross_entropy)

namespace cuda {

int launch_cross_entropy_forward(const CrossEntropyForward& args, void* stream);

}  // namespace cuda
}  // namespace gcahng
