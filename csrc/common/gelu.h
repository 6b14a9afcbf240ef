// The exact GELU, x Phi(x), beside its derivative. Shared by host and device.
#pragma once
#include "dtype.h"

namespace gcahng {
namespace {

// erf as a rational function of x on [-4, 4], where it reaches 1 in float: within 6 units in the last place.
GCAHNG_HD float erf_of(float x) {
  x = x > 4.0f ? 4.0f : x < -4.0f ? -4.0f : x;
  const float y = x * x;
  float p = 0.00022905065861350646f;
  p = p * y + 0.0034082910107109506f;
  p = p * y + 0.050955695062380861f;
  p = p * y + 0.18520832239976145f;
  p = p * y + 1.128379143519084f;
  float q = -1.1791602954361697e-7f;
  q = q * y + 0.000023547966471313185f;
  q = q * y + 0.0010179625278914885f;
  q = q * y + 0.014070470171167667f;
  q = q * y + 0.11098505178285362f;
  q = q * y + 0.49746925110067538f;
  q = q * y + 1.0f;
  const float r = x * p / q;
  return r > 1.0f ? 1.0f : r < -1.0f ? -1.0f : r;
}
GCAHNG_HD double erf_of(double x) { return __builtin_erf(x); }

// exp(x) for x <= 0.
GCAHNG_HD float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, and leaves it in the low bits.
  union {
    float value;
    int32_t bits;
  } shifted{x * 1.44269504f + 12582912.0f}, scale;
  const float n = shifted.value - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  scale.bits = (shifted.bits + 127) << 23;
  return p * scale.value;
}
GCAHNG_HD double exp_negative(double x) { return __builtin_exp(x); }

template <class T>
GCAHNG_HD T normal_cdf(T x) {
  return T(0.5) * (T(1) + erf_of(x * T(0.70710678118654752440)));
}

template <class T>
GCAHNG_HD T gelu(T x) {
  return x * normal_cdf(x);
}

// The derivative, given Phi(x).
template <class T>
GCAHNG_HD T gelu_slope(T x, T cdf) {
  return cdf + x * T(0.39894228040143267794) * exp_negative(T(-0.5) * x * x);
}

}  // namespace
}  // namespace gcahng
