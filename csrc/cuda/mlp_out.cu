#include "../mlp_out.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kForwardWarps = 8;     // rows of a block
constexpr int64_t kMaxParts = 2048;  // blocks of the backward, each with partial sums of its own
constexpr int kSums = 4;             // dgamma, dbeta, ds, ds rstd mean

template <class T, class L>
struct ForwardTensors {
  const T *mean, *rstd, *w, *d, *gamma, *beta;
  T *s, *y;
  L* low;
};

template <class T, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kForwardWarps, 1)
    mlp_out_forward_kernel(const L* __restrict__ out, const T* __restrict__ e1, ForwardTensors<T, L> p, int64_t rows,
                         int64_t D) {
  constexpr int N = Shape::N;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kForwardWarps + threadIdx.y;
  if (row >= rows) return;
  const T center = p.mean[row], inverse = p.rstd[row];
  const auto in = [&](int64_t d) {
    Pack<T, N> x = read<T, N>(out + row * D + d);
    const Pack<T, N> residual = read<T, N>(e1 + row * D + d), fold = read<T, N>(p.w + d), shift = read<T, N>(p.d + d);
#pragma unroll
    for (int n = 0; n < N; ++n) x.v[n] = (x.v[n] - center * fold.v[n]) * inverse + shift.v[n] + residual.v[n];
    write(p.s + row * D + d, x);
    return x;
  };
  if (!p.y && !p.low) return each_pack<N, Shape::V>(D, [&](int, int64_t d) { in(d); });
  norm_gelu_row<T, N, Shape::V>(D, p.gamma, p.beta, in, [&](int64_t d, const Pack<T, N>& value) {
    if (p.y) write(p.y + row * D + d, value);
    if (p.low) write(p.low + row * D + d, value);
  });
}

template <class T, class L>
struct BackwardTensors {
  const T *dy, *mean, *rstd, *w, *d, *gamma;
  T* ds;  // may be dy
  L *low, *scaled;
  T *m1, *m2;
  T* part;  // (kSums, blocks, D)
};

template <class T, class L, class Shape>
__global__ void __launch_bounds__(kWarp* BlockSums<T, Shape, kSums>::kWarps, 1)
    mlp_out_backward_kernel(const T* __restrict__ s, const T* __restrict__ e1, BackwardTensors<T, L> p, int64_t rows,
                          int64_t D) {
  constexpr int N = Shape::N;
  using Sums = BlockSums<T, Shape, kSums>;
  GCAHNG_SHARED(T, memory, Sums::kValues);
  const Sums sums{memory};
  if (p.part) sums.clear(D);
  const int64_t step = static_cast<int64_t>(gridDim.x) * Sums::kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Sums::kWarps + threadIdx.y; row < rows; row += step) {
    const int64_t at = row * D;
    const T center = p.mean[row], inverse = p.rstd[row];
    T first = 0, second = 0;
    const auto in = [&](int64_t d) { return read<T, N>(s + at + d); };
    const auto upstream = [&](int64_t d) { return read<T, N>(p.dy + at + d); };
    norm_gelu_row_backward<T, N, Shape::V>(
        D, p.gamma, in, upstream,
        [&](int64_t d, const Pack<T, N>& dt, const Pack<T, N>& dy, const Pack<T, N>& normalised) {
          const Pack<T, N> sum = in(d), residual = read<T, N>(e1 + at + d), fold = read<T, N>(p.w + d),
                           shift = read<T, N>(p.d + d);
          Pack<T, N> scaled, mean, dgamma;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            first += dt.v[n] * fold.v[n];
            second += dt.v[n] * (sum.v[n] - residual.v[n] - shift.v[n]);
            scaled.v[n] = dt.v[n] * inverse;
            mean.v[n] = scaled.v[n] * center;
            dgamma.v[n] = dy.v[n] * normalised.v[n];
          }
          write(p.ds + at + d, dt);
          if (p.low) write(p.low + at + d, dt);
          write(p.scaled + at + d, scaled);
          if (!p.part) return;
          sums.add(0, d, dgamma);
          sums.add(1, d, dy);
          sums.add(2, d, dt);
          sums.add(3, d, mean);
        });
    first = warp_sum(first) / T(4 * D);
    second = warp_sum(second) / T(4 * D);
    if (threadIdx.x == 0) {
      p.m1[row] = first;
      p.m2[row] = second;
    }
  }
  if (p.part) sums.write(p.part, blockIdx.x, gridDim.x, D);
}

