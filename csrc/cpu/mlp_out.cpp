#include "../mlp_out.h"

#include "rows.h"

namespace gcahng {
namespace {

void forward(const MlpOutForward& args, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D;
    GCAHNG_SCRATCH(T, scratch, 3 * D);
    const auto residuals = edge_rows<T>(args.e1, args.edge_type, D), sums = edge_rows<T>(args.s, args.edge_type, D);
    const T *w = typed<T>(args.fold.w), *shift = typed<T>(args.fold.d);
    T* full = typed<T>(args.out.full);
    L* low = typed<L>(args.out.low);
    for (int64_t r = begin; r < end; ++r) {
      const L* __restrict product = typed<L>(args.product) + r * D;
      const T* __restrict e1 = residuals.read(r, scratch + D);
      T* __restrict s = sums.room(r, scratch + 2 * D);
      const T center = typed<T>(args.moments.mean)[r], inverse = typed<T>(args.moments.rstd)[r];
#pragma omp simd
      for (int64_t k = 0; k < D; ++k) s[k] = (load(product, k) - center * w[k]) * inverse + shift[k] + e1[k];
      sums.put(r, s);  // what goes on is what is stored
      if (full || low)
        norm_gelu_row(s, typed<T>(args.norm.gamma), typed<T>(args.norm.beta), full ? full + r * D : nullptr,
                      low ? low + r * D : nullptr, scratch, D);
    }
  });
}

void backward(const MlpOutBackward& args, void* sums, int64_t begin, int64_t end) {
  with_products(args.dtype, args.low_type, [&]<class T, class L>(T*, L*) {
    const int64_t D = args.D, plane = blocks_of(args.T) * D;
    GCAHNG_SCRATCH(T, scratch, 5 * D);
    T* const wide = scratch + 2 * D;
    const auto stored = edge_rows<T>(args.s, args.edge_type, D), residuals = edge_rows<T>(args.e1, args.edge_type, D),
               upstream = edge_rows<T>(args.dy, args.edge_type, D), into = edge_rows<T>(args.ds, args.edge_type, D);
    const T* __restrict w = typed<T>(args.fold.w);
    const T* __restrict shift = typed<T>(args.fold.d);
    L* low_rows = args.low == args.ds ? nullptr : typed<L>(args.low);
    for (int64_t block = begin; block < end; ++block) {
      T *dgamma = nullptr, *dbeta = nullptr, *total = nullptr, *means = nullptr;
      if (sums) {
        dgamma = typed<T>(sums) + block * D;
        dbeta = dgamma + plane;
        total = dbeta + plane;
        means = total + plane;
        fill(dgamma, D);
        fill(dbeta, D);
        fill(total, D);
        fill(means, D);
      }
      each_row(block, args.T, [&](int64_t r) {
        const T* __restrict s = stored.read(r, wide);
        const T* __restrict e1 = residuals.read(r, wide + D);
        T* ds = into.room(r, wide + 2 * D);
        norm_gelu_row_backward(s, typed<T>(args.gamma), upstream.read(r, wide + 2 * D), ds, dgamma, dbeta, scratch, D);
        const T center = typed<T>(args.moments.mean)[r], inverse = typed<T>(args.moments.rstd)[r];
        T dn = 0, n_dn = 0;
#pragma omp simd reduction(+ : dn, n_dn)
        for (int64_t k = 0; k < D; ++k) {
          dn += ds[k] * w[k];
          n_dn += ds[k] * (s[k] - e1[k] - shift[k]);
        }
        typed<T>(args.mean_dn)[r] = dn / T(4 * D);
        typed<T>(args.mean_n_dn)[r] = n_dn / T(4 * D);
        if (low_rows) {
          L* __restrict low = low_rows + r * D;
#pragma omp simd
          for (int64_t k = 0; k < D; ++k) store(low, k, ds[k]);
        }
        L* __restrict scaled = typed<L>(args.scaled) + r * D;
#pragma omp simd
        for (int64_t k = 0; k < D; ++k) store(scaled, k, ds[k] * inverse);
        if (sums) {
#pragma omp simd
          for (int64_t k = 0; k < D; ++k) {
            total[k] += ds[k];
            means[k] += ds[k] * inverse * center;
          }
        }
        into.put(r, ds);
      });
    }
  });
}

}  // namespace

namespace GCAHNG_ARCH {
extern const MlpOutCpu mlp_out = {forward, backward};
}

}  // namespace gcahng
