// What the stages that know the tile share: its edges, and sums over edges at their two ends, in an order that depends
// on the tile alone.
//
// Every edge is read once. A block takes a group of anchors that follow each other (of several classes where these have
// few views) and a chunk of their columns, and leaves what it adds to each of these nodes in a place of its own. A
// second kernel adds these up node by node.
#pragma once
#include <numeric>

#include "../common/tile.h"
#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kBlocks = 2;  // on a multiprocessor, at least: left alone, the compiler aims at more and spills

// Edges are numbered in 32 bits, their channels in 64.
inline bool numbered(const Tile& tile) { return tile.rows() <= kMaxBlocks; }

// Channels a thread takes at once, as a type.
template <int N>
struct Width {};

struct Edge {
  int64_t row;
  int a, i, o, v;  // as Tile numbers them
};

__device__ __forceinline__ Edge edge_of(const Tile& tile, int64_t row) {
  const unsigned K = static_cast<unsigned>(tile.K), O = static_cast<unsigned>(tile.O);
  const unsigned column = static_cast<unsigned>(row) / K, anchor = column / O;
  return {row, static_cast<int>(anchor / K), static_cast<int>(anchor % K), static_cast<int>(column % O),
          static_cast<int>(static_cast<unsigned>(row) % K)};
}

// Tile::node, without a division: offsets are less than the classes, so a column is wrapped once at most.
__device__ __forceinline__ int64_t node_of(const Tile& tile, int64_t column) {
  const int64_t nodes = tile.classes * tile.K;
  return column < nodes ? column : column - nodes;
}

// f(edge, d, sums) for each edge and pack of N channels of a block; see each_column.
template <int S, int N, class A, class F>
__device__ __forceinline__ void each_edge(const Tile& tile, const ColumnGrid& grid, A* part, F f) {
  const int K = static_cast<int>(tile.K), O = static_cast<int>(tile.O);
  const int step_o = kColumnRows / K, step_v = kColumnRows % K;
  Edge edge = edge_of(tile, first_row(grid));
  each_column<S, N>(grid, part, [&](int64_t row, int64_t d, auto& sums) {
    edge.row = row;
    f(static_cast<const Edge&>(edge), d, sums);
    edge.o += step_o;
    edge.v += step_v;
    if (edge.v >= K) edge.v -= K, ++edge.o;
    while (edge.o >= O) {
      edge.o -= O;
      if (++edge.i == K) edge.i = 0, ++edge.a;
    }
  });
}

// Sums at nodes are of a Term:
//   T, N: the type of sums, channels a thread; kPlanes: sums of D channels; kNumber: whether there is a sum of a number
//   kAnchors: anchors of a group, whose sums a thread has at once
//   add(edge, d, anchor, column): adds an edge's part of the sums at its anchor and at its column.
template <class T, int N, int kPlanes>
struct Sum {
  Pack<T, N> planes[kPlanes];
  T number;
};
// All of it but `add`, which is what the second kernel needs: terms that agree in the rest share that kernel.
template <class T_, int N_, int kPlanes_, bool kNumber_>
struct Parts {
  using T = T_;
  static constexpr int N = N_, kPlanes = kPlanes_;
  static constexpr bool kNumber = kNumber_;
};
template <class Term>
using PartsOf = Parts<typename Term::T, Term::N, Term::kPlanes, Term::kNumber>;
template <class Term>
using SumOf = Sum<typename Term::T, Term::N, Term::kPlanes>;

// Sums of several nodes: planes (nodes, D), numbers (nodes).
template <class T, int kPlanes>
struct Places {
  T* planes[kPlanes];
  T* numbers;
};
template <class Term>
using PlacesOf = Places<typename Term::T, Term::kPlanes>;

