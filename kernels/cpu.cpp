// Recurrences on a CPU: forward and backward of every cell, block-diagonal (dense is one block) and diagonal.
//
// The idea. A block is independent of all others, so one thread owns (some blocks, some rows) for ALL time steps: its
// weights stay in its cache, and no thread waits for another. Only where there are fewer blocks than threads do the
// threads share a block, each owning some of its columns, and meet at a barrier at every step.
//
// The pieces, from the inside out:
//   gemm        MB rows of state times a panel of weights, in registers: the only hot loop
//   Cell        what happens to the sums: gates, states, and their derivatives, a vector of units at a time
//   Forward, Backward    walk a work item through time
//   Diagonal    the same cells where a unit sees itself alone: no gemm, columns instead of blocks
//   run         cuts a call into work items and hands them to torch's own threads
//
// kernels/reference.py is the definition; letters as there. This file is compiled once for each instruction set
// (VECTOR_BYTES, REGISTERS and NAME are set by the build) and knows nothing of Python or torch: a plain C interface.

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

// What Python hands over; kernels/cpu.py has the same fields in the same order.
struct Call {
  int64_t T, B, K, P;  // diagonal: K = H, P = 1
  int64_t groups;      // directions
  int64_t cell, diagonal, bfloat16, threads;
  double zoneout_h, zoneout_c;
  const uint8_t* reverse;  // (groups,)
  const int64_t *lengths, *keys;
  const void *u, *weight, *packed, *h0, *c0, *bias, *mask;
  void *y, *h, *c, *saved;
  const void *dy, *dh, *dc;  // backward from here on
  void *du, *dweight, *dh0, *dc0, *dbias;
};

// OpenMP's entry points in the library that torch has already loaded, so that its threads are ours.
struct Threads {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*number)();
  int (*count)();
};

namespace {

enum { RNN_TANH, RNN_RELU, RNN_IDENTITY, RNN_MODRELU, GRU, GRU_ORIGINAL, LSTM };

constexpr int gates_of(int cell) { return cell == LSTM ? 4 : cell >= GRU ? 3 : 1; }
// Sections of H that backward needs: lstm i f g o c, gru r z n and the recurrent term of n, gru_original r z n. An
// Elman cell's derivative follows from its output, unless zoneout has mixed that with the old state: then it is saved.
constexpr int saved_of(int cell) { return cell == LSTM ? 5 : cell == GRU ? 4 : cell == GRU_ORIGINAL ? 3 : 0; }

// Vectors

template <class R>
struct Vector {
  static constexpr int lanes = VECTOR_BYTES / sizeof(R);
  typedef R type __attribute__((vector_size(VECTOR_BYTES)));
  typedef R anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(R))));
};
template <class R>
using V = typename Vector<R>::type;
template <class R>
constexpr int L = Vector<R>::lanes;

// Not memcpy: the compiler would fear that a store of numbers changes a pointer or a count, and load them all again.
template <class R>
INLINE V<R> load(const R* p) {
  return *reinterpret_cast<const typename Vector<R>::anywhere*>(p);
}
template <class R>
INLINE void store(R* p, V<R> v) {
  *reinterpret_cast<typename Vector<R>::anywhere*>(p) = v;
}
// The first n of a vector's lanes; the others are zero, or left alone.
template <class R>
INLINE V<R> load(const R* p, int n) {
  if (n == L<R>) return load<R>(p);
  V<R> v = {};
  std::memcpy(&v, p, n * sizeof(R));
  return v;
}
template <class R>
INLINE void store(R* p, V<R> v, int n) {
  if (n == L<R>)
    store<R>(p, v);
  else
    std::memcpy(p, &v, n * sizeof(R));
}
template <class R>
INLINE V<R> splat(R x) {
  return x - V<R>{};
}

// x within +-limit; NaN stays.
INLINE V<float> clamped(V<float> x, float limit) {
#ifdef __AVX512F__  // one instruction each, which GCC does not find
  return (V<float>)_mm512_max_ps((__m512)splat(-limit), _mm512_min_ps((__m512)splat(limit), (__m512)x));
#else
  x = x > limit ? splat(limit) : x;
  return x < -limit ? splat(-limit) : x;
#endif
}

