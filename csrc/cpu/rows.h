// Pieces of a row that several stems share. Included by csrc/cpu/<stem>.cpp alone: internal linkage throughout.
#pragma once
#include "../common/gelu.h"
#include "blocks.h"

namespace gcahng {
namespace {

constexpr double kNormEps = 1e-5;

// Reads and writes by plain words: the compiler does not vectorize over structs. store returns the value as it was
// stored.
inline float load(const float* x, int64_t d) { return x[d]; }
inline double load(const double* x, int64_t d) { return x[d]; }
inline float load(const bf16* x, int64_t d) { return widen(bf16{reinterpret_cast<const uint16_t*>(x)[d]}); }
inline float store(float* x, int64_t d, float value) { return x[d] = value; }
inline double store(double* x, int64_t d, double value) { return x[d] = value; }
inline float store(bf16* x, int64_t d, float value) {
  const uint16_t bits = narrow<bf16>(value).bits;
  reinterpret_cast<uint16_t*>(x)[d] = bits;
  return widen(bf16{bits});
}

template <class T>
inline T inverse_root(T x) {
  return T(1) / (sizeof(T) == 4 ? T(__builtin_sqrtf(static_cast<float>(x))) : T(__builtin_sqrt(x)));
}

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

template <class T>
struct Moments {
  T mean, rstd;
};

// Mean and 1/sigma of a row, in two passes.
template <class T>
inline Moments<T> moments(const T* __restrict x, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += x[d];
  const T mean = sum / T(n);
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < n; ++d) square += (x[d] - mean) * (x[d] - mean);
  return {mean, inverse_root(square / T(n) + T(kNormEps))};
}

// y = LayerNorm(GELU(t)); low, if given, is the same in the products' type. scratch: n values.
template <class T, class L>
inline void norm_gelu_row(const T* __restrict t, const T* __restrict gamma, const T* __restrict beta, T* __restrict y,
                          L* __restrict low, T* __restrict scratch, int64_t n) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) scratch[d] = gelu(t[d]);
  const auto m = moments(scratch, n);
  if (y) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) y[d] = (scratch[d] - m.mean) * m.rstd * gamma[d] + beta[d];
  }
  if (low) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) store(low, d, (scratch[d] - m.mean) * m.rstd * gamma[d] + beta[d]);
  }
}

// dt of y = LayerNorm(GELU(t)), given dy; adds to dgamma and dbeta if given. scratch: 2 n values. dt may be dy.
template <class T>
inline void norm_gelu_row_backward(const T* t, const T* __restrict gamma, const T* dy, T* dt, T* __restrict dgamma,
                                   T* __restrict dbeta, T* __restrict scratch, int64_t n) {
  T* __restrict normalized = scratch;
  T* __restrict slope = scratch + n;
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) {
    const T cdf = normal_cdf(t[d]);
    normalized[d] = t[d] * cdf;
    slope[d] = gelu_slope(t[d], cdf);
  }
  const auto m = moments(normalized, n);
  T sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t d = 0; d < n; ++d) {
    const T x = (normalized[d] - m.mean) * m.rstd;
    const T dn = dy[d] * gamma[d];
    normalized[d] = x;
    sum += dn;
    along += dn * x;
  }
  sum /= T(n);
  along /= T(n);
  if (dgamma) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) {
      dgamma[d] += dy[d] * normalized[d];
      dbeta[d] += dy[d];
    }
  }
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) dt[d] = (dy[d] * gamma[d] - sum - normalized[d] * along) * m.rstd * slope[d];
}

template <class T>
inline T dot(const T* __restrict a, const T* __restrict b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T>
inline void fill(T* x, int64_t n) {
  for (int64_t d = 0; d < n; ++d) x[d] = 0;
}

template <class T>
inline T sigmoid(T x) {
  const T e = x < 0 ? T(__builtin_exp(static_cast<double>(x))) : T(__builtin_exp(static_cast<double>(-x)));
  return x < 0 ? e / (T(1) + e) : T(1) / (T(1) + e);
}

// Edges (T, D), which lie in the accumulating type, or in bf16 beside float. Then a row is widened into scratch (D,),
// and what is written to it is rounded once.
template <class T>
struct EdgeRows {
  void* data;
  bool narrow;
  int64_t D;

  const T* read(int64_t row, T* scratch) const {
    if (!narrow) return typed<T>(data) + row * D;
    const bf16* from = typed<bf16>(data) + row * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) scratch[d] = T(load(from, d));
    return scratch;
  }
  // Where a row's values are to be written, for `put`.
  T* room(int64_t row, T* scratch) const { return narrow ? scratch : typed<T>(data) + row * D; }
  // A row that is to be changed, for `put`.
  T* change(int64_t row, T* scratch) const { return const_cast<T*>(read(row, scratch)); }
  // Takes a row that was written to its room, and leaves it as it is stored.
  void put(int64_t row, T* values) const {
    if (!narrow) return;
    bf16* to = typed<bf16>(data) + row * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) values[d] = T(store(to, d, float(values[d])));
  }
};
template <class T>
inline EdgeRows<T> edge_rows(const void* data, DType type, int64_t D) {
  return {const_cast<void*>(data), type == DType::bf16, D};
}

// Calls f(row) for the rows of a block, of T in all.
template <class F>
inline void each_row(int64_t block, int64_t T, F f) {
  const int64_t stop = (block + 1) * kBlockRows;
  for (int64_t row = block * kBlockRows; row < (stop < T ? stop : T); ++row) f(row);
}

// Calls f with a null pointer of the accumulating type: float or double.
template <class F>
inline void with_accumulating(DType dtype, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
  f(static_cast<float*>(nullptr));
}

// Calls f with null pointers of the accumulating type and of the products' type: that, or bf16.
template <class F>
inline void with_products(DType dtype, DType low_type, F f) {
  if (dtype == DType::f64) return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  if (low_type == DType::bf16) return f(static_cast<float*>(nullptr), static_cast<bf16*>(nullptr));
  f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
}

#define GCAHNG_SCRATCH(T, name, count) T* name = static_cast<T*>(__builtin_alloca(sizeof(T) * (count)))

}  // namespace
}  // namespace gcahng
