#include "../norm_gelu.h"

#include "rows.cuh"

namespace gcahng::cuda {
namespace {

constexpr int kWarps = 8;  // rows of a block

template <class T, class L, class Shape>
__global__ void __launch_bounds__(kWarp* kWarps, 1)
    norm_gelu_forward_kernel(const T* t, const T* __restrict__ gamma, const T* __restrict__ beta, T* y, L* low,
                             int64_t rows, int64_t D) {
  constexpr int N = Shape::N;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const auto in = [&](int64_t d) { return read<T, N>(t + row * D + d); };
  norm_gelu_row<T, N, Shape::V>(D, gamma, beta, in, [&](int64_t d, const Pack<T, N>& value) {
    if (y) write(y + row * D + d, value);
    if (low) write(low + row * D + d, value);
  });
}

}  // namespace

int launch_norm_gelu_forward(DType dtype, DType low_type, const void* t, const void* gamma, const void* beta, void* y,
                             void* low, int64_t T, int64_t D, void* stream) {
  if (D > kMaxChannels) return cudaErrorInvalidValue;
  const int64_t blocks = ceil_div(T, kWarps);
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (T * D == 0) return cudaSuccess;
  return with_products(dtype, low_type, [&]<class L>(L* low_) {
    using A = compute_t<L>;
    const auto *t_ = static_cast<const A*>(t), *gamma_ = static_cast<const A*>(gamma),
               *beta_ = static_cast<const A*>(beta);
    auto* y_ = static_cast<A*>(y);
    low_ = static_cast<L*>(low);
    return with_row_shape<A>(D, wide<A>(D, t_, gamma_, beta_, y_, low_), [&]<class Shape>(Shape) {
      GCAHNG_LAUNCH((norm_gelu_forward_kernel<A, L, Shape>), dim3(blocks), dim3(kWarp, kWarps), stream, t_, gamma_,
                    beta_, y_, low_, T, D);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace gcahng::cuda