// How blocks share a tile.
struct EndGrid {
  int anchors;          // of a group
  int chunk;            // columns of a block, at most
  int groups, columns;  // columns of a group, at most: from its first anchor's first one on
  int chunks;           // blocks of a group
  int blocks() const { return groups * chunks; }
};
inline EndGrid end_grid(const Tile& tile, int64_t anchors, int64_t chunk) {
  // A group begins at a multiple of `anchors`, so at most this far from its class's end.
  const int64_t furthest = tile.K - std::gcd(anchors, tile.K);
  const int64_t columns = (tile.O + (furthest + anchors - 1) / tile.K) * tile.K;
  return {static_cast<int>(anchors), static_cast<int>(chunk), static_cast<int>(ceil_div(tile.A * tile.K, anchors)),
          static_cast<int>(columns), static_cast<int>(ceil_div(columns, chunk))};
}

// A block's part of it.
struct EndBlock {
  int group, chunk;
  int first, count;  // anchors a K + i
  int a;             // the first one's class; columns are counted from that class's first one on
  int begin, end;    // columns

  __device__ __forceinline__ EndBlock(const Tile& tile, const EndGrid& grid, int number)
      : group(number / grid.chunks), chunk(number % grid.chunks), first(group * grid.anchors) {
    const int K = static_cast<int>(tile.K), anchors = static_cast<int>(tile.A) * K;
    count = anchors - first < grid.anchors ? anchors - first : grid.anchors;
    a = first / K;
    const int columns = ((first + count - 1) / K - a + static_cast<int>(tile.O)) * K;
    begin = chunk * grid.chunk;
    end = columns - begin < grid.chunk ? columns : begin + grid.chunk;
  }
  // The places of what it adds to one of its anchors, and to a column.
  __device__ __forceinline__ int64_t row_place(const EndGrid& grid, int anchor) const {
    return static_cast<int64_t>(first + anchor) * grid.chunks + chunk;
  }
  __device__ __forceinline__ int64_t column_place(const EndGrid& grid, int column) const {
    return static_cast<int64_t>(group) * grid.columns + column;
  }
};

// What blocks leave: rows (anchors, chunks), columns (groups, grid.columns).
template <class T, int kPlanes>
struct EndParts {
  Places<T, kPlanes> rows, columns;
};
inline int64_t end_places(const Tile& tile, const EndGrid& grid) {
  return tile.A * tile.K * grid.chunks + static_cast<int64_t>(grid.groups) * grid.columns;
}
// Values of scratch for them.
inline int64_t end_scratch(const Tile& tile, const EndGrid& grid, int64_t D, int planes, int numbers) {
  return end_places(tile, grid) * (planes * D + numbers);
}
template <int kPlanes, class T>
EndParts<T, kPlanes> end_parts(const Tile& tile, const EndGrid& grid, T* scratch, int64_t D) {
  const int64_t places = end_places(tile, grid), rows = tile.A * tile.K * grid.chunks;
  EndParts<T, kPlanes> parts;
  for (int plane = 0; plane < kPlanes; ++plane) {
    parts.rows.planes[plane] = scratch + plane * places * D;
    parts.columns.planes[plane] = parts.rows.planes[plane] + rows * D;
  }
  parts.rows.numbers = scratch + kPlanes * places * D;
  parts.columns.numbers = parts.rows.numbers + rows;
  return parts;
}

template <class Term>
__device__ __forceinline__ void add_from(const PlacesOf<Term>& places, int64_t place, int64_t d, int64_t D,
                                         SumOf<Term>& sum) {
#pragma unroll
  for (int plane = 0; plane < Term::kPlanes; ++plane) {
    const auto values = read<typename Term::T, Term::N>(places.planes[plane] + place * D + d);
#pragma unroll
    for (int n = 0; n < Term::N; ++n) sum.planes[plane].v[n] += values.v[n];
  }
  if (Term::kNumber && d == 0) sum.number += places.numbers[place];  // of the first channel's thread alone
}
template <class Term>
__device__ __forceinline__ void put(const PlacesOf<Term>& places, int64_t place, int64_t d, int64_t D,
                                    const SumOf<Term>& sum) {
#pragma unroll
  for (int plane = 0; plane < Term::kPlanes; ++plane) write(places.planes[plane] + place * D + d, sum.planes[plane]);
  if (Term::kNumber && d == 0) places.numbers[place] = sum.number;
}

