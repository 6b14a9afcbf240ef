// A tile of edges (A, K, O, K, D): anchor class and view, offset of the other class, its view
// (gcahng/engine/schedule.py).
#pragma once
#include "dtype.h"

namespace gcahng {

constexpr int64_t kMaxViews = 64;  // K, of every tile

struct Tile {
  int64_t A, K, O;
  int64_t first;     // anchor class
  int64_t offset;    // first offset
  int64_t mirrored;  // offsets from here on stand for both directions
  int64_t classes;   // C

  GCAHNG_HD int64_t rows() const { return A * K * O * K; }
  GCAHNG_HD int64_t row(int64_t a, int64_t i, int64_t o, int64_t v) const { return ((a * K + i) * O + o) * K + v; }
  // Places in a node tensor of classes + reach classes, whose last ones repeat the first.
  GCAHNG_HD int64_t anchor(int64_t a, int64_t i) const { return (first + a) * K + i; }
  GCAHNG_HD int64_t column(int64_t a, int64_t o, int64_t v) const { return (first + a + offset + o) * K + v; }
  // The node itself.
  GCAHNG_HD int64_t node(int64_t column) const { return column % (classes * K); }

  // A unit of work: one anchor class and `width` offsets, or what is left of them. Sums over edges are formed unit by
  // unit and then added up in order, so that they depend on the tile alone and not on who computed what.
  GCAHNG_HD int64_t width() const {
    const int64_t offsets = 64 / (K * K);
    return offsets < 1 ? 1 : offsets;
  }
  GCAHNG_HD int64_t chunks() const { return (O + width() - 1) / width(); }
  GCAHNG_HD int64_t units() const { return A * chunks(); }
};

}  // namespace gcahng
