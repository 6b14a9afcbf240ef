// Sums over a tile's edges as the CPU forms them, before they are added up in order.
#pragma once
#include <cstdint>

namespace gcahng {

// Rows whose sums are formed together.
constexpr int64_t kBlockRows = 32;

namespace {
inline int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
}  // namespace

// Sums of W values at the two ends of a tile's edges: rows (units, K, W), over the offsets of a unit, and columns
// (A, O, K, W), over the views of the anchor class.
struct EndSums {
  void *rows, *columns;
};

}  // namespace gcahng
