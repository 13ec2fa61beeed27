// A tanh net whose state is a distribution: means and variances of its units through time, and back (fast dropout).
//
// A step multiplies two states by two matrices, W for the means and W o W for the variances, and its epilogue mixes the
// two. One thread walks all rows through time; the weights' own gradients are products over all steps, which
// kernels/moments.py leaves to the matrix library.
//
// kernels/moments.py holds the definition; letters as there. This file is compiled once for each instruction set and
// knows nothing of Python or torch: a plain C interface.

#include <cmath>
#include <utility>

#include "gemm.h"
#include "work.h"

// What Python hands over; kernels/moments.py has the same fields in the same order.
struct MomentsCall {
  int64_t T, B, H;
  double rate;
  const float *um, *uv;      // (T, B, H), what the inputs give to the pre-activations
  const float* weight;       // (H, H), row: the unit that is fed
  const float *m0, *v0;      // (B, H)
  float *m, *v;              // (T, B, H)
  float *am, *av;            // (T, B, H), the pre-activations; null: nothing is differentiated
  const float *dm, *dv;      // backward from here on
  float *dum, *duv, *dm0, *dv0;
};

namespace {

using F = V<float>;
constexpr int N = L<float>;
constexpr float CURVE = float(M_PI / 8);
// s(x)^2 is close to s(A (x - SHIFT)).
constexpr float A = 1.1715728752538097f, SHIFT = 0.8813735870195429f;

INLINE F inverse_root(F x) {
#ifdef __AVX512F__
  const F y = (F)_mm512_rsqrt14_ps((__m512)x);
  return y * (1.5f - 0.5f * x * y * y);
#else
  F y;
  for (int i = 0; i < N; i++) y[i] = 1 / std::sqrt(x[i]);
  return y;
#endif
}

// Moments of tanh(x) = 2 s(2 x) - 1, and what backward needs of them.
struct Squashed {
  F expected, square, k1, k2, mean, spread;  // of s(2 x); its variance before it is kept from falling below zero
  INLINE Squashed(F a_mean, F a_variance) : mean(2.0f * a_mean) {
    const F v = 4.0f * a_variance;
    k1 = inverse_root(1.0f + CURVE * v);
    k2 = inverse_root(1.0f + CURVE * A * A * v);
    expected = sigmoid_of<float>(mean * k1);
    square = sigmoid_of<float>(A * (mean - SHIFT) * k2);
    spread = square - expected * expected;
  }
  INLINE F of_mean() const { return 2.0f * expected - 1.0f; }
  INLINE F of_variance() const { return 4.0f * (spread < 0 ? F{} : spread); }
  // From gradients of both to those of the pre-activation's mean and variance.
  INLINE void backward(F& gm, F& gv) const {
    const F kept = spread < 0 ? F{} : 4.0f * gv;
    const F to_expected = 2.0f * gm - 2.0f * expected * kept;
    const F e = to_expected * expected * (1.0f - expected) * k1;
    const F s = kept * square * (1.0f - square) * A * k2;
    gm = 2.0f * (e + s);
    gv = -2.0f * CURVE * (e * mean * k1 * k1 + s * (mean - SHIFT) * (A * A) * k2 * k2);
  }
};

struct Net {
  const MomentsCall& x;
  const int64_t B, H, vectors, padded, depth, ld;
  const float q;
  float *w, *w2;         // packed panels of both matrices
  float *a[2], *b[2];    // rows of means and of variances, for this step and the next
  explicit Net(const MomentsCall& call)
      : x(call), B(x.B), H(x.H), vectors((H + N - 1) / N), padded(vectors * N), depth((H + 3) / 4 * 4),
        ld(std::max(padded, depth) + N), q(float(1 - x.rate)) {}

  bool lay_out(Workspace<float>& memory) {
    Pieces<float> pieces;
    for (int pass = 0; pass < 2; pass++) {  // counts, then hands out
      w = pieces.take(depth * padded), w2 = pieces.take(depth * padded);
      for (int i = 0; i < 2; i++) a[i] = pieces.take(B * ld), b[i] = pieces.take(B * ld);
      if (pass) break;
      if (!memory.reserve(pieces.used)) return false;
      pieces = {memory.begin()};
    }
    for (int i = 0; i < 2; i++) std::fill_n(a[i], B * ld, 0.0f), std::fill_n(b[i], B * ld, 0.0f);
    return true;
  }

