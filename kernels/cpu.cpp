// Recurrences on a CPU: forward and backward of every cell, block-diagonal (dense is one block) and diagonal.
//
// The idea. A block is independent of all others, so one thread owns (some blocks, some rows) for ALL time steps: its
// weights stay in its cache, and no thread waits for another. Only where there are fewer blocks than threads do the
// threads share a block, each owning some of its columns, and meet at a barrier at every step.
//
// The pieces, from the inside out:
//   vectors.h   a vector of numbers, tanh of it
//   gemm.h      rows of state times a panel of weights, in registers: the only hot loop
//   cells.h     what happens to the sums: gates, states, and their derivatives, a vector of units at a time
//   work.h      threads that meet, memory that is kept
//   blocks.h    walks a work item through time, forward and backward
//   diagonal.h  the same cells where a unit sees itself alone: no gemm, columns instead of blocks
//   here        cuts a call into work items and hands them to torch's own threads
//
// kernels/reference.py is the definition; letters as there. This file is compiled once for each instruction set
// (VECTOR_BYTES, REGISTERS and NAME are set by the build) and knows nothing of Python or torch: a plain C interface.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "blocks.h"
#include "diagonal.h"

namespace {

// Rows are cut by the shapes alone, never by the number of threads, and no block's sums depend on which others it is
// walked with: so neither do the results.
std::vector<Item> block_items(const Call& x, int64_t bytes_per_block, bool backward) {
  // Blocks of one item are walked through a step together: one computes while another waits for its sums, and a longer
  // stretch of each row of u and y is used. Their weights should still fit the first-level cache where there are few
  // rows to use them on; backward has more beside them.
  const int64_t wide = !backward && x.B >= 8 ? 4 : 1;
  const int64_t blocks = std::max<int64_t>(x.K, 1);
  int64_t group = std::clamp<int64_t>(std::min(wide * 32768 / bytes_per_block, wide * 128 / x.P), 1, blocks);
  // Where blocks are few and small, the batch is cut too; a slice must still fill a tile.
  const int64_t parts = (x.K + group - 1) / group;
  const bool small = bytes_per_block <= 1 << 19 && parts < 8;
  const int64_t slices = small && x.K > 1 ? std::clamp<int64_t>(x.B / 16, 1, (8 + parts - 1) / parts) : 1;
  group = std::min(group, std::max<int64_t>(1, blocks * slices / x.threads));  // something for every thread
  std::vector<Item> items;
  for (int64_t k = 0; k < x.K; k += group)
    for (int64_t i = 0; i < slices; i++)
      items.push_back({k, std::min(x.K, k + group), x.B * i / slices, x.B * (i + 1) / slices, i});
  return items;
}

std::vector<Item> diagonal_items(const Call& x) {
  // Whole rows where there are enough of them: a step is then one stretch of memory.
  const int64_t part = x.K / x.groups, slices = std::clamp<int64_t>(x.B, 1, 8);
  const int64_t strips = std::clamp<int64_t>(part / 256, 1, (8 + slices - 1) / slices);
  std::vector<Item> items;
  for (int64_t g = 0; g < x.groups; g++)
    for (int64_t k = 0; k < strips; k++)
      for (int64_t i = 0; i < slices; i++)
        items.push_back({g * part + part * k / strips, g * part + part * (k + 1) / strips, x.B * i / slices,
                         x.B * (i + 1) / slices, i});
  return items;
}

int64_t slices_of(const std::vector<Item>& items) {
  int64_t most = 0;
  for (const Item& it : items) most = std::max(most, it.slice + 1);
  return most;
}

template <class R>
Workspace<R>& workspace() {
  static thread_local Workspace<R> memory;
  return memory;
}

Threads threads = {};

// Calls body(self, size) on up to `wanted` threads.
template <class Body>
void parallel(int64_t wanted, Body body) {
  if (wanted <= 1 || !threads.parallel) return body(0, 1);
  auto enter = [](void* data) { (*static_cast<Body*>(data))(threads.number(), threads.count()); };
  threads.parallel(enter, &body, unsigned(wanted), 0);
}

constexpr int DONE = 0, NO_MEMORY = 1;

template <class R, class Work>
size_t needed(const Work& work, const Item& item) {
  Pieces<R> count;
  work.lay_out(item, count);
  return count.used;
}

// Each item is one thread's; whoever is free takes the next.
template <class R, class Work, class Function>
int run_items(const Call& x, const std::vector<Item>& items, const Work& work, Function function) {
  std::atomic<size_t> next{0};
  std::atomic<int> result{DONE};
  parallel(std::min<int64_t>(x.threads, items.size()), [&](int, int) {
    for (size_t i; (i = next.fetch_add(1)) < items.size();) {
      Workspace<R>& memory = workspace<R>();
      if (memory.reserve(needed<R>(work, items[i])))
        function(items[i], Team{0, 1, nullptr}, Pieces<R>{memory.begin()});
      else
        result = NO_MEMORY;
    }
  });
  return result;
}

// Fewer items than threads: all threads share every block, and meet at each step.
template <class R, class Work>
int run_together(const Call& x, const Work& work) {
  const Item whole{0, x.K, 0, x.B, 0};
  Workspace<R>& memory = workspace<R>();
  if (!memory.reserve(needed<R>(work, whole))) return NO_MEMORY;
  std::vector<Barrier> barriers;
  for (int size = 0; size <= x.threads; size++) barriers.emplace_back(size);  // OpenMP may give fewer than wanted
  parallel(x.threads,
           [&](int self, int size) { work(whole, Team{self, size, &barriers[size]}, Pieces<R>{memory.begin()}); });
  return DONE;
}

template <class R, class Work>
int run_blocks(const Call& x, const std::vector<Item>& items, const Work& work) {
  if (int64_t(items.size()) < x.threads && x.P >= 64) return run_together<R>(x, work);
  return run_items<R>(x, items, work, work);
}

// Adds up what the batch slices found, always in the same order.
template <class R>
void add_slices(const std::vector<R>& parts, int64_t slices, int64_t n, void* total) {
  R* sum = static_cast<R*>(total);
  std::copy_n(parts.data(), n, sum);
  for (int64_t i = 1; i < slices; i++)
    for (int64_t j = 0; j < n; j++) sum[j] += parts[i * n + j];
}

template <class R, int C, class W>
int forward_blocks(const Call& x) {
  const Rows rows(x);
  const Shape<R> s(x);
  const Forward<R, C, W> work(x, rows, static_cast<const W*>(x.packed));
  return run_blocks<R>(x, block_items(x, gates_of(C) * s.padded * s.padded * sizeof(W), false), work);
}

template <class R, int C, class W>
int backward_blocks(const Call& x) {
  const Rows rows(x);
  const Shape<R> s(x);
  const std::vector<Item> items = block_items(x, gates_of(C) * s.padded * s.padded * sizeof(W), true);
  const int64_t slices = slices_of(items), n = gates_of(C) * s.H * s.P, m = gates_of(C) * s.H;
  std::vector<R> dw(slices > 1 ? slices * n : 0), db(slices > 1 && x.dbias ? slices * m : 0);
  R* dbias = db.empty() ? static_cast<R*>(x.dbias) : db.data();
  const Backward<R, C, W> work(x, rows, slices > 1 ? dw.data() : static_cast<R*>(x.dweight), dbias);
  const int result = run_blocks<R>(x, items, work);
  if (slices > 1) add_slices(dw, slices, n, x.dweight);
  if (slices > 1 && x.dbias) add_slices(db, slices, m, x.dbias);
  return result;
}

template <class R, int C>
int forward_diagonal(const Call& x) {
  const Diagonal<R, C> work(x, nullptr, nullptr);
  return run_items<R>(x, diagonal_items(x), work,
                      [&](const Item& it, Team, Pieces<R> memory) { work.forward(it, memory); });
}

template <class R, int C>
int backward_diagonal(const Call& x) {
  const std::vector<Item> items = diagonal_items(x);
  const int64_t slices = slices_of(items), n = gates_of(C) * x.K;
  std::vector<R> dw(slices * n), db(x.dbias ? slices * n : 0);
  const Diagonal<R, C> work(x, dw.data(), x.dbias ? db.data() : nullptr);
  const int result =
      run_items<R>(x, items, work, [&](const Item& it, Team, Pieces<R> memory) { work.backward(it, memory); });
  add_slices(dw, slices, n, x.dweight);
  if (x.dbias) add_slices(db, slices, n, x.dbias);
  return result;
}

template <class R, int C, class W>
int run_cell(const Call& x, bool backward) {
  if (x.diagonal) return backward ? backward_diagonal<R, C>(x) : forward_diagonal<R, C>(x);
  return backward ? backward_blocks<R, C, W>(x) : forward_blocks<R, C, W>(x);
}

template <class R, class W>
int run(const Call& x, bool backward) {
  switch (x.cell) {
    case RNN_TANH:
      return run_cell<R, RNN_TANH, W>(x, backward);
    case RNN_RELU:
      return run_cell<R, RNN_RELU, W>(x, backward);
    case RNN_IDENTITY:
      return run_cell<R, RNN_IDENTITY, W>(x, backward);
    case RNN_MODRELU:
      return run_cell<R, RNN_MODRELU, W>(x, backward);
    case GRU:
      return run_cell<R, GRU, W>(x, backward);
    case GRU_ORIGINAL:
      return run_cell<R, GRU_ORIGINAL, W>(x, backward);
    default:
      return run_cell<R, LSTM, W>(x, backward);
  }
}

template <class R, class W>
void pack(const Call& x) {
  std::atomic<int64_t> next{0};
  parallel(std::min(x.threads, x.K), [&](int, int) {
    for (int64_t k; (k = next.fetch_add(1)) < x.K;)
      pack_forward<R>(x, static_cast<W*>(const_cast<void*>(x.packed)), k, k + 1);
  });
}

// Fused multiply-adds of whole vectors in registers, nothing else: what no kernel can exceed. Flops a second.
double peak_flops() {
  constexpr int chains = 12, rounds = 1 << 20;
  V<float> acc[chains], a = splat(0.999f), b = splat(0.001f);
  double best = 0;
  for (int trial = 0; trial < 8; trial++) {
    UNROLL for (int i = 0; i < chains; i++) acc[i] = splat(float(i));
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < rounds; round++) UNROLL for (int i = 0; i < chains; i++) acc[i] = acc[i] * a + b;
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2.0 * chains * rounds * L<float> / taken.count());
    volatile float used = 0;
    UNROLL for (int i = 0; i < chains; i++) used = used + acc[i][0];
  }
  return best;
}

}  // namespace

#define JOIN(a, b) a##b
#define EXPORT(type, name, isa) __attribute__((visibility("default"))) type JOIN(name, isa)

extern "C" {
EXPORT(void, use_threads_, NAME)(const Threads* t) { threads = *t; }
EXPORT(double, peak_flops_, NAME)() { return peak_flops(); }
EXPORT(int, run_float32_, NAME)(const Call* x, int backward) {
  return x->bfloat16 ? run<float, uint16_t>(*x, backward) : run<float, float>(*x, backward);
}
EXPORT(void, pack_float32_, NAME)(const Call* x) { x->bfloat16 ? pack<float, uint16_t>(*x) : pack<float, float>(*x); }
#ifdef WITH_DOUBLE
EXPORT(int, run_float64_, NAME)(const Call* x, int backward) { return run<double, double>(*x, backward); }
EXPORT(void, pack_float64_, NAME)(const Call* x) { pack<double, double>(*x); }
#endif
}
