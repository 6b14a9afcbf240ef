// What the stages that know the tile share: its edges, and sums at their two ends. Included by csrc/cpu/<stem>.cpp
// alone: internal linkage throughout.
#pragma once
#include "../common/tile.h"
#include "rows.h"

namespace gcahng {
namespace {

// A unit of work: anchor class a of the tile, and its offsets [o0, o1).
struct Unit {
  int64_t number, a, o0, o1;
};
inline Unit unit_of(const Tile& tile, int64_t number) {
  const int64_t o0 = number % tile.chunks() * tile.width(), o1 = o0 + tile.width();
  return {number, number / tile.chunks(), o0, o1 < tile.O ? o1 : tile.O};
}

struct Edge {
  int64_t row;             // of the tile
  int64_t anchor, column;  // its nodes
  int64_t end;             // the column's place among the anchor class's (O, K)
  bool mirrored;           // whether it stands for both directions
};

// Calls f(edge) for the unit's edges at one view of the anchor class.
template <class F>
inline void each_edge(const Tile& tile, const Unit& unit, int64_t i, F f) {
  for (int64_t o = unit.o0; o < unit.o1; ++o)
    for (int64_t v = 0; v < tile.K; ++v)
      f(Edge{tile.row(unit.a, i, o, v), tile.anchor(unit.a, i), tile.column(unit.a, o, v), o * tile.K + v,
             o >= tile.mirrored});
}
// Calls f(edge) for all of the unit's edges.
template <class F>
inline void each_edge(const Tile& tile, const Unit& unit, F f) {
  for (int64_t i = 0; i < tile.K; ++i) each_edge(tile, unit, i, f);
}

// A unit's sums of W values: rows (K, W) and the anchor class's columns (O, K, W).
template <class T>
struct UnitSums {
  T *rows, *columns;
  int64_t W;
  T* row(int64_t i) const { return rows + i * W; }
  T* column(const Edge& edge) const { return columns + edge.end * W; }
};
// Clears those that the unit adds to.
template <class T>
inline UnitSums<T> start_sums(const EndSums& sums, const Tile& tile, const Unit& unit, int64_t W) {
  const UnitSums<T> own{typed<T>(sums.rows) + unit.number * tile.K * W,
                        typed<T>(sums.columns) + unit.a * tile.O * tile.K * W, W};
  fill(own.rows, tile.K * W);
  fill(own.columns + unit.o0 * tile.K * W, (unit.o1 - unit.o0) * tile.K * W);
  return own;
}

}  // namespace
}  // namespace gcahng
