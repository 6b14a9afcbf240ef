// Element types as raw memory, and the type each is computed in. Shared by host and device.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GCAHNG_HD __host__ __device__ __forceinline__
#else
#define GCAHNG_HD inline
#endif

namespace gcahng {

enum class DType : int { f32, f64, bf16, f16 };

// Internal linkage: each instruction set compiles its own copy, and the linker can never hand AVX-512 code to a machine
// without it.
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type of sums and products: double for double, float for all else.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

GCAHNG_HD float widen(float x) { return x; }
GCAHNG_HD double widen(double x) { return x; }
GCAHNG_HD float widen(bf16 x) {
  union {
    uint32_t bits;
    float value;
  } u{static_cast<uint32_t>(x.bits) << 16};
  return u.value;
}

// narrow<T>(x): the nearest T, ties to even.
template <class T>
GCAHNG_HD T narrow(compute_t<T> x) {
  return x;
}
template <>
GCAHNG_HD bf16 narrow<bf16>(float x) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  union {
    float value;
    uint32_t bits;
  } u{x};
  const uint32_t rounded = u.bits + 0x7fffu + ((u.bits >> 16) & 1u);
  const bool nan = (u.bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry a NaN's bits over into a number
  return {static_cast<uint16_t>((nan ? u.bits | 0x400000u : rounded) >> 16)};
#endif
}

#ifdef __CUDACC__
GCAHNG_HD float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <>
GCAHNG_HD f16 narrow<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#elif defined(__FLT16_MAX__)
GCAHNG_HD float widen(f16 x) {
  union {
    uint16_t bits;
    _Float16 value;
  } u{x.bits};
  return static_cast<float>(u.value);
}
template <>
GCAHNG_HD f16 narrow<f16>(float x) {
  union {
    _Float16 value;
    uint16_t bits;
  } u{static_cast<_Float16>(x)};
  return {u.bits};
}
#endif

template <class T>
const T* typed(const void* pointer) {
  return static_cast<const T*>(pointer);
}
template <class T>
T* typed(void* pointer) {
  return static_cast<T*>(pointer);
}

// Calls f with a null pointer of the element type; f16 only where kHalf says that the caller has it.
template <bool kHalf, class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      if constexpr (kHalf) f(static_cast<f16*>(nullptr));
      return;
  }
}

}  // namespace
}  // namespace gcahng
