// How tests/emulator/ops.py passes an op's arguments: one slot of 64 bits each, types first, then as the op takes them,
// then the sizes T and D and, where the op takes edges, their type, which the struct of csrc/<stem>.h ends with.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../csrc/common/arguments.h"
#include "../../csrc/common/philox.h"
#include "../../csrc/common/tile.h"

namespace emu {

// Reads the slots in order; a braced list of initializers is evaluated from left to right.
class Arguments {
 public:
  explicit Arguments(const uint64_t* slots) : next_(slots) {}

  gcahng::DType dtype() { return static_cast<gcahng::DType>(*next_++); }
  int64_t whole() { return static_cast<int64_t>(*next_++); }
  double number() {
    double value;
    std::memcpy(&value, next_++, sizeof value);
    return value;
  }
  // A tensor's data, or null.
  void* data() { return reinterpret_cast<void*>(*next_++); }
  const int64_t* indices() { return static_cast<const int64_t*>(data()); }
  const bool* flags() { return static_cast<const bool*>(data()); }
  gcahng::Tile tile() {
    const int64_t* t = indices();
    return {t[0], t[1], t[2], t[3], t[4], t[5], t[6]};
  }
  // Its numbers, scale and draw.
  gcahng::Dropout dropout() {
    const int64_t* d = indices();
    const double scale = number();
    return {.seed = static_cast<uint64_t>(d[0]),
            .layer = static_cast<uint32_t>(d[1]),
            .threshold = static_cast<uint32_t>(d[2]),
            .tied = d[3] != 0,
            .scale = scale,
            .draw = indices()};
  }

 private:
  const uint64_t* next_;
};

}  // namespace emu

// See emu::Mode.
extern "C" void emulator_mode(int last_block, int drop_barriers, int approximation) {
  emu::mode = {last_block != 0, drop_barriers != 0, approximation};
}

// See emu::Watched.
extern "C" void emulator_watch(int count, const uintptr_t* begin, const uintptr_t* end, int64_t* read, int64_t* written,
                               int64_t* lowest, int64_t* highest) {
  emu::watched = {count, begin, end, read, written, lowest, highest};
}

// The op `name`, whose struct the function of that name reads: emulate_<name>_ runs its launcher, and scratch_<name>_
// says how many values of scratch that asks for.
#define GCAHNG_EMULATE(name, launcher)                                               \
  extern "C" const char* emulate_##name##_(int seed, const uint64_t* slots, void*) { \
    emu::Arguments in(slots);                                                        \
    const auto args = name(in);                                                      \
    return emu::report(seed, [&] { return gcahng::cuda::launcher(args, nullptr); }); \
  }                                                                                  \
  extern "C" int64_t scratch_##name##_(const uint64_t*) { return 0; }

#define GCAHNG_EMULATE_WITH_SCRATCH(name, launcher, values)                                   \
  extern "C" const char* emulate_##name##_(int seed, const uint64_t* slots, void* scratch) {  \
    emu::Arguments in(slots);                                                                 \
    const auto args = name(in);                                                               \
    return emu::report(seed, [&] { return gcahng::cuda::launcher(args, scratch, nullptr); }); \
  }                                                                                           \
  extern "C" int64_t scratch_##name##_(const uint64_t* slots) {                               \
    emu::Arguments in(slots);                                                                 \
    return gcahng::cuda::values(name(in));                                                    \
  }
