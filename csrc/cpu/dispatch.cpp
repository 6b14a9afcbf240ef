#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace gcahng::cpu {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512"};

bool has(Arch arch) {
#ifdef GCAHNG_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (arch == Arch::avx2) return avx2;
  if (arch == Arch::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return arch == Arch::base;
}

std::atomic<Arch>& current() {
  static std::atomic<Arch> chosen{has(Arch::avx512) ? Arch::avx512 : has(Arch::avx2) ? Arch::avx2 : Arch::base};
  return chosen;
}

}  // namespace

Arch arch() { return current().load(std::memory_order_relaxed); }

}  // namespace gcahng::cpu

// Read and written by gcahng/native.py through ctypes.
extern "C" __attribute__((visibility("default"))) const char* gcahng_cpu_arch() {
  return gcahng::cpu::kNames[static_cast<int>(gcahng::cpu::arch())];
}

// 0; 1: this processor has not got it; 2: no such name.
extern "C" __attribute__((visibility("default"))) int gcahng_set_cpu_arch(const char* name) {
  using namespace gcahng::cpu;
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    if (!has(static_cast<Arch>(i))) return 1;
    current().store(static_cast<Arch>(i), std::memory_order_relaxed);
    return 0;
  }
  return 2;
}