INLINE V<float> inverse(V<float> x) {
#ifdef __AVX512F__  // a division of a whole vector takes as long as 32 FMAs
  const V<float> y = (V<float>)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// tanh(x) = x P(x^2) / Q(x^2) with degrees 4 and 4 on |x| <= 8: a minimax fit of our own, error below 5 half units of
// the last place and never above 1.
INLINE V<float> tanh_of(V<float> x) {
  x = clamped(x, 8.0f);
  V<float> z = x * x;
  V<float> p = 1.523074466547314e-08f * z + 2.1894915334996767e-05f;
  p = p * z + 0.003571614157408476f;
  p = p * z + 0.13444511592388153f;
  p = p * z + 1.0f;
  V<float> q = 8.522585517312109e-07f * z + 0.00034113178844563663f;
  q = q * z + 0.026164505630731583f;
  q = q * z + 0.46777838468551636f;
  q = q * z + 1.0f;
  return x * p * inverse(q);
}
INLINE V<double> tanh_of(V<double> x) {
  for (int i = 0; i < L<double>; i++) x[i] = std::tanh(x[i]);
  return x;
}
template <class R>
INLINE V<R> sigmoid_of(V<R> x) {
  return R(0.5) + R(0.5) * tanh_of(R(0.5) * x);
}

// A block walks through memory in strides that no hardware prefetcher follows. Into the second-level cache: the first
// has few lines in flight, and needs them.
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Weights in registers: as they are, or from bfloat16.
template <class R>
INLINE V<R> load_weight(const R* p) {
  return load<R>(p);
}
template <class R>
INLINE V<R> load_weight(const uint16_t* p) {
  static_assert(sizeof(R) == 4, "bfloat16 weights go with float32");
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  const Word word = __builtin_convertvector(half, Word) << 16;
  return reinterpret_cast<V<R>>(word);
}
template <class R>
INLINE void store_weight(R* p, R x) {
  *p = x;
}
INLINE void store_weight(uint16_t* p, float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits += 0x7FFF + ((bits >> 16) & 1);
  *p = uint16_t(bits >> 16);
}

// Zoneout

// For each lane whether unit `unit + lane` keeps its old value: reference.hash24, bit for bit.
template <class R>
INLINE V<R> drawn(int64_t key, int64_t t, int64_t H, int64_t unit, int which, double rate) {
  const uint64_t threshold = uint64_t(std::nearbyint(rate * 16777216.0));
  R share[L<R>];
  for (int i = 0; i < L<R>; i++) {
    uint64_t counter = uint64_t((t * H + unit + i) * 2 + which);
    uint64_t z = uint64_t(key) + (counter + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    share[i] = ((z ^ (z >> 31)) >> 40) < threshold ? R(1) : R(0);
  }
  return load<R>(share);
}

// The share of the old value in the new state: 0 or 1 where it is drawn, the rate where it is not.
template <class R>
struct Zone {
  double rate;
  int which;
  const int64_t* keys;
  int64_t H;
  bool on;
  Zone(const Call& x, int w)
      : rate(w ? x.zoneout_c : x.zoneout_h), which(w), keys(x.keys), H(x.K * x.P), on(rate != 0) {}
  INLINE V<R> old_share(int64_t row, int64_t t, int64_t unit) const {
    return keys ? drawn<R>(keys[row], t, H, unit, which, rate) : splat(R(rate));
  }
};

// Cells, a vector of units at a time

template <class R, int C>
INLINE V<R> activate(V<R> a, V<R> b) {
  if (C == RNN_TANH) return tanh_of(a);
  if (C == RNN_RELU) return a > 0 ? a : a * 0;  // a * 0: NaN stays NaN
  if (C == RNN_MODRELU) {
    V<R> size = a < 0 ? -a : a;
    V<R> grown = size + b;
    grown = grown > 0 ? grown : grown * 0;
    return a > 0 ? grown : a < 0 ? -grown : a * 0;
  }
  return a;
}
// Derivative by the output.
template <class R, int C>
INLINE V<R> slope(V<R> y) {
  if (C == RNN_TANH) return R(1) - y * y;
  if (C == RNN_RELU) return y > 0 ? splat(R(1)) : V<R>{};
  if (C == RNN_MODRELU) return y != 0 ? splat(R(1)) : V<R>{};
  return splat(R(1));
}

// What the pre-activation's gradient adds to that of the bias: modReLU's |z| + b grows where z does, away from zero.
template <class R, int C>
INLINE V<R> bias_gradient(V<R> dv, V<R> y) {
  if (C == RNN_MODRELU) return y < 0 ? -dv : dv;  // dv is 0 where y is
  return dv;
}

// What a cell makes of u and v. `s` is what backward needs. gru_original ends in two parts: `reset` is what goes into
// the recurrent weights of the new gate, whose product comes back as v[2].
template <class R, int C>
struct Cell {
  static constexpr int G = gates_of(C), S = saved_of(C);

  static INLINE void gates(const V<R>* u, const V<R>* v, V<R>* s) {  // gru_original, first part
    s[0] = sigmoid_of<R>(u[0] + v[0]);
    s[1] = sigmoid_of<R>(u[1] + v[1]);
  }
  static INLINE void forward(const V<R>* u, const V<R>* v, V<R> b, V<R> hp, V<R> cp, V<R>& h, V<R>& c, V<R>* s) {
    if constexpr (C == LSTM) {
      s[0] = sigmoid_of<R>(u[0] + v[0]);
      s[1] = sigmoid_of<R>(u[1] + v[1]);
      s[2] = tanh_of(u[2] + v[2]);
      s[3] = sigmoid_of<R>(u[3] + v[3]);
      c = s[1] * cp + s[0] * s[2];
      h = s[3] * tanh_of(c);
    } else if constexpr (C == GRU) {
      s[0] = sigmoid_of<R>(u[0] + v[0]);
      s[1] = sigmoid_of<R>(u[1] + v[1]);
      s[2] = tanh_of(u[2] + s[0] * v[2]);
      s[3] = v[2];
      h = s[2] + s[1] * (hp - s[2]);
    } else if constexpr (C == GRU_ORIGINAL) {  // s[0], s[1] are there
      s[2] = tanh_of(u[2] + v[2]);
      h = s[2] + s[1] * (hp - s[2]);
    } else {
      h = activate<R, C>(u[0] + v[0], b);
    }
  }
  // From the gradients of h and c (dh, dc: what reaches this step) to that of the pre-activations, du for u and dv for
  // v, and what goes back past the weights: dh_old, dc_old. gru_original: dv[0] is missing here, see `reset`.
  static INLINE void backward(const V<R>* s, V<R> y, V<R> hp, V<R> cp, V<R> c_new, V<R> dh, V<R> dc, V<R>* du, V<R>* dv,
                              V<R>& dh_old, V<R>& dc_old) {
    if constexpr (C == LSTM) {
      V<R> th = tanh_of(c_new);
      V<R> dcn = dc + dh * s[3] * (R(1) - th * th);
      du[0] = dcn * s[2] * s[0] * (R(1) - s[0]);
      du[1] = dcn * cp * s[1] * (R(1) - s[1]);
      du[2] = dcn * s[0] * (R(1) - s[2] * s[2]);
      du[3] = dh * th * s[3] * (R(1) - s[3]);
      dc_old = dcn * s[1];
      UNROLL for (int g = 0; g < 4; g++) dv[g] = du[g];
    } else if constexpr (C == GRU) {
      du[2] = dh * (R(1) - s[1]) * (R(1) - s[2] * s[2]);
      du[0] = du[2] * s[3] * s[0] * (R(1) - s[0]);
      du[1] = dh * (hp - s[2]) * s[1] * (R(1) - s[1]);
      dv[0] = du[0], dv[1] = du[1], dv[2] = du[2] * s[0];
      dh_old = dh * s[1];
    } else if constexpr (C == GRU_ORIGINAL) {
      du[2] = dv[2] = dh * (R(1) - s[1]) * (R(1) - s[2] * s[2]);
      du[1] = dv[1] = dh * (hp - s[2]) * s[1] * (R(1) - s[1]);
      dh_old = dh * s[1];
    } else {
      du[0] = dv[0] = dh * slope<R, C>(y);
    }
  }
};

// The microkernel

// How many rows of a tile keep their sums in registers beside a panel of NJ vectors.
constexpr int max_rows(int NJ) { return std::min(NJ == 1 ? 16 : 14, (REGISTERS - NJ - 1) / NJ); }

// out[m][j] = sum over k of a[m][k] w[k][j]: MB rows of `a`, kdim numbers each, times a packed panel (kdim, NJ
// vectors).
template <class R, class W, int NJ, int MB>
void gemm(const R* a, int64_t lda, int64_t kdim, const W* w, V<R>* out) {
  constexpr int KS = MB * NJ >= 8 ? 1 : MB * NJ >= 4 ? 2 : 4;  // partial sums, enough to hide the latency of an FMA
  V<R> acc[KS][MB][NJ];
  UNROLL for (int s = 0; s < KS; s++) UNROLL for (int m = 0; m < MB; m++) UNROLL for (int j = 0; j < NJ; j++)
      acc[s][m][j] = V<R>{};
  for (int64_t k = 0; k < kdim; k += KS) {
    UNROLL for (int s = 0; s < KS; s++) {
      V<R> row[NJ];
      UNROLL for (int j = 0; j < NJ; j++) row[j] = load_weight<R>(w + j * L<R>);
      w += NJ * L<R>;
      UNROLL for (int m = 0; m < MB; m++) {
        V<R> x = splat(a[m * lda + s]);
        UNROLL for (int j = 0; j < NJ; j++) acc[s][m][j] += x * row[j];
      }
    }
    a += KS;
  }
  UNROLL for (int m = 0; m < MB; m++) UNROLL for (int j = 0; j < NJ; j++) {
    V<R> sum = acc[0][m][j];
    UNROLL for (int s = 1; s < KS; s++) sum += acc[s][m][j];
    out[m * NJ + j] = sum;
  }
}

template <class R, class W>
using Gemm = void (*)(const R*, int64_t, int64_t, const W*, V<R>*);

template <class R, class W, int NJ, int MB>
constexpr Gemm<R, W> gemm_or_none() {
  if constexpr (MB <= max_rows(NJ))
    return gemm<R, W, NJ, MB>;
  else
    return nullptr;
}
// Indexed by NJ and the number of rows.
#define ROW(NJ)                  \
  {nullptr,                      \
   gemm_or_none<R, W, NJ, 1>(),  \
   gemm_or_none<R, W, NJ, 2>(),  \
   gemm_or_none<R, W, NJ, 3>(),  \
   gemm_or_none<R, W, NJ, 4>(),  \
   gemm_or_none<R, W, NJ, 5>(),  \
   gemm_or_none<R, W, NJ, 6>(),  \
   gemm_or_none<R, W, NJ, 7>(),  \
   gemm_or_none<R, W, NJ, 8>(),  \
   gemm_or_none<R, W, NJ, 9>(),  \
   gemm_or_none<R, W, NJ, 10>(), \
   gemm_or_none<R, W, NJ, 11>(), \
   gemm_or_none<R, W, NJ, 12>(), \
   gemm_or_none<R, W, NJ, 13>(), \
   gemm_or_none<R, W, NJ, 14>(), \
   gemm_or_none<R, W, NJ, 15>(), \
   gemm_or_none<R, W, NJ, 16>()}
template <class R, class W>
constexpr Gemm<R, W> gemms[5][17] = {{}, ROW(1), ROW(2), ROW(3), ROW(4)};
#undef ROW

// dw[p][q] += sum over rows of a[row][p] x[row][q], MB values of p and NJ vectors of q.
template <class R, int NJ, int MB>
INLINE void outer(const R* a, int64_t lda, const R* x, int64_t ldx, int64_t rows, R* dw, int64_t ldw) {
  V<R> acc[MB][NJ];
  UNROLL for (int m = 0; m < MB; m++) UNROLL for (int j = 0; j < NJ; j++) acc[m][j] = load<R>(dw + m * ldw + j * L<R>);
  for (int64_t r = 0; r < rows; r++) {
    V<R> row[NJ];
    UNROLL for (int j = 0; j < NJ; j++) row[j] = load<R>(x + j * L<R>);
    UNROLL for (int m = 0; m < MB; m++) {
      V<R> v = splat(a[m]);
      UNROLL for (int j = 0; j < NJ; j++) acc[m][j] += v * row[j];
    }
    a += lda, x += ldx;
  }
  UNROLL for (int m = 0; m < MB; m++) UNROLL for (int j = 0; j < NJ; j++) store<R>(dw + m * ldw + j * L<R>, acc[m][j]);
}

// Shapes

template <class R>
struct Shape {
  int64_t T, B, K, P, H;
  int64_t padded;   // P, up to whole vectors
  int64_t vectors;  // of a block
  int64_t depth;    // P, up to what gemm takes at a time: the rest of a padded row is zero
  int NU;           // vectors of units in a panel of one gate
  explicit Shape(const Call& x) : T(x.T), B(x.B), K(x.K), P(x.P), H(x.K * x.P) {
    vectors = (P + L<R> - 1) / L<R>;
    if (L<R> < 4 && vectors % 2) vectors++;  // gemm takes up to four k at a time
    padded = vectors * L<R>;
    depth = (P + 3) / 4 * 4;
    NU = vectors == 4 ? 4 : vectors % 2 ? 1 : 2;
  }
  // Units of a block in its vector number j, 0 where it is all padding.
  int valid(int64_t j) const { return int(std::clamp<int64_t>(P - j * L<R>, 0, L<R>)); }
  // Where a block's part of `saved` begins: nobody else reads it, so it lies as we walk, (K, T, B, sections, P).
  int64_t saved(int sections, int64_t k) const { return k * T * B * sections * P; }
};

// The gates that one pass of gemm computes together, as panels of NU vectors each: gru_original has two passes.
struct Pass {
  int first, count, NU;
};
template <class R>
Pass forward_pass(int cell, const Shape<R>& s, int which) {
  if (cell < GRU) return {0, 1, s.NU};
  if (cell == GRU_ORIGINAL) return which ? Pass{2, 1, s.NU} : Pass{0, 2, 1};
  return {0, gates_of(cell), 1};
}
constexpr int passes_of(int cell) { return cell == GRU_ORIGINAL ? 2 : 1; }

// Packing

// Forward: for each block and pass the panels (q, gate, unit) of W[gate][unit][q], zero where padded.
template <class R, class W>
void pack_forward(const Call& x, W* packed, int64_t first, int64_t last) {
  const Shape<R> s(x);
  const int G = gates_of(int(x.cell));
  const R* weight = static_cast<const R*>(x.weight);
  for (int64_t k = first; k < last; k++) {
    W* p = packed + k * G * s.padded * s.padded;
    for (int pass = 0; pass < passes_of(int(x.cell)); pass++) {
      const Pass z = forward_pass(int(x.cell), s, pass);
      const int width = z.count * z.NU * L<R>;
      for (int64_t panel = 0; panel < s.vectors / z.NU; panel++, p += s.padded * width) {
        for (int g = 0; g < z.count; g++)
          for (int i = 0; i < z.NU * L<R>; i++) {
            const int64_t unit = panel * z.NU * L<R> + i;
            W* to = p + g * z.NU * L<R> + i;
            const R* from = weight + (((z.first + g) * s.K + k) * s.P + unit) * s.P;
            for (int64_t q = 0; q < s.padded; q++) store_weight(to + q * width, unit < s.P && q < s.P ? from[q] : R(0));
          }
      }
    }
  }
}

// Backward: for each block the panels (gate and unit, q) of the same numbers, the gates from `first` on.
template <class R, class W>
void pack_backward(const Call& x, const Shape<R>& s, int64_t k, int first, int count, W* packed) {
  const R* weight = static_cast<const R*>(x.weight);
  const int width = s.NU * L<R>;
  for (int64_t panel = 0; panel < s.vectors / s.NU; panel++)
    for (int g = first; g < first + count; g++)
      for (int64_t unit = 0; unit < s.padded; unit++, packed += width)
        for (int i = 0; i < width; i++) {
          const int64_t q = panel * width + i;
          const bool real = unit < s.P && q < s.P;
          store_weight(packed + i, real ? weight[((g * s.K + k) * s.P + unit) * s.P + q] : R(0));
        }
}

// Threads

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
      length[r] = x.lengths[order[r]];
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

// Forward

template <class R, int C, class W>
struct Forward {
  static constexpr int G = gates_of(C), S = saved_of(C), SAVED = std::max(S, 1);
  const Call& x;
  const Rows& rows;
  const Shape<R> s;
  const Zone<R> zone_h, zone_c;
  const W* packed;
  int64_t ld;

  Forward(const Call& call, const Rows& r, const W* p)
      : x(call), rows(r), s(call), zone_h(call, 0), zone_c(call, 1), packed(p), ld(s.padded + L<R>) {}

  bool raw() const { return x.mask != nullptr; }  // the state beside its masked copy
  // The states of one block: [2] in `a` and `h` are the old and the new one by the parity of the step.
  struct Block {
    int64_t k, column;
    R *a[2], *h[2], *c, *rz, *reset;
    const W* w;
    bool backwards;
  };

  std::vector<Block> lay_out(const Item& it, Pieces<R>& memory) const {
    const int64_t n = it.r1 - it.r0;
    std::vector<Block> all(it.k1 - it.k0);
    for (Block& b : all) {
      b.k = it.k0 + (&b - all.data()), b.column = b.k * s.P;
      b.backwards = x.reverse[b.k / (s.K / x.groups)];
      b.w = packed + b.k * G * s.padded * s.padded;
      for (int p = 0; p < 2; p++) b.a[p] = memory.take(n * ld);
      for (int p = 0; p < 2; p++) b.h[p] = raw() ? memory.take(n * ld) : b.a[p];
      b.c = C == LSTM ? memory.take(n * ld) : nullptr;
      b.rz = C == GRU_ORIGINAL ? memory.take(2 * n * ld) : nullptr;
      b.reset = C == GRU_ORIGINAL ? memory.take(n * ld) : nullptr;
    }
    return all;
  }

  void operator()(const Item& it, Team team, Pieces<R> memory) const {
    const int64_t n = it.r1 - it.r0, blocks = it.k1 - it.k0;
    std::vector<Block> all = lay_out(it, memory);
    for (int64_t i = team.begin(blocks); i < team.end(blocks); i++) start(all[i], it);
    team.meet();
    for (int64_t step = 0; step < s.T; step++)
      for (int pass = 0; pass < passes_of(C); pass++) {
        for (Block& b : all) {
          const int64_t t = b.backwards ? s.T - 1 - step : step;
          const int64_t active = std::clamp<int64_t>(rows.running[t] - it.r0, 0, n);
          run(b, it, t, step & 1, active, pass, team);
          if (pass == 0 && team.self == 0)
            for (int64_t r = active; r < n; r++) past_the_end(t * s.B + rows.order[it.r0 + r], b.k);
        }
        team.meet();
      }
    for (int64_t i = team.begin(blocks); i < team.end(blocks); i++)
      for (int64_t r = 0; r < n; r++) {
        const int64_t row = rows.order[it.r0 + r], steps = all[i].backwards ? s.T : rows.length[it.r0 + r];
        std::copy_n(all[i].h[steps & 1] + r * ld, s.P, at<R>(x.h, row * s.H + all[i].column));
        if (C == LSTM) std::copy_n(all[i].c + r * ld, s.P, at<R>(x.c, row * s.H + all[i].column));
      }
  }

  void past_the_end(int64_t frame, int64_t k) const {
    std::fill_n(at<R>(x.y, frame * s.H + k * s.P), s.P, R(0));
    if (x.saved) std::fill_n(at<R>(x.saved, s.saved(SAVED, k) + frame * SAVED * s.P), SAVED * s.P, R(0));
  }

  void start(Block& b, const Item& it) const {
    for (int64_t r = 0; r < it.r1 - it.r0; r++) {
      const int64_t place = rows.order[it.r0 + r] * s.H + b.column;
      for (int64_t j = 0; j < ld; j++) {
        const bool real = j < s.P;
        const R h = real && x.h0 ? *at<R>(x.h0, place + j) : R(0);
        for (int p = 0; p < 2; p++) b.a[p][r * ld + j] = real && x.mask ? h * *at<R>(x.mask, place + j) : h;
        if (raw())
          for (int p = 0; p < 2; p++) b.h[p][r * ld + j] = h;
        if (C == LSTM) b.c[r * ld + j] = real && x.c0 ? *at<R>(x.c0, place + j) : R(0);
        if (C == GRU_ORIGINAL) b.reset[r * ld + j] = R(0);
      }
    }
  }

  // What the epilogue needs, by value: the compiler must not fear that a store into y changes a pointer.
  struct Local {
    const R *u, *bias, *mask;
    R *y, *saved, *a, *h, *c, *rz, *reset;  // a and h: the new state
    const R *old_a, *old_h;
    int64_t H, B, P, ld, column, t, ahead;
    Zone<R> zone_h, zone_c;
  };

  void run(Block& b, const Item& it, int64_t t, int parity, int64_t active, int pass, Team team) const {
    const Local l{at<R>(x.u, b.column),
                  x.bias ? at<R>(x.bias, b.column) : nullptr,
                  x.mask ? at<R>(x.mask, b.column) : nullptr,
                  at<R>(x.y, b.column),
                  x.saved ? at<R>(x.saved, s.saved(SAVED, b.k)) : nullptr,
                  b.a[!parity],
                  b.h[!parity],
                  b.c,
                  b.rz,
                  b.reset,
                  b.a[parity],
                  b.h[parity],
                  s.H,
                  s.B,
                  s.P,
                  ld,
                  b.column,
                  t,
                  (b.backwards ? -2 : 2) * s.B,
                  zone_h,
                  zone_c};
    const bool simple = !x.mask && !zone_h.on && !zone_c.on && s.padded == s.P;
    simple ? run_tiles<true>(b, l, it, active, pass, team) : run_tiles<false>(b, l, it, active, pass, team);
  }

  template <bool SIMPLE>
  void run_tiles(const Block& b, const Local& l, const Item& it, int64_t active, int pass, Team team) const {
    const Pass z = forward_pass(C, s, pass);
    const int NJ = z.count * z.NU;
    const int64_t panels = s.vectors / z.NU, size = s.padded * NJ * L<R>, lda = ld;
    const W* w = b.w + (pass ? 2 * s.padded * s.padded : 0);
    const R* a = pass ? l.reset : l.old_a;
    const int64_t* order = rows.order.data() + it.r0;
    V<R> sums[16 * 4];
    for (int64_t panel = team.begin(panels); panel < team.end(panels); panel++)
      for_tiles(0, active, max_rows(NJ), [&](int64_t first, int64_t last) {
        gemms<R, W>[NJ][last - first](a + first* lda, lda, s.depth, w + panel* size, sums);
        for (int64_t r = first; r < last; r++)
          for (int i = 0; i < z.NU; i++) {
            const int64_t j = panel * z.NU + i;
            const int valid = SIMPLE ? L<R> : s.valid(j);
            if (valid) epilogue<SIMPLE>(l, r, order[r], pass, j * L<R>, valid, sums + (r - first) * NJ + i, z.NU);
          }
      });
  }

  // One row and vector of units: `sums` holds v of each gate of this pass, `apart` vectors from each other.
  template <bool SIMPLE>
  INLINE void epilogue(const Local l, int64_t r, int64_t row, int pass, int64_t unit, int valid, const V<R>* sums,
                       int apart) const {
    const int64_t frame = l.t * l.B + row, state = r * l.ld + unit;
    const R* u_at = l.u + frame * G * l.H + unit;
    const V<R> hp = load<R>(l.old_h + state);
    V<R> u[G], v[G], kept[S + 1], h, c = {}, cp = {}, modulus = {};
    const int first = pass ? 2 : 0, count = C == GRU_ORIGINAL ? 2 - pass : G;
    UNROLL for (int g = 0; g < count; g++) {
      u[first + g] = load<R>(u_at + (first + g) * l.H, valid);
      v[first + g] = sums[g * apart];
      if (l.bias && C != RNN_MODRELU) v[first + g] += load<R>(l.bias + (first + g) * l.H + unit, valid);
      fetch(u_at + (first + g) * l.H + l.ahead * G * l.H);
    }
    if (C == RNN_MODRELU && l.bias) modulus = load<R>(l.bias + unit, valid);
    if constexpr (C == GRU_ORIGINAL) {
      R* rz = l.rz + 2 * r * l.ld + unit;
      if (pass == 0) {
        Cell<R, C>::gates(u, v, kept);
        store<R>(rz, kept[0]);
        store<R>(rz + l.ld, kept[1]);
        store<R>(l.reset + state, kept[0] * load<R>(l.old_a + state));
        return;
      }
      kept[0] = load<R>(rz);
      kept[1] = load<R>(rz + l.ld);
    }
    if (C == LSTM) cp = load<R>(l.c + state);
    Cell<R, C>::forward(u, v, modulus, hp, cp, h, c, kept);
    if (S == 0 && l.saved) store<R>(l.saved + frame * l.P + unit, h, valid);
    if (!SIMPLE && l.zone_h.on) h += l.zone_h.old_share(row, l.t, l.column + unit) * (hp - h);
    if constexpr (C == LSTM) {
      if (!SIMPLE && l.zone_c.on) c += l.zone_c.old_share(row, l.t, l.column + unit) * (cp - c);
      store<R>(l.c + state, c);
      kept[4] = c;
    }
    store<R>(l.h + state, h);
    if (!SIMPLE && l.mask) store<R>(l.a + state, h * load<R>(l.mask + row * l.H + unit, valid));
    R* y_at = l.y + frame * l.H + unit;
    fetch(y_at + l.ahead * l.H);
    store<R>(y_at, h, valid);
    if (S && l.saved) {
      R* to = l.saved + frame * S * l.P + unit;
      UNROLL for (int i = 0; i < S; i++) {
        fetch(to + i * l.P + l.ahead * S * l.P);
        store<R>(to + i * l.P, kept[i], valid);
      }
    }
  }
};

// Backward

template <class R, int C, class W>
struct Backward {
  static constexpr int G = gates_of(C), S = saved_of(C), SAVED = std::max(S, 1);
  static constexpr int64_t CHUNK = 64;  // rows of gradients that are gathered before the weights' gradient is updated
  const Call& x;
  const Rows& rows;
  const Shape<R> s;
  const Zone<R> zone_h, zone_c;
  R *dweight, *dbias;  // one of each a batch slice, added up afterwards
  int64_t ld, lda;

  Backward(const Call& call, const Rows& r, R* dw, R* db)
      : x(call),
        rows(r),
        s(call),
        zone_h(call, 0),
        zone_c(call, 1),
        dweight(dw),
        dbias(db),
        ld(s.padded + L<R>),
        lda(G * s.padded + L<R>) {}

  int64_t chunk(const Item& it) const { return std::max(CHUNK, 3 * (it.r1 - it.r0)); }

  // `a` gathers the gradients of v, `hidden` the old states they meet, of several steps: row `now + r` is row r of
  // this step, `before + r` of the step before.
  struct Block {
    int64_t k, column;
    W* w;
    R *a, *hidden, *reset, *dh, *dc, *dw, *db;
    int64_t now, before, running_before;
    bool backwards;
  };

  std::vector<Block> lay_out(const Item& it, Pieces<R>& memory) const {
    const int64_t n = it.r1 - it.r0, cut = chunk(it);
    std::vector<Block> all(it.k1 - it.k0);
    for (Block& b : all) {
      b.k = it.k0 + (&b - all.data()), b.column = b.k * s.P;
      b.backwards = x.reverse[b.k / (s.K / x.groups)];
      b.w = reinterpret_cast<W*>(memory.take(G * s.padded * s.padded * sizeof(W) / sizeof(R) + 1));
      b.a = memory.take(cut * lda);
      b.hidden = memory.take(cut * ld);
      b.reset = C == GRU_ORIGINAL ? memory.take(cut * ld) : nullptr;
      b.dh = memory.take(n * ld);
      b.dc = C == LSTM ? memory.take(n * ld) : nullptr;
      b.dw = memory.take(G * s.padded * s.padded);
      b.db = memory.take(G * s.padded);
      b.now = b.before = b.running_before = 0;
    }
    return all;
  }

  void operator()(const Item& it, Team team, Pieces<R> memory) const {
    const int64_t n = it.r1 - it.r0, blocks = it.k1 - it.k0, cut = chunk(it);
    std::vector<Block> all = lay_out(it, memory);
    for (int64_t i = team.begin(blocks); i < team.end(blocks); i++) start(all[i], it);
    team.meet();
    for (int64_t step = 0; step <= s.T; step++) {
      for (Block& b : all) {
        const int64_t t = b.backwards ? step : s.T - 1 - step;
        const int64_t active = step < s.T ? std::clamp<int64_t>(rows.running[t] - it.r0, 0, n) : 0;
        if (step && b.now + active > cut) {
          weights(b, b.now, team);
          b.now = 0;
          team.meet();
        }
        through_time(b, it, t, step, active, team);
      }
      team.meet();
      if (C == GRU_ORIGINAL && step < s.T) {
        for (Block& b : all) through_reset(b, it, b.backwards ? step : s.T - 1 - step, team);
        team.meet();
      }
      for (Block& b : all) {
        const int64_t t = b.backwards ? step : s.T - 1 - step;
        const int64_t active = step < s.T ? std::clamp<int64_t>(rows.running[t] - it.r0, 0, n) : 0;
        b.before = b.now, b.running_before = active, b.now += active;
      }
    }
    for (Block& b : all) weights(b, b.now, team);
    team.meet();
    for (int64_t i = team.begin(blocks); i < team.end(blocks); i++) finish(all[i], it);
  }

  void start(Block& b, const Item& it) const {
    if (C == GRU_ORIGINAL) {
      pack_backward<R, W>(x, s, b.k, 0, 2, b.w);
      pack_backward<R, W>(x, s, b.k, 2, 1, b.w + 2 * s.padded * s.padded);
    } else {
      pack_backward<R, W>(x, s, b.k, 0, G, b.w);
    }
    std::fill_n(b.dw, G * s.padded * s.padded, R(0));
    std::fill_n(b.db, G * s.padded, R(0));
    for (int64_t r = 0; r < it.r1 - it.r0; r++) {
      const int64_t place = rows.order[it.r0 + r] * s.H + b.column;
      std::fill_n(b.dh + r * ld, ld, R(0));
      std::copy_n(at<R>(x.dh, place), s.P, b.dh + r * ld);
      std::copy_n(at<R>(x.dh, place), s.P, at<R>(x.dh0, place));  // stays for a row of length 0
      if (C == LSTM) {
        std::fill_n(b.dc + r * ld, ld, R(0));
        std::copy_n(at<R>(x.dc, place), s.P, b.dc + r * ld);
      }
    }
  }

  // What the epilogue needs, by value, as in Forward.
  struct Local {
    const R *y, *saved, *dy, *mask, *h0, *c0;
    R *du, *a, *hidden, *reset, *dh, *dc, *db, *dh0;  // a, hidden and reset: from this step's first row on
    const int64_t* length;
    int64_t H, B, P, ld, lda, padded, column, t, back, ahead;  // back: frames to the step that came before this one
    Zone<R> zone_h, zone_c;
    bool backwards;
  };

  // The rows of this step, and those that have just ended: their gradient has arrived at the initial state.
  void through_time(Block& b, const Item& it, int64_t t, int64_t step, int64_t active, Team team) const {
    const int64_t back = (b.backwards ? 1 : -1) * s.B;
    auto column = [&](const void* p) { return p ? at<R>(p, b.column) : nullptr; };
    const Local l{column(x.y),
                  x.saved ? at<R>(x.saved, s.saved(SAVED, b.k)) : nullptr,
                  column(x.dy),
                  column(x.mask),
                  column(x.h0),
                  column(x.c0),
                  at<R>(x.du, b.column),
                  b.a + b.now * lda,
                  b.hidden + b.now * ld,
                  C == GRU_ORIGINAL ? b.reset + b.now * ld : nullptr,
                  b.dh,
                  b.dc,
                  dbias ? b.db : nullptr,
                  at<R>(x.dh0, b.column),
                  rows.length.data() + it.r0,
                  s.H,
                  s.B,
                  s.P,
                  ld,
                  lda,
                  s.padded,
                  b.column,
                  t,
                  back,
                  2 * back,
                  zone_h,
                  zone_c,
                  b.backwards};
    const bool simple = !x.mask && !zone_h.on && !zone_c.on && s.padded == s.P;
    simple ? run_tiles<true>(b, l, it, active, team) : run_tiles<false>(b, l, it, active, team);
    if (team.self == 0 && step < s.T)
      for (int64_t r = active; r < it.r1 - it.r0; r++)
        for (int g = 0; g < G; g++)
          std::fill_n(at<R>(x.du, ((t * s.B + rows.order[it.r0 + r]) * G + g) * s.H + b.column), s.P, R(0));
  }

  template <bool SIMPLE>
  void run_tiles(const Block& b, const Local& l, const Item& it, int64_t active, Team team) const {
    constexpr int deep = C == GRU_ORIGINAL ? 2 : G;
    const int NU = s.NU;
    const int64_t panels = s.vectors / NU, kdim = deep * s.padded, size = kdim * NU * L<R>, row_size = lda;
    const int64_t* order = rows.order.data() + it.r0;
    const R* before = b.a + b.before * lda;
    V<R> sums[16 * 4];
    for (int64_t panel = team.begin(panels); panel < team.end(panels); panel++) {
      auto tile = [&](int64_t first, int64_t last, bool from_before, bool ended) {
        if (from_before)
          gemms<R, W>[NU][last - first](before + first* row_size, row_size, kdim, b.w + panel* size, sums);
        else
          std::fill_n(sums, (last - first) * NU, V<R>{});
        for (int64_t r = first; r < last; r++)
          for (int i = 0; i < NU; i++) {
            const int64_t unit = (panel * NU + i) * L<R>;
            const int valid = SIMPLE ? L<R> : s.valid(panel * NU + i);
            const V<R> sum = sums[(r - first) * NU + i];
            if (valid && ended)
              arrive(l, r, order[r], unit, valid, sum);
            else if (valid)
              epilogue<SIMPLE>(l, r, order[r], unit, valid, sum);
            else if (!ended)
              clear(l, r, unit);
          }
      };
      const int most = max_rows(NU);
      const int64_t common = std::min(active, b.running_before);
      for_tiles(0, common, most, [&](int64_t f, int64_t e) { tile(f, e, true, false); });
      for_tiles(common, active, most, [&](int64_t f, int64_t e) { tile(f, e, false, false); });
      for_tiles(active, b.running_before, most, [&](int64_t f, int64_t e) { tile(f, e, true, true); });
    }
  }

  void clear(const Local& l, int64_t r, int64_t unit) const {  // gemm reads what is past the block
    for (int g = 0; g < G; g++) store<R>(l.a + r * l.lda + g * l.padded + unit, V<R>{});
    store<R>(l.hidden + r * l.ld + unit, V<R>{});
    if (C == GRU_ORIGINAL) store<R>(l.reset + r * l.ld + unit, V<R>{});
  }

  static INLINE V<R> masked(V<R> sum, const R* mask, int64_t place, int valid) {
    return mask ? sum * load<R>(mask + place, valid) : sum;
  }

  void arrive(const Local& l, int64_t r, int64_t row, int64_t unit, int valid, V<R> sum) const {
    const int64_t place = row * l.H + unit;
    store<R>(l.dh0 + place, load<R>(l.dh + r * l.ld + unit) + masked(sum, l.mask, place, valid), valid);
  }

  template <bool SIMPLE>
  INLINE void epilogue(const Local l, int64_t r, int64_t row, int64_t unit, int valid, V<R> sum) const {
    const int64_t place = row * l.H + unit, frame = l.t * l.B + row, state = r * l.ld + unit;
    const R *y = l.y + frame * l.H + unit, *saved = l.saved + frame * S * l.P + unit, *dy = l.dy + frame * l.H + unit;
    const bool first = l.backwards ? l.t == l.length[r] - 1 : l.t == 0;  // before it came the initial state
    V<R> kept[S + 1], du[G], dv[G], dh_old = {}, dc_old = {}, c_new = {}, cp = {}, dc = {}, hp = {}, through = {};
    UNROLL for (int i = 0; i < S; i++) {
      kept[i] = load<R>(saved + i * l.P, valid);
      fetch(saved + i * l.P + l.ahead * S * l.P);
    }
    if (!first)
      hp = load<R>(y + l.back * l.H, valid);
    else if (l.h0)
      hp = load<R>(l.h0 + place, valid);
    const V<R> now = load<R>(y, valid);
    const V<R> candidate = S == 0 && l.saved ? load<R>(l.saved + frame * l.P + unit, valid) : now;
    fetch(y + l.ahead * l.H);
    fetch(dy + l.ahead * l.H);
    if (!SIMPLE) sum = masked(sum, l.mask, place, valid);
    V<R> dh = load<R>(l.dh + state) + sum + load<R>(dy, valid);
    if (!SIMPLE && l.zone_h.on) {
      through = dh * l.zone_h.old_share(row, l.t, l.column + unit);
      dh -= through;
    }
    if constexpr (C == LSTM) {
      if (!first)
        cp = load<R>(saved + 4 * l.P + l.back * S * l.P, valid);
      else if (l.c0)
        cp = load<R>(l.c0 + place, valid);
      c_new = kept[4];
      dc = load<R>(l.dc + state);
      if (!SIMPLE && l.zone_c.on) {
        c_new = kept[1] * cp + kept[0] * kept[2];
        dc_old = dc * l.zone_c.old_share(row, l.t, l.column + unit);
        dc -= dc_old;
      }
    }
    V<R> dc_through = {};
    Cell<R, C>::backward(kept, candidate, hp, cp, c_new, dh, dc, du, dv, dh_old, dc_through);
    store<R>(l.dh + state, dh_old + through);
    if (C == LSTM) store<R>(l.dc + state, dc_old + dc_through);
    const V<R> hidden = SIMPLE ? hp : masked(hp, l.mask, place, valid);
    R *a = l.a + r * l.lda + unit, *to = l.du + frame * G * l.H + unit;
    UNROLL for (int g = 0; g < G; g++) {
      if (C == GRU_ORIGINAL && g == 0) continue;  // through_reset
      store<R>(a + g * l.padded, dv[g]);
      fetch(to + g * l.H + l.ahead * G * l.H);
      store<R>(to + g * l.H, du[g], valid);
    }
    store<R>(l.hidden + state, hidden);
    if (C == GRU_ORIGINAL) store<R>(l.reset + state, kept[0] * hidden);
    if (C == RNN_MODRELU && l.db) store<R>(l.db + unit, load<R>(l.db + unit) + bias_gradient<R, C>(dv[0], candidate));
  }

  // gru_original: the gradient of the new gate comes back to r * h, and from there to r and h.
  void through_reset(Block& b, const Item& it, int64_t t, Team team) const {
    const int64_t n = it.r1 - it.r0, panels = s.vectors / s.NU, size = s.padded * s.NU * L<R>;
    const int64_t active = std::clamp<int64_t>(rows.running[t] - it.r0, 0, n);
    const W* w = b.w + 2 * s.padded * s.padded;
    V<R> sums[16 * 4];
    for (int64_t panel = team.begin(panels); panel < team.end(panels); panel++)
      for_tiles(0, active, max_rows(s.NU), [&](int64_t first, int64_t last) {
        gemms<R, W>[s.NU][last - first](b.a + (b.now + first)* lda + 2 * s.padded, lda, s.padded, w + panel* size,
                                        sums);
        for (int64_t r = first; r < last; r++)
          for (int i = 0; i < s.NU; i++) {
            const int64_t unit = (panel * s.NU + i) * L<R>, row = rows.order[it.r0 + r], column = b.column + unit;
            const int valid = s.valid(panel * s.NU + i);
            if (!valid) continue;
            const V<R> sum = sums[(r - first) * s.NU + i];
            const R* saved = at<R>(x.saved, s.saved(S, b.k) + (t * s.B + row) * S * s.P + unit);
            const V<R> reset = load<R>(saved, valid);
            const V<R> hidden = load<R>(b.hidden + (b.now + r) * ld + unit);
            const V<R> d = sum * hidden * reset * (R(1) - reset);
            store<R>(b.a + (b.now + r) * lda + unit, d);
            store<R>(at<R>(x.du, (t * s.B + row) * G * s.H + column), d, valid);
            R* dh = b.dh + r * ld + unit;
            const R* mask = x.mask ? at<R>(x.mask, column) : nullptr;
            store<R>(dh, load<R>(dh) + masked(sum * reset, mask, row * s.H, valid));
          }
      });
  }

  // Adds the gathered steps to the gradient of the weights.
  void weights(Block& b, int64_t gathered, Team team) const {
    if (!gathered) return;
    constexpr int MB = REGISTERS == 32 ? 8 : 4, NJ = 2;
    for (int g = 0; g < G; g++) {
      const R* hidden = C == GRU_ORIGINAL && g == 2 ? b.reset : b.hidden;
      R* dw = b.dw + g * s.padded * s.padded;
      const R* a = b.a + g * s.padded;
      const int64_t groups = s.padded / MB;  // padded is a multiple: at least 8 lanes, or 4
      for (int64_t m = team.begin(groups) * MB; m < team.end(groups) * MB; m += MB) {
        int64_t j = 0;
        for (; j + NJ <= s.vectors; j += NJ)
          outer<R, NJ, MB>(a + m, lda, hidden + j * L<R>, ld, gathered, dw + m * s.padded + j * L<R>, s.padded);
        if (j < s.vectors)
          outer<R, 1, MB>(a + m, lda, hidden + j * L<R>, ld, gathered, dw + m * s.padded + j * L<R>, s.padded);
      }
    }
    if (C != RNN_MODRELU && dbias && team.self == 0)
      for (int64_t r = 0; r < gathered; r++)
        for (int64_t j = 0; j < G * s.padded; j += L<R>)
          store<R>(b.db + j, load<R>(b.db + j) + load<R>(b.a + r * lda + j));
  }

  void finish(Block& b, const Item& it) const {
    for (int g = 0; g < G; g++) {
      for (int64_t p = 0; p < s.P; p++)
        std::copy_n(b.dw + (g * s.padded + p) * s.padded, s.P,
                    dweight + (((it.slice * G + g) * s.K + b.k) * s.P + p) * s.P);
      if (dbias) std::copy_n(b.db + g * s.padded, s.P, dbias + (it.slice * G + g) * s.H + b.column);
    }
    if (C == LSTM)
      for (int64_t r = 0; r < it.r1 - it.r0; r++)
        std::copy_n(b.dc + r * ld, s.P, at<R>(x.dc0, rows.order[it.r0 + r] * s.H + b.column));
  }
};

// Diagonal: rows [r0, r1) of the batch and columns [k0, k1), one row after the other through time.

template <class R, int C>
struct Diagonal {
  static constexpr int G = gates_of(C), S = saved_of(C);
  const Call& x;
  const Zone<R> zone_h, zone_c;
  const int64_t H;
  R *dweight, *dbias;

  Diagonal(const Call& call, R* dw, R* db)
      : x(call), zone_h(call, 0), zone_c(call, 1), H(call.K), dweight(dw), dbias(db) {}

  struct Strip {
    int64_t width, room, rows;
    R *h, *c, *dw, *db;  // h, c: the states going forwards, their gradients going backwards
    bool backwards;
  };
  Strip lay_out(const Item& it, Pieces<R>& memory) const {
    const int64_t width = it.k1 - it.k0, room = width + L<R>, n = it.r1 - it.r0;
    R *h = memory.take(n * room), *c = memory.take(n * room);
    R *dw = memory.take(G * room), *db = memory.take(G * room);
    return {width, room, n, h, c, dw, db, bool(x.reverse[it.k0 / (H / x.groups)])};
  }

  int64_t length(int64_t row) const { return x.lengths ? x.lengths[row] : x.T; }

  void forward(const Item& it, Pieces<R> memory) const {
    const auto [width, room, n, h, c, dw, db, backwards] = lay_out(it, memory);
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = 0; j < width; j++) {
        const int64_t place = (it.r0 + r) * H + it.k0 + j;
        h[r * room + j] = x.h0 ? *at<R>(x.h0, place) : R(0);
        c[r * room + j] = C == LSTM && x.c0 ? *at<R>(x.c0, place) : R(0);
      }
    for (int64_t step = 0; step < x.T; step++) {
      const int64_t t = backwards ? x.T - 1 - step : step;
      for (int64_t r = 0; r < n; r++)
        if (t < length(it.r0 + r))
          for (int64_t j = 0; j < width; j += L<R>)
            forward_step(it.r0 + r, t, backwards ? -x.B : x.B, it.k0 + j, int(std::min<int64_t>(L<R>, width - j)),
                         h + r * room + j, c + r * room + j);
        else
          past_the_end(t * x.B + it.r0 + r, it.k0, width);
    }
    for (int64_t r = 0; r < n; r++) {
      std::copy_n(h + r * room, width, at<R>(x.h, (it.r0 + r) * H + it.k0));
      if (C == LSTM) std::copy_n(c + r * room, width, at<R>(x.c, (it.r0 + r) * H + it.k0));
    }
  }

  void past_the_end(int64_t frame, int64_t column, int64_t width) const {
    std::fill_n(at<R>(x.y, frame * H + column), width, R(0));
    for (int i = 0; x.saved && i < std::max(S, 1); i++)
      std::fill_n(at<R>(x.saved, (frame * std::max(S, 1) + i) * H + column), width, R(0));
  }

  INLINE V<R> weight(int g, int64_t column, int valid) const { return load<R>(at<R>(x.weight, g * H + column), valid); }
  INLINE V<R> bias(int g, int64_t column, int valid) const {
    return x.bias ? load<R>(at<R>(x.bias, g * H + column), valid) : V<R>{};
  }
  INLINE V<R> masked(V<R> h, int64_t row, int64_t column, int valid) const {
    return x.mask ? h * load<R>(at<R>(x.mask, row * H + column), valid) : h;
  }

  // `ahead`: frames from this step to the next. The memory that it will need is fetched meanwhile.
  INLINE void forward_step(int64_t row, int64_t t, int64_t ahead, int64_t column, int valid, R* h_at, R* c_at) const {
    const int64_t frame = t * x.B + row;
    const V<R> hp = load<R>(h_at, valid), hm = masked(hp, row, column, valid);
    V<R> u[G], v[G], s[S + 1], h, c = {}, cp = {};
    UNROLL for (int g = 0; g < G; g++) {
      u[g] = load<R>(at<R>(x.u, (frame * G + g) * H + column), valid);
      fetch(at<R>(x.u, ((frame + ahead) * G + g) * H + column));
      v[g] = weight(g, column, valid) * hm;
      if (C != RNN_MODRELU) v[g] += bias(g, column, valid);
    }
    if constexpr (C == GRU_ORIGINAL) {
      Cell<R, C>::gates(u, v, s);
      v[2] = weight(2, column, valid) * (s[0] * hm) + bias(2, column, valid);
    }
    if (C == LSTM) cp = load<R>(c_at, valid);
    Cell<R, C>::forward(u, v, C == RNN_MODRELU ? bias(0, column, valid) : V<R>{}, hp, cp, h, c, s);
    if (S == 0 && x.saved) store<R>(at<R>(x.saved, frame * H + column), h, valid);
    if (zone_h.on) h += zone_h.old_share(row, t, column) * (hp - h);
    if constexpr (C == LSTM) {
      if (zone_c.on) c += zone_c.old_share(row, t, column) * (cp - c);
      store<R>(c_at, c, valid);
      s[4] = c;
    }
    store<R>(h_at, h, valid);
    store<R>(at<R>(x.y, frame * H + column), h, valid);
    fetch(at<R>(x.y, (frame + ahead) * H + column));
    if (S && x.saved) {
      UNROLL for (int i = 0; i < S; i++) {
        store<R>(at<R>(x.saved, (frame * S + i) * H + column), s[i], valid);
        fetch(at<R>(x.saved, ((frame + ahead) * S + i) * H + column));
      }
    }
  }

  void backward(const Item& it, Pieces<R> memory) const {
    const auto [width, room, n, dh, dc, dw, db, backwards] = lay_out(it, memory);
    std::fill_n(dw, G * room, R(0));
    std::fill_n(db, G * room, R(0));
    for (int64_t r = 0; r < n; r++) {
      std::copy_n(at<R>(x.dh, (it.r0 + r) * H + it.k0), width, dh + r * room);
      if (C == LSTM) std::copy_n(at<R>(x.dc, (it.r0 + r) * H + it.k0), width, dc + r * room);
    }
    for (int64_t step = 0; step < x.T; step++) {
      const int64_t t = backwards ? step : x.T - 1 - step;
      for (int64_t r = 0; r < n; r++) {
        const int64_t row = it.r0 + r, end = length(row);
        if (t >= end) {
          for (int g = 0; g < G; g++) std::fill_n(at<R>(x.du, ((t * x.B + row) * G + g) * H + it.k0), width, R(0));
          continue;
        }
        const bool first = backwards ? t == end - 1 : t == 0;
        for (int64_t j = 0; j < width; j += L<R>)
          backward_step(row, t, first, backwards, it.k0 + j, int(std::min<int64_t>(L<R>, width - j)), dh + r * room + j,
                        dc + r * room + j, dw + j, db + j, room);
      }
    }
    for (int64_t r = 0; r < n; r++) {
      std::copy_n(dh + r * room, width, at<R>(x.dh0, (it.r0 + r) * H + it.k0));
      if (C == LSTM) std::copy_n(dc + r * room, width, at<R>(x.dc0, (it.r0 + r) * H + it.k0));
    }
    for (int g = 0; g < G; g++) {
      std::copy_n(dw + g * room, width, dweight + (it.slice * G + g) * H + it.k0);
      if (dbias) std::copy_n(db + g * room, width, dbias + (it.slice * G + g) * H + it.k0);
    }
  }

  INLINE void backward_step(int64_t row, int64_t t, bool first, bool backwards, int64_t column, int valid, R* dh_at,
                            R* dc_at, R* dw_at, R* db_at, int64_t room) const {
    const int64_t frame = t * x.B + row, before = (t + (backwards ? 1 : -1)) * x.B + row, place = row * H + column;
    const R *y = at<R>(x.y, 0), *saved = at<R>(x.saved, 0);
    V<R> s[S + 1], du[G], dv[G], dh_old = {}, dc_old = {}, c_new = {}, cp = {}, dc = {}, dc_through = {}, through = {};
    const int64_t ahead = before - frame;
    UNROLL for (int i = 0; i < S; i++) {
      s[i] = load<R>(saved + (frame * S + i) * H + column, valid);
      fetch(saved + ((frame + ahead) * S + i) * H + column);
    }
    V<R> hp = {};
    if (!first)
      hp = load<R>(y + before * H + column, valid);
    else if (x.h0)
      hp = load<R>(at<R>(x.h0, place), valid);
    const V<R> now = load<R>(y + frame * H + column, valid), hm = masked(hp, row, column, valid);
    V<R> dh = load<R>(dh_at, valid) + load<R>(at<R>(x.dy, frame * H + column), valid);
    fetch(at<R>(x.dy, (frame + ahead) * H + column));
    fetch(y + (frame + 2 * ahead) * H + column);
    const V<R> candidate = S == 0 && x.saved ? load<R>(saved + frame * H + column, valid) : now;
    if (zone_h.on) {
      through = dh * zone_h.old_share(row, t, column);
      dh -= through;
    }
    if constexpr (C == LSTM) {
      if (!first)
        cp = load<R>(saved + (before * S + 4) * H + column, valid);
      else if (x.c0)
        cp = load<R>(at<R>(x.c0, place), valid);
      c_new = s[4];
      dc = load<R>(dc_at, valid);
      if (zone_c.on) {
        const V<R> share = zone_c.old_share(row, t, column);
        c_new = s[1] * cp + s[0] * s[2];
        dc_old = dc * share;
        dc -= dc_old;
      }
    }
    Cell<R, C>::backward(s, candidate, hp, cp, c_new, dh, dc, du, dv, dh_old, dc_through);
    V<R> carried = {};
    if constexpr (C == GRU_ORIGINAL) {
      const V<R> back = dv[2] * weight(2, column, valid);  // the gradient of r * hm
      du[0] = dv[0] = back * hm * s[0] * (R(1) - s[0]);
      carried = back * s[0];
    }
    UNROLL for (int g = 0; g < G; g++) {
      store<R>(at<R>(x.du, (frame * G + g) * H + column), du[g], valid);
      fetch(at<R>(x.du, ((frame + ahead) * G + g) * H + column));
      if (!(C == GRU_ORIGINAL && g == 2)) carried += dv[g] * weight(g, column, valid);
      const V<R> met = C == GRU_ORIGINAL && g == 2 ? s[0] * hm : hm;
      store<R>(dw_at + g * room, load<R>(dw_at + g * room, valid) + dv[g] * met, valid);
      if (dbias)
        store<R>(db_at + g * room, load<R>(db_at + g * room, valid) + bias_gradient<R, C>(dv[g], candidate), valid);
    }
    store<R>(dh_at, dh_old + through + masked(carried, row, column, valid), valid);
    if (C == LSTM) store<R>(dc_at, dc_old + dc_through, valid);
  }
};

// A call

// The work items depend on the shapes alone, never on the number of threads: so neither do the results.
std::vector<Item> block_items(const Call& x, int64_t bytes_per_block, bool backward) {
  // Blocks of one item are walked through a step together: one computes while another waits for its sums, and a longer
  // stretch of each row of u and y is used. Their weights should still fit the first-level cache where there are few
  // rows to use them on; backward has more beside them.
  const int64_t wide = !backward && x.B >= 8 ? 4 : 1;
  const int64_t group =
      std::clamp<int64_t>(std::min(wide * 32768 / bytes_per_block, wide * 128 / x.P), 1, std::max<int64_t>(x.K, 1));
  const int64_t parts = (x.K + group - 1) / group;
  // Where blocks are few and small, the batch is cut too; a slice must still fill a tile.
  const bool small = bytes_per_block <= 1 << 19 && parts < 8;
  const int64_t slices = small && x.K > 1 ? std::clamp<int64_t>(x.B / 16, 1, (8 + parts - 1) / parts) : 1;
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