  // Panels of two vectors of columns, the last of one: entry (k, column) is W[column][k], or W[k][column] for backward.
  void pack(bool transposed) {
    float *p = w, *p2 = w2;
    for (int64_t j = 0; j < vectors; j += 2) {
      const int64_t width = std::min<int64_t>(2, vectors - j) * N;
      for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < width; i++) {
          const int64_t column = j * N + i;
          const bool real = k < H && column < H;
          const float value = !real ? 0.0f : transposed ? x.weight[column * H + k] : x.weight[k * H + column];
          *p++ = value, *p2++ = value * value;
        }
    }
  }

  int valid(int64_t vector) const { return int(std::clamp<int64_t>(H - vector * N, 0, N)); }

  // Both products, and for each row and vector of columns what follows from them.
  template <class Function>
  INLINE void multiply(const float* means, const float* variances, Function then) const {
    F sums[2][16 * 2];
    for (int64_t j = 0; j < vectors; j += 2) {
      const int NJ = int(std::min<int64_t>(2, vectors - j));
      const int64_t panel = j * N * depth;
      for_tiles(0, B, max_rows(2), [&](int64_t first, int64_t last) {
        const auto product = gemms<float, float>[NJ][last - first];
        product(means + first * ld, ld, depth, w + panel, sums[0]);
        product(variances + first * ld, ld, depth, w2 + panel, sums[1]);
        for (int64_t r = first; r < last; r++)
          for (int i = 0; i < NJ; i++) then(r, j + i, sums[0][(r - first) * NJ + i], sums[1][(r - first) * NJ + i]);
      });
    }
  }

  // Dropout of the state, in the places that the next step multiplies.
  INLINE void drop(int64_t place, F m, F v, int next) const {
    store(a[next] + place, q * m);
    store(b[next] + place, q * (1 - q) * m * m + q * v);
  }

  void forward() {
    pack(true);
    for (int64_t r = 0; r < B; r++)
      for (int64_t j = 0; j < vectors; j++) {
        const int64_t from = r * H + j * N;
        drop(r * ld + j * N, load(x.m0 + from, valid(j)), load(x.v0 + from, valid(j)), 0);
      }
    for (int64_t t = 0; t < x.T; t++) {
      const int now = t & 1;
      multiply(a[now], b[now], [&](int64_t r, int64_t j, F mean, F variance) {
        const int64_t at = (t * B + r) * H + j * N;
        const int n = valid(j);
        mean += load(x.um + at, n), variance += load(x.uv + at, n);
        if (x.am) store(x.am + at, mean, n), store(x.av + at, variance, n);
        const Squashed squashed(mean, variance);
        const F m = squashed.of_mean(), v = squashed.of_variance();
        store(x.m + at, m, n), store(x.v + at, v, n);
        drop(r * ld + j * N, m, v, !now);
      });
    }
  }

  // dm0 and dv0 carry the state's gradient from step to step, and end as that of the first one.
  void backward() {
    pack(false);
    std::fill_n(x.dm0, B * H, 0.0f), std::fill_n(x.dv0, B * H, 0.0f);
    for (int64_t t = x.T - 1; t >= 0; t--) {
      for (int64_t r = 0; r < B; r++)
        for (int64_t j = 0; j < vectors; j++) {
          const int64_t place = r * H + j * N, at = t * B * H + place;
          const int n = valid(j);
          F gm = load(x.dm + at, n) + load(x.dm0 + place, n), gv = load(x.dv + at, n) + load(x.dv0 + place, n);
          Squashed(load(x.am + at, n), load(x.av + at, n)).backward(gm, gv);
          store(x.dum + at, gm, n), store(x.duv + at, gv, n);
          store(a[0] + r * ld + j * N, gm), store(b[0] + r * ld + j * N, gv);
        }
      const float* before = t ? x.m + (t - 1) * B * H : x.m0;
      multiply(a[0], b[0], [&](int64_t r, int64_t j, F mean, F variance) {
        const int64_t place = r * H + j * N;
        const int n = valid(j);
        store(x.dm0 + place, q * mean + 2 * q * (1 - q) * load(before + place, n) * variance, n);
        store(x.dv0 + place, q * variance, n);
      });
    }
  }
};

constexpr int DONE = 0, NO_MEMORY = 1;

int moments(const MomentsCall& x, bool backward) {
  static thread_local Workspace<float> memory;
  Net net(x);
  if (!net.lay_out(memory)) return NO_MEMORY;
  backward ? net.backward() : net.forward();
  return DONE;
}

}  // namespace

#define JOIN(a, b) a##b
#define EXPORT(type, name, isa) __attribute__((visibility("default"))) type JOIN(name, isa)

extern "C" {
EXPORT(int, moments_, NAME)(const MomentsCall* x, int backward) { return moments(*x, backward); }
}
