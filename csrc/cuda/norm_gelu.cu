#include "../norm_gelu.h"

#include "norm_gelu.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;  // rows of a block

template <class T, class E, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kWarps, 1)
    norm_gelu_forward_kernel(const E* t, const T* __restrict__ gamma, const T* __restrict__ beta, Out<T, L> out,
                             int64_t rows, int64_t channels) {
  constexpr int N = Shape::N;
  const int64_t D = Shape::width(channels);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_number();
  if (row >= rows) return;
  const int64_t at = row * D;
  const auto in = [&](int, int d) { return read<T, N>(t + at + d); };
  norm_gelu_row<T, Shape>(D, gamma, beta, in, [&](int, int d, const Pack<T, N>& value) { out.put(at + d, value); });
}

}  // namespace

int launch_norm_gelu_forward(const NormGeluForward& args, void* stream) {
  const int64_t D = args.D;
  if (D > kMaxChannels) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(args.T, kWarps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (args.T * D == 0) return cudaSuccess;
  return with_edges(args.dtype, args.edge_type, args.low_type, [&]<class A, class E, class L>(A*, E*, L*) {
    const E* t = typed<E>(args.t);
    const A *gamma = typed<A>(args.norm.gamma), *beta = typed<A>(args.norm.beta);
    const auto out = out_of<A, L>(args.out);
    return with_row_shape<A>(D, wide<A>(D, t, gamma, beta, out.full, out.low), [&]<class Shape>(Shape) {
      GCAHNG_LAUNCH((norm_gelu_forward_kernel<A, E, L, Shape>), dim3(blocks), dim3(kWarp, kWarps), stream, t, gamma,
                    beta, out, args.T, D);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace gcahng::cuda
