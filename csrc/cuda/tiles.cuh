// What the stages that know the tile share: its edges, and sums over edges at their two ends, in an order that depends
// on the tile alone.
#pragma once
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
  int a, i, o, v;
};

__device__ __forceinline__ Edge edge_of(const Tile& tile, int64_t row) {
  const unsigned K = static_cast<unsigned>(tile.K), O = static_cast<unsigned>(tile.O);
  const unsigned column = static_cast<unsigned>(row) / K, anchor = column / O;
  return {row, static_cast<int>(anchor / K), static_cast<int>(anchor % K), static_cast<int>(column % O),
          static_cast<int>(static_cast<unsigned>(row) % K)};
}

// Sums at nodes are of a Term:
//   T, N: the type of sums, channels a thread; kPlanes: sums of D channels; kNumber: whether there is a sum of a number
//   add<kColumn>(edge, d, sum): adds an edge's part of the sums at its anchor, or (kColumn) at its column.
template <class T, int N, int kPlanes>
struct Sum {
  Pack<T, N> planes[kPlanes];
  T number;
};
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

// Adds the sums of a block's thread rows in their order and puts them (kAdd: adds them to what is) there.
template <class Term, bool kAdd>
__device__ __forceinline__ void put(const PlacesOf<Term>& places, int64_t place, int64_t d, int64_t D,
                                    SumOf<Term>& sum) {
  using T = typename Term::T;
  constexpr int N = Term::N, kCount = Term::kPlanes * N + Term::kNumber;
  GCAHNG_SHARED(T, shared, kColumnRows * kCount * kColumnLanes);
  const auto at = [&](int row, int k) -> T& { return shared[(row * kCount + k) * kColumnLanes + threadIdx.x]; };
#pragma unroll
  for (int k = 0; k < Term::kPlanes * N; ++k) at(threadIdx.y, k) = sum.planes[k / N].v[k % N];
  if (Term::kNumber) at(threadIdx.y, kCount - 1) = sum.number;
  __syncthreads();
  if (threadIdx.y != 0 || d >= D) return;
#pragma unroll
  for (int k = 0; k < Term::kPlanes * N; ++k)
    for (int row = 1; row < kColumnRows; ++row) sum.planes[k / N].v[k % N] += at(row, k);
  if (Term::kNumber)
    for (int row = 1; row < kColumnRows; ++row) sum.number += at(row, kCount - 1);
  if (kAdd) add_from<Term>(places, place, d, D, sum);
#pragma unroll
  for (int plane = 0; plane < Term::kPlanes; ++plane) write(places.planes[plane] + place * D + d, sum.planes[plane]);
  if (Term::kNumber && d == 0) places.numbers[place] = sum.number;
}

constexpr int64_t kChunk = 64;  // edges of an anchor that one block sums
inline int64_t chunks_of(const Tile& tile) { return ceil_div(tile.O * tile.K, kChunk); }

// parts (A, K, chunks): of anchor (a, i), over kChunk of its edges. A block takes one of them and kColumnLanes N
// channels.
template <class Term>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, kBlocks)
    anchor_sums_kernel(Term term, Tile tile, PlacesOf<Term> parts, int64_t D, int slices, int chunks) {
  const int part = blockIdx.x / slices, chunk = part % chunks, node = part / chunks;
  const int K = static_cast<int>(tile.K), edges = static_cast<int>(tile.O) * K;
  const int first = chunk * static_cast<int>(kChunk), left = edges - first;
  const int stop = first + (left < kChunk ? left : static_cast<int>(kChunk));
  const int64_t d = (static_cast<int64_t>(blockIdx.x % slices) * kColumnLanes + threadIdx.x) * Term::N;
  SumOf<Term> sum{};
  if (d < D) {
    for (int s = first + threadIdx.y; s < stop; s += kColumnRows)
      term.template add<false>(Edge{static_cast<int64_t>(node) * edges + s, node / K, node % K, s / K, s % K}, d, sum);
  }
  put<Term, false>(parts, part, d, D, sum);
}

