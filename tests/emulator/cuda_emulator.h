// Runs CUDA kernels' own source on the host: one block at a time, one fiber per CUDA thread, warps in random order.
// Include it before a .cu file of csrc/cuda. A seed of -1 runs threads in order; others shuffle, and so find missing
// barriers. Shared memory starts as NaN in every block. See emu::Mode for what else can differ from a GPU.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define GCAHNG_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x_ = 1, int64_t y_ = 1, int64_t z_ = 1)
      : x(static_cast<unsigned>(x_)), y(static_cast<unsigned>(y_)), z(static_cast<unsigned>(z_)) {}
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emu {

// -- fibers: a switch saves the registers that a called function must preserve, and nothing else.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void gcahng_emulator_switch(void** from, void* to);
asm(R"(.text
.weak gcahng_emulator_switch
.type gcahng_emulator_switch,@function
gcahng_emulator_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size gcahng_emulator_switch,.-gcahng_emulator_switch)");
inline void switch_to(Context& from, Context& to) { gcahng_emulator_switch(&from.stack_pointer, to.stack_pointer); }
inline void start(Context& context, char* stack, size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t(15));
  *--top = nullptr;  // entry's return address: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  context.stack_pointer = top;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { ready, at_block_barrier, at_warp_barrier, done, failed };

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  unsigned linear = 0;
  State state = State::ready;
  unsigned mask = 0;  // of the warp barrier it waits at
  uint64_t slot = 0;  // what it offers to the other lanes
};

constexpr size_t kStack = 64 << 10;
constexpr size_t kFence = 64;  // bytes after each shared array that nothing may write
constexpr int kPoison = 0xff;  // NaN in every floating type

struct SharedArray {
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
  size_t bytes = 0;
};

struct Block {
  std::vector<Thread> threads;
  Context scheduler;
  Thread* current = nullptr;
  dim3 index, size, grid;
  std::map<const void*, SharedArray> shared;
  std::function<void()> body;
  std::string error;
};
inline thread_local Block* block = nullptr;
inline thread_local int seed = -1;

// Set before a launch, and not by a macro: a library takes long to compile, and one does for all.
struct Mode {
  bool last_block = false;     // the last block of each row of a grid runs alone
  bool drop_barriers = false;  // __syncthreads does nothing
  int approximation = 0;       // 1 or -1: see approximate
};
inline Mode mode;

inline void wait(State state) {
  Thread* me = block->current;
  me->state = state;
  switch_to(me->context, block->scheduler);
}

inline void entry() {
  block->body();
  wait(State::done);
}

// A mistake that a thread finds: it stops, and the scheduler throws.
inline void fail(const char* message) {
  block->error = message;
  wait(State::failed);
}

// Tensors whose accesses are counted: so many, where each begins and ends, the bytes that are read and written, and the
// lowest and highest of these. Accesses outside of them, such as those of shared memory, are not.
struct Watched {
  int count = 0;
  const uintptr_t *begin = nullptr, *end = nullptr;
  int64_t *read = nullptr, *written = nullptr, *lowest = nullptr, *highest = nullptr;
};
inline Watched watched;

// A GPU reads and writes N bytes at once at multiples of N alone.
inline void accessed(const void* pointer, size_t bytes, bool write) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  if (at % bytes != 0) fail("an access that is not aligned");
  for (int k = 0; k < watched.count; ++k) {
    if (at < watched.begin[k] || at >= watched.end[k]) continue;
    const auto offset = static_cast<int64_t>(at - watched.begin[k]), size = static_cast<int64_t>(bytes);
    (write ? watched.written : watched.read)[k] += size;
    watched.lowest[k] = std::min(watched.lowest[k], offset);
    watched.highest[k] = std::max(watched.highest[k], offset + size);
  }
}

template <class T>
T* shared(const void* key, size_t count) {
  SharedArray& array = block->shared[key];
  if (!array.data) {
    array.bytes = count * sizeof(T);
    array.memory.reset(new char[array.bytes + kFence + 128]);
    array.data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(array.memory.get()) + 127) & ~uintptr_t(127));
    std::memset(array.data, kPoison, array.bytes + kFence);
  }
  return reinterpret_cast<T*>(array.data);
}

// Lets the lanes of a warp go on once every lane that the barrier's mask names is there.
inline bool release_warps(std::vector<Thread>& threads) {
  bool released = false;
  for (size_t first = 0; first < threads.size(); first += 32) {
    const size_t lanes = std::min<size_t>(32, threads.size() - first);
    unsigned wanted = 0, there = 0;
    for (size_t lane = 0; lane < lanes && !wanted; ++lane)
      if (threads[first + lane].state == State::at_warp_barrier) wanted = threads[first + lane].mask;
    for (size_t lane = 0; lane < lanes; ++lane) {
      const Thread& thread = threads[first + lane];
      if (thread.state == State::at_warp_barrier && thread.mask == wanted) there |= 1u << lane;
    }
    if (!wanted || there != wanted) continue;
    released = true;
    for (size_t lane = 0; lane < lanes; ++lane)
      if (wanted >> lane & 1) threads[first + lane].state = State::ready;
  }
  return released;
}

