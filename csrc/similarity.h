// 1 - cos of a tile's negatives and their anchors, and its gradient. N is the number of negatives, n of nodes.
#pragma once
#include "common/arguments.h"
#include "cpu/tables.h"

namespace gcahng {

struct SimilarityForward {
  DType dtype;
  const void* anchors;    // (n, D)
  const int64_t* node;    // (N,): whose anchor a negative's is
  const void* negatives;  // (N, D)
  const bool* counted;    // (N,): the loss is 0 where it is not set
  double scale;
  void* loss;  // (N,)
  void* dn;    // (N, D), to which scale dloss/dnegatives is added, or null
  int64_t N, D;
};

struct SimilarityCpu {
  // Rows.
  void (*forward)(const SimilarityForward& args, int64_t begin, int64_t end);
};
GCAHNG_CPU_TABLES(SimilarityCpu, similarity)

namespace cuda {

int launch_similarity_forward(const SimilarityForward& args, void* stream);

}  // namespace cuda
}  // namespace gcahng