int64_t backward_parts(int64_t T, int64_t warps) {
  const int64_t blocks = ceil_div(T, warps);
  return blocks < kMaxParts ? blocks : kMaxParts;
}

}  // namespace

int launch_mlp_out_forward(DType dtype, DType low_type, const void* out, const void* e1, const void* mean,
                         const void* rstd, const void* w, const void* d, const void* gamma, const void* beta, void* s,
                         void* y, void* low, int64_t T, int64_t D, void* stream) {
  if (D > kMaxChannels) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(T, kForwardWarps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (T * D == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const auto in = [](const void* pointer) { return static_cast<const A*>(pointer); };
    const auto* out_ = static_cast<const L*>(out);
    const ForwardTensors<A, L> p{in(mean),
                                 in(rstd),
                                 in(w),
                                 in(d),
                                 in(gamma),
                                 in(beta),
                                 static_cast<A*>(s),
                                 static_cast<A*>(y),
                                 static_cast<L*>(low)};
    const bool aligned = wide<A>(D, out_, in(e1), p.w, p.d, p.gamma, p.beta, p.s, p.y, p.low);
    return with_row_shape<A>(D, aligned, [&]<class Shape>(Shape) {
      GCAHNG_LAUNCH((mlp_out_forward_kernel<A, L, Shape>), dim3(blocks), dim3(kWarp, kForwardWarps), stream, out_, in(e1),
                    p, T, D);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

int64_t mlp_out_backward_scratch(int64_t T, int64_t D) { return kSums * backward_parts(T, 1) * D; }

int launch_mlp_out_backward(DType dtype, DType low_type, const void* s, const void* e1, const void* dy, const void* mean,
                          const void* rstd, const void* w, const void* d, const void* gamma, void* ds, void* low,
                          void* scaled, void* m1, void* m2, void* sums, void* scratch, int64_t T, int64_t D,
                          void* stream) {
  if (D > kMaxChannels) return cudaErrorInvalidValue;
  if (T * D == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L*) {
    using A = compute_t<L>;
    const auto in = [](const void* pointer) { return static_cast<const A*>(pointer); };
    const auto out = [](void* pointer) { return static_cast<A*>(pointer); };
    const BackwardTensors<A, L> p{in(dy),
                                  in(mean),
                                  in(rstd),
                                  in(w),
                                  in(d),
                                  in(gamma),
                                  out(ds),
                                  low == ds ? nullptr : static_cast<L*>(low),  // of one type, ds is the operand
                                  static_cast<L*>(scaled),
                                  out(m1),
                                  out(m2),
                                  sums ? out(scratch) : nullptr};
    const bool aligned = wide<A>(D, in(s), in(e1), p.dy, p.w, p.d, p.gamma, p.ds, p.low, p.scaled);
    return with_row_shape<A>(D, aligned, [&]<class Shape>(Shape) {
      constexpr int kWarps = BlockSums<A, Shape, kSums>::kWarps;
      const int64_t parts = backward_parts(T, kWarps);
      GCAHNG_LAUNCH((mlp_out_backward_kernel<A, L, Shape>), dim3(parts), dim3(kWarp, kWarps), stream, in(s), in(e1), p, T,
                    D);
      const int error = cudaGetLastError();
      return error || !sums ? error : launch_add_partials(out(scratch), out(sums), kSums, parts, D, stream);
    });
  });
}

}  // namespace gcahng::cuda
