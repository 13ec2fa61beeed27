// Who does what, and where: threads that meet, memory that is kept, rows in the order of their lengths.

#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "call.h"
#include "vectors.h"

namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// All threads of a team wait here for each other. The wait gives way after a while: another process may have the core.
class Barrier {
  struct alignas(128) Count {
    std::atomic<int64_t> value{0};
  };
  std::vector<Count> counts;

 public:
  explicit Barrier(int threads) : counts(threads) {}
  void wait(int self) {
    const int64_t mine = counts[self].value.load(std::memory_order_relaxed) + 1;
    counts[self].value.store(mine, std::memory_order_release);
    for (auto& other : counts)
      for (int spins = 0; other.value.load(std::memory_order_acquire) < mine; spins++)
        spins < 20000 ? pause() : (void)sched_yield();
  }
};

struct Team {
  int self, size;
  Barrier* barrier;
  void meet() const {
    if (size > 1) barrier->wait(self);
  }
  // This thread's part of n things.
  int64_t begin(int64_t n) const { return n * self / size; }
  int64_t end(int64_t n) const { return n * (self + 1) / size; }
};

// Under AddressSanitizer a workspace is new in each call, and nothing may touch what lies between its pieces.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t GAP = 64;
void forbid(const void* from, const void* to) {
  __asan_poison_memory_region(from, static_cast<const char*>(to) - static_cast<const char*>(from));
}
#else
constexpr size_t GAP = 0;
void forbid(const void*, const void*) {}
#endif

// Memory that is kept from call to call: fresh pages cost more than the arithmetic.
template <class R>
class Workspace {
  R* memory = nullptr;
  size_t capacity = 0;

 public:
  ~Workspace() { std::free(memory); }
  bool reserve(size_t wanted) {  // false: there is not so much memory
    if (wanted > capacity || GAP) {
      std::free(memory);
      memory = static_cast<R*>(std::aligned_alloc(64, (std::max<size_t>(wanted, 1) * sizeof(R) + 63) / 64 * 64));
      capacity = memory ? wanted : 0;
    }
    return memory != nullptr;
  }
  R* begin() { return memory; }
};

// Hands out pieces of it, the same ones to every thread of a team. Without memory it only counts: what a work item
// needs is found by laying it out, so that the two cannot differ.
template <class R>
struct Pieces {
  R* memory = nullptr;
  size_t used = 0;
  R* take(size_t n) {
    R* p = memory ? memory + used : nullptr;
    used += (n + 63) / 64 * 64 + GAP;
    if (GAP && p) forbid(p + n, memory + used);
    return p;
  }
};

// Rows, longest first, so that at any time the running ones come first.
struct Rows {
  std::vector<int64_t> order, length, running;  // running[t]: rows longer than t
  Rows(const Call& x) : order(x.B), length(x.B, x.T), running(x.T + 1, x.lengths ? 0 : x.B) {
    std::iota(order.begin(), order.end(), 0);
    running[x.T] = 0;
    if (!x.lengths) return;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.lengths[a] > x.lengths[b]; });
    for (int64_t r = 0; r < x.B; r++) {
      length[r] = std::clamp<int64_t>(x.lengths[order[r]], 0, x.T);  // a compiled graph does not check them
      for (int64_t t = 0; t < length[r]; t++) running[t]++;
    }
  }
};

// Blocks [k0, k1) and sorted rows [r0, r1): what one team walks through time.
struct Item {
  int64_t k0, k1, r0, r1, slice;
};

template <class Function>
INLINE void for_tiles(int64_t first, int64_t last, int most, Function tile) {
  const int64_t n = last - first, tiles = (n + most - 1) / most;  // nearly equal ones, not full ones and a rest
  for (int64_t i = 0; i < tiles; i++) tile(first + n * i / tiles, first + n * (i + 1) / tiles);
}

template <class R>
INLINE const R* at(const void* p, int64_t i) {
  return static_cast<const R*>(p) + i;
}
template <class R>
INLINE R* at(void* p, int64_t i) {
  return static_cast<R*>(p) + i;
}

}  // namespace
