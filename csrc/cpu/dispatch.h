// Which of the compiled instruction sets runs.
#pragma once

namespace gcahng::cpu {

enum class Arch : int { base, avx2, avx512 };

// The best one that was compiled and that this processor has, or the one chosen by gcahng_set_cpu_arch.
Arch arch();

}  // namespace gcahng::cpu

// The stem's table for that instruction set.
#ifdef GCAHNG_X86
#define GCAHNG_CPU(stem)                                                         \
  (::gcahng::cpu::arch() == ::gcahng::cpu::Arch::avx512 ? ::gcahng::avx512::stem \
   : ::gcahng::cpu::arch() == ::gcahng::cpu::Arch::avx2 ? ::gcahng::avx2::stem   \
                                                        : ::gcahng::base::stem)
#else
#define GCAHNG_CPU(stem) (::gcahng::base::stem)
#endif