inline void run_block(Block& b, std::mt19937* random) {
  const auto error = [&](const std::string& message) {
    const std::string at =
        std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " + std::to_string(b.index.z);
    throw std::runtime_error(message + " (block " + at + ")");
  };
  std::vector<size_t> order(b.threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  size_t first = 0, last = random ? 0 : order.size();
  for (;;) {
    if (random) {  // one warp at a time, as far as it gets
      std::shuffle(order.begin(), order.end(), *random);
      const auto ready = [&](size_t i) { return b.threads[i].state == State::ready; };
      const auto goes_on = [&](size_t i) { return i >= first && i < last && ready(i); };
      if (std::none_of(order.begin(), order.end(), goes_on)) {
        const auto next = std::find_if(order.begin(), order.end(), ready);
        first = next == order.end() ? 0 : *next / 32 * 32;
        last = next == order.end() ? 0 : first + 32;
      }
    }
    bool ran = false;
    for (size_t i : order) {
      if (i < first || i >= last || b.threads[i].state != State::ready) continue;
      ran = true;
      b.current = &b.threads[i];
      switch_to(b.scheduler, b.threads[i].context);
      if (!b.error.empty()) error(b.error);
    }
    const auto count = [&](State state) {
      return static_cast<size_t>(
          std::count_if(b.threads.begin(), b.threads.end(), [=](const Thread& t) { return t.state == state; }));
    };
    const size_t done = count(State::done), waiting = count(State::at_block_barrier);
    if (done == b.threads.size()) break;
    if (waiting + done == b.threads.size()) {
      if (done) error("__syncthreads that some threads of the block have left without");
      for (Thread& thread : b.threads) thread.state = State::ready;
    } else if (!release_warps(b.threads) && !ran) {
      error("deadlock: threads wait at different barriers, or a lane named in a *_sync mask never came");
    }
  }
  for (const auto& [key, array] : b.shared)
    for (size_t i = 0; i < kFence; ++i)
      if (array.data[array.bytes + i] != static_cast<char>(kPoison)) error("write past the end of a shared array");
}

template <class Call>
void run_grid(dim3 grid, dim3 size, Call&& call) {
  const size_t count = size_t(size.x) * size.y * size.z;
  if (count == 0 || count > 1024) throw std::runtime_error(std::to_string(count) + " threads in a block");
  std::mt19937 random(static_cast<unsigned>(seed));
  Block b;
  b.threads.resize(count);
  for (Thread& thread : b.threads) thread.stack.reset(new char[kStack]);
  b.size = size;
  b.grid = grid;
  b.body = call;
  block = &b;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        if (mode.last_block && x + 1 < grid.x) x = grid.x - 1;
        b.index = dim3(x, y, z);
        b.shared.clear();
        for (unsigned i = 0; i < count; ++i) {
          Thread& thread = b.threads[i];
          thread.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
          thread.linear = i;
          thread.state = State::ready;
          start(thread.context, thread.stack.get(), kStack, entry);
        }
        run_block(b, seed >= 0 ? &random : nullptr);
      }
  block = nullptr;
}

// Every lane of the mask offers a value and reads another lane's.
template <class T>
T exchange(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread* me = block->current;
  const unsigned lane = me->linear % 32, first = me->linear - lane;
  if (!(mask >> lane & 1)) fail("a lane is not in the *_sync mask that it passed");
  me->slot = 0;
  std::memcpy(&me->slot, &value, sizeof value);
  me->mask = mask;
  wait(State::at_warp_barrier);
  T result = value;
  if (source < 32 && (mask >> source & 1)) std::memcpy(&result, &block->threads[first + source].slot, sizeof result);
  me->mask = mask;
  wait(State::at_warp_barrier);
  return result;
}
// What an approximate instruction gives for the value x: one that is off by so many units in the last place, towards
// infinity or away from it as the mode's approximation (1, -1) says; x itself where that is 0.
inline float approximate(float x, int units) {
  if (!std::isnormal(x)) return x;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += units * mode.approximation;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}
inline unsigned lane() { return block->current->linear % 32; }

// Runs launchers from C: nullptr, or what went wrong.
template <class Call>
const char* report(int with_seed, Call&& call) {
  static thread_local std::string message;
  seed = with_seed;
  try {
    const int status = call();
    if (status == 0) return nullptr;
    message = "cudaError_t " + std::to_string(status);
  } catch (const std::exception& error) {
    message = error.what();
  }
  block = nullptr;
  return message.c_str();
}

}  // namespace emu

#define threadIdx (::emu::block->current->index)
#define blockIdx (::emu::block->index)
#define blockDim (::emu::block->size)
#define gridDim (::emu::block->grid)
#define GCAHNG_SHARED(T, name, count) \
  static const char name##_key = 0;   \
  T* const name = ::emu::shared<T>(&name##_key, count)
#define GCAHNG_READ(pointer, bytes) ::emu::accessed(pointer, bytes, false)
#define GCAHNG_WRITTEN(pointer, bytes) ::emu::accessed(pointer, bytes, true)
#define GCAHNG_LAUNCH(kernel, grid, size, stream, ...) \
  ((void)(stream), ::emu::run_grid(grid, size, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() {
  if (!emu::mode.drop_barriers) emu::wait(emu::State::at_block_barrier);
}
inline void __syncwarp(unsigned mask = ~0u) {
  emu::block->current->mask = mask;
  emu::wait(emu::State::at_warp_barrier);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return emu::exchange(mask, value, emu::lane() ^ static_cast<unsigned>(offset));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return emu::exchange(mask, value, emu::lane() + offset);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emu::exchange(mask, value, static_cast<unsigned>(source) & 31);
}
