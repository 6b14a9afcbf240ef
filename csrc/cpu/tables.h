// csrc/cpu/<stem>.cpp is compiled once per instruction set, with GCAHNG_ARCH naming it, and defines one table of
// functions in the namespace of that name. Everything else in it has internal linkage.
#pragma once

#define GCAHNG_CPU_TABLES(Table, stem) \
  namespace base {                     \
  extern const Table stem;             \
  }                                    \
  namespace avx2 {                     \
  extern const Table stem;             \
  }                                    \
  namespace avx512 {                   \
  extern const Table stem;             \
  }
