// What differs between nvcc and the emulator of tests/emulator, which runs the same kernel source on the host.
#pragma once
#include <cstdint>
#include <cstring>
#ifndef GCAHNG_EMULATOR
#include <cuda_runtime.h>
// An array that the block shares, in which wide accesses may start at any multiple of 16 bytes.
#define GCAHNG_SHARED(T, name, count) __shared__ alignas(16) T name[count]
#define GCAHNG_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
// The emulator stops where an access of this many bytes may not start, and counts them.
#define GCAHNG_READ(pointer, bytes)
#define GCAHNG_WRITTEN(pointer, bytes)
#endif

namespace gcahng::cuda {

// The chip that is compiled for; 0: the host.
#ifdef __CUDA_ARCH__
constexpr int kChip = __CUDA_ARCH__ / 10;
#else
constexpr int kChip = 0;
#endif

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
  GCAHNG_READ(p, sizeof(Pack<T, N>));
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
// To shared memory.
template <int N, class T>
__device__ __forceinline__ void store_shared(T* p, const Pack<T, N>& value) {
  GCAHNG_WRITTEN(p, sizeof(Pack<T, N>));
  *reinterpret_cast<Pack<T, N>*>(p) = value;
}
// To global memory. Left to itself, nvcc 13.0 writes a pack value by value where it cannot rule out that another store
// overlaps it.
template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& value) {
  GCAHNG_WRITTEN(p, sizeof(Pack<T, N>));
#ifndef GCAHNG_EMULATOR
  if constexpr (sizeof value == 16) {
    uint32_t w[4];
    memcpy(w, &value, sizeof w);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
    return;
  } else if constexpr (sizeof value == 8) {
    uint32_t w[2];
    memcpy(w, &value, sizeof w);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = value;
}

// Whether rows of D values can be read in wide accesses from all these addresses.
template <class T, class... P>
bool wide(int64_t D, const P*... pointers) {
  return D % kWide<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace gcahng::cuda
