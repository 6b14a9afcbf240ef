#include "../mlp_out.h"

#include "norm_gelu.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kForwardWarps = 8;     // rows of a block
constexpr int64_t kMaxParts = 1024;  // blocks of the backward, each with partial sums of its own
constexpr int64_t kLeastRows = 4;    // of each of their warps, if there are as many
constexpr int kSums = 4;             // dgamma, dbeta, ds, ds rstd mean

template <class T, class E, class L>
struct ForwardTensors {
  const T *mean, *rstd, *w, *d, *gamma, *beta;
  E* s;
  Out<T, L> out;
};

template <class T, class E, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kForwardWarps, 1)
    mlp_out_forward_kernel(const L* __restrict__ product, const E* __restrict__ e1, ForwardTensors<T, E, L> p,
                           int64_t rows, int64_t channels) {
  constexpr int N = Shape::N;
  const int64_t D = Shape::width(channels);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kForwardWarps + warp_number();
  if (row >= rows) return;
  const int64_t at = row * D;
  const T center = p.mean[row], inverse = p.rstd[row];
  const auto in = [&](int, int d) {
    Pack<T, N> x = read<T, N>(product + at + d);
    const Pack<T, N> residual = read<T, N>(e1 + at + d), fold = read<T, N>(p.w + d), shift = read<T, N>(p.d + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = (x.v[n] - center * fold.v[n]) * inverse + shift.v[n] + residual.v[n];
    write(p.s + at + d, x);
    return rounded<E>(x);  // what goes on is what is stored
  };
  if (!p.out.full && !p.out.low) return each_pack<Shape>(D, [&](int k, int d) { in(k, d); });
  norm_gelu_row<T, Shape>(D, p.gamma, p.beta, in,
                          [&](int, int d, const Pack<T, N>& value) { p.out.put(at + d, value); });
}

template <class T, class E, class L>
struct BackwardTensors {
  const E* dy;
  const T *mean, *rstd, *w, *d, *gamma;
  E* ds;            // may be dy
  L *low, *scaled;  // low: or null, where it is ds
  T *mean_dn, *mean_n_dn;
  T* part;  // (kSums, blocks, D)
};

template <class T, class E, class L, class Shape>
__global__ void __launch_bounds__(kWarp* BlockSums<T, Shape, kSums>::kWarps, BlockSums<T, Shape, kSums>::kBlocks)
    mlp_out_backward_kernel(const E* __restrict__ s, const E* __restrict__ e1, BackwardTensors<T, E, L> p, int64_t rows,
                            int64_t channels) {
  constexpr int N = Shape::N;
  using Sums = BlockSums<T, Shape, kSums>;
  GCAHNG_SHARED(T, memory, Sums::kValues);
  const int64_t D = Shape::width(channels);
  using Slope = std::conditional_t<Sums::kRegisters, Parked<T, Shape>, Unparked<T, Shape>>;
  Sums sums{memory};
  if (p.part) sums.clear(D);
  const T each = reciprocal(T(4 * D));
  const int64_t step = static_cast<int64_t>(gridDim.x) * Sums::kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Sums::kWarps + warp_number(); row < rows; row += step) {
    const int64_t at = row * D;
    const T center = p.mean[row], inverse = p.rstd[row];
    T first = 0, second = 0;
    const auto in = [&](int, int d) { return read<T, N>(s + at + d); };
    const auto upstream = [&](int, int d) { return read<T, N>(p.dy + at + d); };
    norm_gelu_row_backward<T, Shape>(
        D, p.gamma, Slope{sums.at(0, 0)}, in, upstream,
        [&](int k, int d, const Pack<T, N>& dt, const Pack<T, N>& dy, const Pack<T, N>& normalized) {
          const Pack<T, N> sum = in(k, d), residual = read<T, N>(e1 + at + d), fold = read<T, N>(p.w + d),
                           shift = read<T, N>(p.d + d);
          Pack<T, N> scaled, mean;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            first += dt.v[n] * fold.v[n];
            second += dt.v[n] * (sum.v[n] - residual.v[n] - shift.v[n]);
            scaled.v[n] = dt.v[n] * inverse;
            mean.v[n] = center;
          }
          write(p.ds + at + d, dt);
          if constexpr (!std::is_same_v<E, L>) {  // else low is ds
            if (p.low) write(p.low + at + d, dt);
          }
          write(p.scaled + at + d, scaled);
          if (!p.part) return;
          sums.add(0, k, d, dy, normalized);
          sums.add(1, k, d, dy);
          sums.add(2, k, d, dt);
          sums.add(3, k, d, scaled, mean);
        });
    first = warp_sum(first) * each;
    second = warp_sum(second) * each;
    if (threadIdx.x == 0) {
      p.mean_dn[row] = first;
      p.mean_n_dn[row] = second;
    }
  }
  if (p.part) sums.write(p.part, blockIdx.x, gridDim.x, D);
}

