// What differs between nvcc and the emulator of tests/emulator, which runs the same kernel source on the host.
#pragma once
#include <cstdint>
#ifndef GCAHNG_EMULATOR
#include <cuda_runtime.h>
// An array that the block shares, in which wide accesses may start at any multiple of 16 bytes.
#define GCAHNG_SHARED(T, name, count) __shared__ alignas(16) T name[count]
#define GCAHNG_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// The emulator stops where an access of this many bytes may not start.
#define GCAHNG_ALIGNED(pointer, bytes)
#endif

namespace gcahng::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid's first axis

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The widest access: N values of T in one load or store of 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  GCAHNG_ALIGNED(p, sizeof(Pack<T, N>));
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& value) {
  GCAHNG_ALIGNED(p, sizeof(Pack<T, N>));
  *reinterpret_cast<Pack<T, N>*>(p) = value;
}

// Whether rows of D values can be read in wide accesses from all these addresses.
template <class T, class... P>
bool wide(int64_t D, const P*... pointers) {
  return D % kWide<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace gcahng::cuda