// Adds the sums of a block's thread rows in their order and puts them (kAdd: adds them to what is) there.
template <class Term, bool kAdd>
__device__ __forceinline__ void put_block(const PlacesOf<Term>& places, int64_t place, int64_t d, int64_t D,
                                          SumOf<Term>& sum) {
  using T = typename Term::T;
  constexpr int N = Term::N, kCount = Term::kPlanes * N + Term::kNumber;
  GCAHNG_SHARED(T, shared, kColumnRows * kCount * kColumnLanes);
  const auto at = [&](int row, int k) -> T& { return shared[(row * kCount + k) * kColumnLanes + threadIdx.x]; };
#pragma unroll
  for (int k = 0; k < Term::kPlanes * N; ++k) at(threadIdx.y, k) = sum.planes[k / N].v[k % N];
  if (Term::kNumber) at(threadIdx.y, kCount - 1) = sum.number;
  __syncthreads();
  if (threadIdx.y == 0 && d < D) {
#pragma unroll
    for (int k = 0; k < Term::kPlanes * N; ++k)
      for (int row = 1; row < kColumnRows; ++row) sum.planes[k / N].v[k % N] += at(row, k);
    if (Term::kNumber)
      for (int row = 1; row < kColumnRows; ++row) sum.number += at(row, kCount - 1);
    if (kAdd) add_from<Term>(places, place, d, D, sum);
    put<Term>(places, place, d, D, sum);
  }
}

constexpr int64_t kChunk = 64;  // columns of a block

// A block takes kColumnLanes N channels; its thread rows take turns at the columns, and each sums those of a column and
// of all of the group's anchors on its own.
template <class Term>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, kBlocks)
    end_sums_kernel(Term term, Tile tile, EndGrid grid, EndParts<typename Term::T, Term::kPlanes> parts, int64_t D,
                    int slices) {
  constexpr int kAnchors = Term::kAnchors;
  const EndBlock block(tile, grid, blockIdx.x / slices);
  const int K = static_cast<int>(tile.K), O = static_cast<int>(tile.O), edges = O * K;
  const int64_t d = (static_cast<int>(blockIdx.x % slices) * kColumnLanes + static_cast<int>(threadIdx.x)) * Term::N;
  SumOf<Term> sums[kAnchors] = {};
  if (d < D) {
    for (int column = block.begin + static_cast<int>(threadIdx.y); column < block.end; column += kColumnRows) {
      const int c = block.a + column / K, v = column % K;
      SumOf<Term> sum{};
#pragma unroll
      for (int k = 0; k < kAnchors; ++k) {
        const int anchor = block.first + k, a = anchor / K, o = c - a;
        if (k >= block.count || o < 0 || o >= O) continue;
        term.add(Edge{static_cast<int64_t>(anchor) * edges + (o * K + v), a, anchor - a * K, o, v}, d, sums[k], sum);
      }
      put<Term>(parts.columns, block.column_place(grid, column), d, D, sum);
    }
  }
#pragma unroll
  for (int k = 0; k < kAnchors; ++k) {
    if (k >= block.count) break;
    if (k) __syncthreads();
    put_block<Term, false>(parts.rows, block.row_place(grid, k), d, D, sums[k]);
  }
}