int64_t backward_parts(int64_t T, int64_t warps) {
  const int64_t blocks = ceil_div(T, kLeastRows * warps);
  return blocks < kMaxParts ? blocks : kMaxParts;
}

}  // namespace

int launch_mlp_out_forward(const MlpOutForward& args, void* stream) {
  const int64_t D = args.D;
  if (D > kMaxChannels) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(args.T, kForwardWarps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (args.T * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class A, class E, class L>(A*, E*, L*) {
    const L* product = typed<L>(args.product);
    const E* e1 = typed<E>(args.e1);
    const ForwardTensors<A, E, L> p{
        .mean = typed<A>(args.moments.mean),
        .rstd = typed<A>(args.moments.rstd),
        .w = typed<A>(args.fold.w),
        .d = typed<A>(args.fold.d),
        .gamma = typed<A>(args.norm.gamma),
        .beta = typed<A>(args.norm.beta),
        .s = typed<E>(args.s),
        .out = out_of<A, L>(args.out),
    };
    const bool aligned = wide<A>(D, product, e1, p.w, p.d, p.gamma, p.beta, p.s, p.out.full, p.out.low);
    return with_row_shape<A>(D, aligned, [&]<class Shape>(Shape) {
      GCAHNG_LAUNCH((mlp_out_forward_kernel<A, E, L, Shape>), dim3(blocks), dim3(kWarp, kForwardWarps), stream, product,
                    e1, p, args.T, D);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

int64_t mlp_out_backward_scratch(const MlpOutBackward& args) {
  return args.sums ? kSums * backward_parts(args.T, 1) * args.D : 0;
}

int launch_mlp_out_backward(const MlpOutBackward& args, void* scratch, void* stream) {
  const int64_t D = args.D;
  if (D > kMaxChannels) return cudaErrorInvalidValue;
  if (args.T * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class A, class E, class L>(A*, E*, L*) {
    const E *s = typed<E>(args.s), *e1 = typed<E>(args.e1);
    const BackwardTensors<A, E, L> p{
        .dy = typed<E>(args.dy),
        .mean = typed<A>(args.moments.mean),
        .rstd = typed<A>(args.moments.rstd),
        .w = typed<A>(args.fold.w),
        .d = typed<A>(args.fold.d),
        .gamma = typed<A>(args.gamma),
        .ds = typed<E>(args.ds),
        .low = args.low == args.ds ? nullptr : typed<L>(args.low),
        .scaled = typed<L>(args.scaled),
        .mean_dn = typed<A>(args.mean_dn),
        .mean_n_dn = typed<A>(args.mean_n_dn),
        .part = args.sums ? typed<A>(scratch) : nullptr,
    };
    const bool aligned = wide<A>(D, s, e1, p.dy, p.w, p.d, p.gamma, p.ds, p.low, p.scaled);
    return with_row_shape<A>(D, aligned, [&]<class Shape>(Shape) {
      constexpr int kWarps = BlockSums<A, Shape, kSums>::kWarps;
      const int64_t parts = backward_parts(args.T, kWarps);
      GCAHNG_LAUNCH((mlp_out_backward_kernel<A, E, L, Shape>), dim3(parts), dim3(kWarp, kWarps), stream, s, e1, p,
                    args.T, D);
      const int error = cudaGetLastError();
      return error || !p.part ? error : launch_add_partials(p.part, typed<A>(args.sums), kSums, parts, D, stream);
    });
  });
}

}  // namespace gcahng::cuda
