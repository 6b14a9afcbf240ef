// The arguments of the engine's stages as tests/emulator/build.py passes them: numbers, as the ops take them.
#pragma once
#include <cstdint>

#include "../../csrc/common/philox.h"
#include "../../csrc/common/tile.h"

namespace emu {

inline gcahng::Tile tile(const int64_t* t) { return {t[0], t[1], t[2], t[3], t[4], t[5], t[6]}; }

inline gcahng::Dropout dropout(const int64_t* d, double scale) {
  return {static_cast<uint64_t>(d[0]), static_cast<uint32_t>(d[1]), 0, static_cast<uint32_t>(d[2]), scale, d[3] != 0};
}

}  // namespace emu
