// Elementary functions of a GPU: its approximate instructions, and what is made of them. In double, those of host and
// device (csrc/common/gelu.h).
//
// In float, every one of them is as near as float can tell: no result is off by more than a few roundings of the
// largest of its terms. tests/stages/test_gelu_on_gpus.py holds them to bounds, with the errors that the instructions
// may have (PTX ISA: rcp 1 unit in the last place, ex2 2, rsqrt 2) at their worst.
#pragma once
#include <cmath>

#include "../common/gelu.h"
#include "launch.h"

namespace gcahng::cuda {
namespace {

#ifdef GCAHNG_EMULATOR
using emu::approximate;
inline float approximate_reciprocal(float x) { return approximate(1.0f / x, 1); }
inline float approximate_exp2(float x) { return x < -126.0f ? 0.0f : approximate(exp2f(x), 2); }
inline float approximate_inverse_root(float x) { return approximate(1.0f / sqrtf(x), 2); }
#else
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// 1/x, of normal x whose reciprocal is normal.
__device__ __forceinline__ float reciprocal(float x) { return approximate_reciprocal(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// 1/sqrt(x) of normal x > 0, with a step of Newton's.
__device__ __forceinline__ float inverse_root(float x) {
  const float y = approximate_inverse_root(x);
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.0f), y);
}
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

// exp(x) for x <= 0: 2^n by the exponent's bits, n the whole number nearest to x log2(e), and 2^(the rest).
__device__ __forceinline__ float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, and leaves it in the low bits.
  union {
    float value;
    int32_t bits;
  } shifted{fmaf(x, 1.44269502f, 12582912.0f)}, scale;
  const float n = shifted.value - 12582912.0f;
  scale.bits = static_cast<int32_t>(static_cast<uint32_t>(shifted.bits + 127) << 23);
  // A product, not a sum of bits: a GPU's NaN (0x7fffffff) would come out of that as the largest float.
  return scale.value * approximate_exp2(fmaf(x, 1.925963033500e-8f, fmaf(x, 1.44269502f, -n)));
}
__device__ __forceinline__ double exponential(double x) { return exp_negative(x); }

// The logistic function of x and that of -x, by exp of what is not positive.
template <class T>
struct Logistic {
  T value, opposite;
};
template <class T>
__device__ __forceinline__ Logistic<T> logistic(T x) {
  const T e = exponential(x < 0 ? x : -x), large = reciprocal(T(1) + e), small = e * large;
  return x < 0 ? Logistic<T>{small, large} : Logistic<T>{large, small};
}

// GELU(x) = x Phi(x), and its derivative. In float by the upper tail Phi(-a), a = |x|: it is exp(-a^2/2) times a
// function of t = 1/(1 + 0.276 a) that a polynomial of degree 6 without constant meets within 4e-9 exp(a^2/2). Then
// GELU(x) = max(x, 0) - a Phi(-a), and the derivative is Phi(-a) - a phi(a) for x < 0, and 1 minus that for x > 0. Of
// an infinite x both are NaN: its row becomes NaN anyway, in its LayerNorm or its moments.
struct Tail {
  float a, density, ratio;  // exp(-a^2/2), and Phi(-a) over it

  __device__ __forceinline__ explicit Tail(float x) : a(fabsf(x)) {
    const float s = 0.8493218f * x;  // sqrt(log2(e) / 2)
    density = approximate_exp2(-s * s);
    const float t = approximate_reciprocal(fmaf(a, 0.276f, 1.0f));
    float p = -0.1134513312004471f;
    p = fmaf(p, t, 0.4408115479800835f);
    p = fmaf(p, t, -0.31385609992363783f);
    p = fmaf(p, t, 0.3221491005838921f);
    p = fmaf(p, t, 0.04672249494698513f);
    p = fmaf(p, t, 0.11762428369432898f);
    ratio = p * t;
  }
  __device__ __forceinline__ float gelu(float x) const { return fmaf(-a, density * ratio, fmaxf(x, 0.0f)); }
  __device__ __forceinline__ float slope(float x) const {
    const float below = density * fmaf(a, -0.39894228040143267794f, ratio);
    return x > 0.0f ? 1.0f - below : below;
  }
};

template <class T>
struct Gelu {
  T value, slope;
};
__device__ __forceinline__ float gelu_of(float x) { return Tail(x).gelu(x); }
__device__ __forceinline__ double gelu_of(double x) { return gelu(x); }
__device__ __forceinline__ float slope_of(float x) { return Tail(x).slope(x); }
__device__ __forceinline__ double slope_of(double x) { return gelu_slope(x, normal_cdf(x)); }
__device__ __forceinline__ Gelu<float> gelu_and_slope(float x) {
  const Tail tail(x);
  return {tail.gelu(x), tail.slope(x)};
}
__device__ __forceinline__ Gelu<double> gelu_and_slope(double x) {
  const double cdf = normal_cdf(x);
  return {x * cdf, gelu_slope(x, cdf)};
}

}  // namespace
}  // namespace gcahng::cuda