// Adds to each node of `into` all that the tile has for it: an anchor's parts, then a column's edges from offset `skip`
// on. A block takes one node and kColumnLanes N channels. `gap`: classes between the anchors and the columns.
template <class Term>
__global__ void __launch_bounds__(kColumnLanes* kColumnRows, kBlocks)
    node_sums_kernel(Term term, Tile tile, PlacesOf<Term> parts, PlacesOf<Term> into, int64_t D, int slices, int chunks,
                     int skip, int gap) {
  const int K = static_cast<int>(tile.K), A = static_cast<int>(tile.A), O = static_cast<int>(tile.O);
  const int node = blockIdx.x / slices, v = node % K, place = node / K;
  const int c = place < A ? place : place + gap;         // classes from the first anchor class
  const int across = c - static_cast<int>(tile.offset);  // a + o of the edges whose column this is
  const int64_t d = (static_cast<int64_t>(blockIdx.x % slices) * kColumnLanes + threadIdx.x) * Term::N;
  SumOf<Term> sum{};
  if (d < D) {
    if (c < A) {
      for (int chunk = threadIdx.y; chunk < chunks; chunk += kColumnRows)
        add_from<Term>(parts, (static_cast<int64_t>(c) * K + v) * chunks + chunk, d, D, sum);
    }
    const int from = across - O + 1 > 0 ? across - O + 1 : 0, last = across - skip < A - 1 ? across - skip : A - 1;
    for (int s = from * K + threadIdx.y; s < (last + 1) * K; s += kColumnRows) {
      const int a = s / K, i = s % K, o = across - a;
      term.template add<true>(Edge{tile.row(a, i, o, v), a, i, o, v}, d, sum);
    }
  }
  put<Term, true>(into, (tile.first + c) * K + v, d, D, sum);
}

// Values of scratch for add_node_sums.
inline int64_t node_sums_scratch(const Tile& tile, int64_t D, int planes, int numbers) {
  return tile.A * tile.K * chunks_of(tile) * (planes * D + numbers);
}

// Adds a tile's sums to node tensors (classes + reach, K, D | 1); nothing comes to columns before offset `skip`.
template <class Term>
int add_node_sums(const Term& term, const Tile& tile, int64_t skip, typename Term::T* scratch, PlacesOf<Term> into,
                  int64_t D, void* stream) {
  const int64_t slices = ceil_div(D, kColumnLanes * Term::N), chunks = chunks_of(tile);
  const int64_t parts = tile.A * tile.K * chunks, start = tile.offset + skip, end = tile.offset + tile.A + tile.O - 1;
  const int64_t gap = start > tile.A ? start - tile.A : 0, classes = skip < tile.O && end > tile.A ? end - gap : tile.A;
  if (slices * parts > kMaxBlocks || slices * classes * tile.K > kMaxBlocks) return cudaErrorInvalidConfiguration;
  PlacesOf<Term> place;
  for (int plane = 0; plane < Term::kPlanes; ++plane) place.planes[plane] = scratch + plane * parts * D;
  place.numbers = scratch + Term::kPlanes * parts * D;
  const dim3 block(kColumnLanes, kColumnRows);
  GCAHNG_LAUNCH((anchor_sums_kernel<Term>), dim3(slices * parts), block, stream, term, tile, place, D,
                static_cast<int>(slices), static_cast<int>(chunks));
  const int error = cudaGetLastError();
  if (error) return error;
  GCAHNG_LAUNCH((node_sums_kernel<Term>), dim3(slices * classes * tile.K), block, stream, term, tile, place, into, D,
                static_cast<int>(slices), static_cast<int>(chunks), static_cast<int>(skip), static_cast<int>(gap));
  return cudaGetLastError();
}

}  // namespace
}  // namespace gcahng::cuda
