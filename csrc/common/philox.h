// Philox-4x32-10, the first two words: the dropout of an edge (gcahng/reference/philox.py says what is drawn).
#pragma once
#include "dtype.h"

namespace gcahng {

struct Dropout {
  uint64_t seed;
  uint32_t layer, threshold;  // threshold 0: nothing is dropped
  bool tied;                  // (i, j) and (j, i) share a draw
  double scale;               // of weights that are not dropped, 1 / (1 - p)
  const int64_t* draw;        // (1,): the number of the pass, where the edges are
};

namespace {

struct Words {
  uint32_t first, second;
};

GCAHNG_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    const uint32_t next0 = uint32_t(p1 >> 32) ^ c1 ^ k0, next2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = next0, c1 = uint32_t(p1), c2 = next2, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// What the attention weights of nodes i and j are multiplied with: 0, or the scale.
template <class T>
GCAHNG_HD void masks_of(const Dropout& dropout, int64_t i, int64_t j, T& mask_i, T& mask_j) {
  mask_i = mask_j = T(1);
  if (dropout.threshold == 0) return;
  const bool swap = dropout.tied && i > j;
  const uint32_t a = static_cast<uint32_t>(swap ? j : i), b = static_cast<uint32_t>(swap ? i : j);
  const Words words = philox(a, b, dropout.layer, static_cast<uint32_t>(*dropout.draw), dropout.seed);
  const T first = words.first >= dropout.threshold ? T(dropout.scale) : T(0);
  const T second = words.second >= dropout.threshold ? T(dropout.scale) : T(0);
  mask_i = swap ? second : first;
  mask_j = swap ? first : second;
}

}  // namespace
}  // namespace gcahng