// Adds to each node of `into` all that the tile has for it: an anchor's parts, then a column's, of anchors that it is
// at offset `skip` or a larger one of. A block takes one node and kColumnLanes N channels. `gap`: classes between the
// anchors and the columns.
template <class Term>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, kBlocks)
    node_sums_kernel(Tile tile, EndGrid grid, EndParts<typename Term::T, Term::kPlanes> parts, PlacesOf<Term> into,
                     int64_t D, int slices, int skip, int gap) {
  const int K = static_cast<int>(tile.K), A = static_cast<int>(tile.A), O = static_cast<int>(tile.O);
  const int node = blockIdx.x / slices, v = node % K, place = node / K;
  const int c = place < A ? place : place + gap;         // classes from the first anchor class
  const int across = c - static_cast<int>(tile.offset);  // a + o of the edges whose column this is
  const int64_t d = (static_cast<int>(blockIdx.x % slices) * kColumnLanes + static_cast<int>(threadIdx.x)) * Term::N;
  SumOf<Term> sum{};
  if (d < D) {
    if (c < A) {
      for (int chunk = threadIdx.y; chunk < grid.chunks; chunk += kColumnRows)
        add_from<Term>(parts.rows, (static_cast<int64_t>(c) * K + v) * grid.chunks + chunk, d, D, sum);
    }
    const int from = across - O + 1 > 0 ? across - O + 1 : 0, last = across - skip < A - 1 ? across - skip : A - 1;
    if (from <= last) {
      const int stop = ((last + 1) * K - 1) / grid.anchors;
      for (int group = from * K / grid.anchors + static_cast<int>(threadIdx.y); group <= stop; group += kColumnRows) {
        const int column = (across - group * grid.anchors / K) * K + v;
        add_from<Term>(parts.columns, static_cast<int64_t>(group) * grid.columns + column, d, D, sum);
      }
    }
  }
  put_block<Term, true>(into, (tile.first + c) * K + v, d, D, sum);
}

// Adds the parts to node tensors (classes + reach, K, D | 1); nothing comes to columns before offset `skip`.
template <class Term>
int launch_node_sums(const Tile& tile, const EndGrid& grid, const EndParts<typename Term::T, Term::kPlanes>& parts,
                     PlacesOf<Term> into, int64_t skip, int64_t D, void* stream) {
  const int64_t slices = ceil_div(D, kColumnLanes * Term::N);
  const int64_t start = tile.offset + skip, end = tile.offset + tile.A + tile.O - 1;
  const int64_t gap = start > tile.A ? start - tile.A : 0, classes = skip < tile.O && end > tile.A ? end - gap : tile.A;
  if (slices * classes * tile.K > kMaxBlocks) return cudaErrorInvalidConfiguration;
  GCAHNG_LAUNCH((node_sums_kernel<Term>), dim3(slices * classes * tile.K), dim3(kColumnLanes, kColumnRows), stream,
                tile, grid, parts, into, D, static_cast<int>(slices), static_cast<int>(skip), static_cast<int>(gap));
  return cudaGetLastError();
}

// Values of scratch for add_node_sums.
template <class Term>
int64_t node_sums_scratch(const Tile& tile, int64_t D) {
  return end_scratch(tile, end_grid(tile, Term::kAnchors, kChunk), D, Term::kPlanes, Term::kNumber);
}

// Adds a tile's sums to node tensors (classes + reach, K, D | 1); nothing comes to columns before offset `skip`.
template <class Term>
int add_node_sums(const Term& term, const Tile& tile, int64_t skip, typename Term::T* scratch, PlacesOf<Term> into,
                  int64_t D, void* stream) {
  const EndGrid grid = end_grid(tile, Term::kAnchors, kChunk);
  const int64_t slices = ceil_div(D, kColumnLanes * Term::N);
  if (slices * grid.blocks() > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const auto parts = end_parts<Term::kPlanes>(tile, grid, scratch, D);
  GCAHNG_LAUNCH((end_sums_kernel<Term>), dim3(slices * grid.blocks()), dim3(kColumnLanes, kColumnRows), stream, term,
                tile, grid, parts, D, static_cast<int>(slices));
  const int error = cudaGetLastError();
  return error ? error : launch_node_sums<PartsOf<Term>>(tile, grid, parts, into, skip, D, stream);
}

}  // namespace
}  // namespace gcahng::cuda
