// Log-mel energies of a clip on a CPU: frames, window, real FFT, power, mel filters, logarithm.
//
// The idea. Frames have nothing to do with each other, and all take the same steps. So a vector holds the same sample
// of as many frames as it has lanes, and every instruction after the first transposition does the same to all of them:
// no shuffles inside the FFT, no length that vectors do not divide. What a group of frames needs lies in the
// first-level cache from the samples to the energies, and a frame's numbers do not depend on where in the clip it
// stands.
//
// The pieces, in the order of the work:
//   frames      transposes: L frames, a vector for each sample
//   powers      window, and a real FFT in place, which falls into complex ones (Transform), and squares
//   energies    filters, logarithm, mean and deviation, and back to a row for each frame
//
// kernels/log_mel.py holds the definition. This file is compiled once for each instruction set (VECTOR_BYTES and NAME
// are set by the build) and knows nothing of Python or torch: a plain C interface.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

// What Python hands over; kernels/log_mel.py has the same fields in the same order.
struct LogMelCall {
  int64_t clips, samples, n_fft, hop, bands;
  double floor;
  const float* waveform;  // (clips, samples)
  const float* window;    // (n_fft,)
  const float* mel;       // (n_fft / 2 + 1, bands)
  const float* mean;      // (bands,), taken from the logarithms; null: nothing is
  const float* deviation; // (bands,), what they are divided by then
  float* out;             // (clips, frames, bands)
};

namespace {

constexpr int L = VECTOR_BYTES / sizeof(float);  // frames at a time
typedef float V __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));

INLINE V load(const float* p, int64_t n = L) {
  V v = {};
  if (n >= L)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, n * sizeof(float));
  return v;
}
INLINE void store(float* p, V v, int64_t n = L) {
  if (n >= L)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, n * sizeof(float));
}

// Rows to columns: after log2(L) rounds, each of which interleaves the first half of the rows with the second.
INLINE void transpose(V* rows) {
  I low, high;
  for (int i = 0; i < L; i++) {
    low[i] = i / 2 + (i % 2 ? L : 0);
    high[i] = low[i] + L / 2;
  }
  V other[L];
  UNROLL for (int width = 1; width < L; width *= 2) {
    UNROLL for (int i = 0; i < L / 2; i++) {
      other[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      other[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
    UNROLL for (int i = 0; i < L; i++) rows[i] = other[i];
  }
}

// Natural logarithm of positive normal numbers, to 1 unit of the last place; infinity and NaN come through. With
// x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2): log(1 + f) = f - f^2 / 2 + f^3 P(f), P a minimax fit of our own.
INLINE V log_of(V x) {
  constexpr int32_t half_root = 0x3f3504f3;  // sqrt(1/2)
  const I bits = (I)x, exponent = (bits - half_root) >> 23;
  const V e = __builtin_convertvector(exponent, V), f = (V)(bits - (exponent << 23)) - 1.0f, z = f * f;
  V p = -0.07634474337100983f * f + 0.12761567533016205f;
  p = p * f - 0.13160187005996704f;
  p = p * f + 0.14201758801937103f;
  p = p * f - 0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f - 0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  constexpr float ln2 = 0.693145751953125f, ln2_rest = 1.428606765330187e-06f;  // the first times e is exact
  const V y = e * ln2 + (f + (e * ln2_rest + (f * z * p - 0.5f * z)));
  const V infinity = V{} + std::numeric_limits<float>::infinity(), nan = infinity - infinity;
  return x > 0.0f ? (x < infinity ? y : infinity) : nan;  // NaN is not greater than 0
}

struct Root {
  float re, im;
};

std::vector<Root> roots_of(int64_t n, int64_t count) {
  std::vector<Root> roots(count);
  for (int64_t k = 0; k < count; k++) {
    const double angle = -2 * 3.14159265358979323846 * double(k) / double(n);
    roots[k] = {float(std::cos(angle)), float(std::sin(angle))};
  }
  return roots;
}

// One complex FFT: real and imaginary parts apart, in place, its output in an order of its own.
struct Transform {
  int64_t points;
  std::vector<int64_t> radices;  // their product is `points`
  std::vector<Root> roots;       // exp(-2 pi i k / points)
  std::vector<int64_t> order;    // the frequency that stands at each place after the passes

  explicit Transform(int64_t points) : points(points), roots(roots_of(points, points)), order(points) {
    int64_t left = points;
    for (int64_t radix : {4, 2, 3, 5})
      for (; left % radix == 0; left /= radix) radices.push_back(radix);
    for (int64_t radix = 7; left > 1; radix += 2) {
      if (radix * radix > left) radix = left;
      for (; left % radix == 0; left /= radix) radices.push_back(radix);
    }
    for (int64_t k = 0; k < points; k++) {
      int64_t place = 0, length = points, rest = k;
      for (int64_t radix : radices) {
        length /= radix;
        place += rest % radix * length;
        rest /= radix;
      }
      order[place] = k;
    }
  }

  // Vectors that `run` needs for itself: two points for each of the largest radix.
  int64_t scratch() const { return radices.empty() ? 0 : 4 * *std::max_element(radices.begin(), radices.end()); }
  void run(V* re, V* im, V* scratch) const;
};

// The FFT of n real samples: their differences over half the length hold the odd frequencies, n / 4 complex points;
// their sums hold the even ones, a real FFT of half the length. A real part never meets its mirror image, as it would
// if even and odd samples were packed as complex ones: fewer operations, and less rounding.
//
// Source: Sorensen, Jones, Heideman & Burrus 1987, real-valued split-radix FFT.
struct Plan {
  struct Level {
    int64_t n;
    Transform transform;
    std::vector<Root> turns;    // exp(-2 pi i j / n); none where n is not a multiple of 4: the end
    std::vector<int64_t> bins;  // which frequency of the whole each place is
  };
  int64_t n = 0;
  std::vector<Level> levels;

  explicit Plan(int64_t n) : n(n) {
    for (int64_t scale = 1;; scale *= 2, n /= 2) {
      const bool last = n % 4 != 0;
      Level level{n, Transform(last ? n : n / 4), last ? std::vector<Root>() : roots_of(n, n / 4), {}};
      for (int64_t k : level.transform.order) {
        const int64_t frequency = last ? k : 4 * k + 1;
        level.bins.push_back(scale * std::min(frequency, n - frequency));
      }
      levels.push_back(std::move(level));
      if (last) break;
    }
  }

  int64_t scratch() const {
    int64_t most = 0;
    for (const Level& level : levels) most = std::max(most, level.transform.scratch());
    return most;
  }
};

struct Complex {
  V re, im;
};
INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
INLINE Complex operator*(Complex a, Root w) { return {a.re * w.re - a.im * w.im, a.re * w.im + a.im * w.re}; }
INLINE Complex turned(Complex a) { return {a.im, -a.re}; }  // times -i

// The DFT of `radix` points in place, a constant where the compiler knows it.
INLINE void butterfly(int64_t radix, Complex* x, const Transform& transform, Complex* y) {
  if (radix == 2) {
    const Complex a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if (radix == 4) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = turned(x[1] - x[3]);
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else {  // odd: sums and differences of the points that lie opposite to each other
    const int64_t half = radix / 2, step = transform.points / radix;
    y[0] = x[0];
    UNROLL for (int64_t p = 1; p <= half; p++) {
      const Complex a = x[p], b = x[radix - p];
      x[p] = a + b, x[radix - p] = a - b;
      y[0] = y[0] + x[p];
    }
    UNROLL for (int64_t q = 1; q <= half; q++) {
      Complex even = x[0], odd = {};
      UNROLL for (int64_t p = 1; p <= half; p++) {
        const Root w = transform.roots[p * q % radix * step];
        even.re += x[p].re * w.re, even.im += x[p].im * w.re;
        odd.re -= x[radix - p].re * w.im, odd.im -= x[radix - p].im * w.im;
      }
      y[q] = even + turned(odd), y[radix - q] = even - turned(odd);
    }
    UNROLL for (int64_t p = 0; p < radix; p++) x[p] = y[p];
  }
}

// One pass of decimation in frequency over blocks of `length` points; R is the radix, or 0 for any.
template <int R>
void pass(V* re, V* im, int64_t length, int64_t radix, const Transform& transform, Complex* scratch) {
  if (R) radix = R;
  const int64_t part = length / radix, step = transform.points / length;
  Complex own[R ? 2 * R : 1];
  Complex* x = R ? own : scratch;
  for (int64_t j = 0; j < part; j++)
    for (int64_t at = j; at < transform.points; at += length) {
      UNROLL for (int64_t p = 0; p < radix; p++) x[p] = {re[at + p * part], im[at + p * part]};
      butterfly(radix, x, transform, x + radix);
      re[at] = x[0].re, im[at] = x[0].im;
      UNROLL for (int64_t p = 1; p < radix; p++) {
        const Complex y = j ? x[p] * transform.roots[j * p * step] : x[p];
        re[at + p * part] = y.re, im[at + p * part] = y.im;
      }
    }
}

void Transform::run(V* re, V* im, V* scratch) const {
  Complex* memory = reinterpret_cast<Complex*>(scratch);
  int64_t length = points;
  for (int64_t radix : radices) {
    const auto step = radix == 2   ? pass<2>
                      : radix == 3 ? pass<3>
                      : radix == 4 ? pass<4>
                      : radix == 5 ? pass<5>
                                   : pass<0>;
    step(re, im, length, radix, *this, memory);
    length /= radix;
  }
}

// Samples of L frames, from `begin` to `end`; the others do not count: the window is zero there.
void frames(const float* first, int64_t stride, int64_t count, int64_t n, int64_t begin, int64_t end, V* x) {
  const float* starts[L];
  for (int t = 0; t < L; t++) starts[t] = first + std::min<int64_t>(t, count - 1) * stride;
  for (int64_t s = 0; s < n; s += L) {
    V rows[L];
    if (s + L <= begin || s >= end) {
      for (int64_t i = s; i < std::min(s + L, n); i++) x[i] = V{};
    } else if (s + L <= n) {
      UNROLL for (int t = 0; t < L; t++) rows[t] = load(starts[t] + s);
      transpose(rows);
      UNROLL for (int i = 0; i < L; i++) x[s + i] = rows[i];
    } else {
      for (int t = 0; t < L; t++) rows[t] = load(starts[t] + s, n - s);
      transpose(rows);
      for (int i = 0; i < n - s; i++) x[s + i] = rows[i];
    }
  }
}

// Sums over half the length to the first half of x, turned differences to the second, real parts before imaginary ones.
template <bool windowed>
void split(V* x, const Plan::Level& level, const float* window) {
  const int64_t part = level.n / 4;
  for (int64_t j = 0; j < part; j++) {
    V a = x[j], b = x[j + part], c = x[j + 2 * part], d = x[j + 3 * part], sum, difference, sum_b, difference_b;
    if (windowed) {  // sums of two products, one of which is never rounded where there is a fused multiply-add
      a *= window[j], b *= window[j + part];
      const float v = window[j + 2 * part], w = window[j + 3 * part];
      sum = a + c * v, difference = a - c * v, sum_b = b + d * w, difference_b = b - d * w;
    } else {
      sum = a + c, difference = a - c, sum_b = b + d, difference_b = b - d;
    }
    const Complex z = Complex{difference, -difference_b} * level.turns[j];
    x[j] = sum, x[j + part] = sum_b, x[j + 2 * part] = z.re, x[j + 3 * part] = z.im;
  }
}

// |X|^2 of the n / 2 + 1 frequencies of the windowed samples x (n,), which are used up.
void powers(V* x, const Plan& plan, const float* window, V* scratch, V* power) {
  for (const Plan::Level& level : plan.levels) {
    const bool first = level.n == plan.n;
    V *re = x + level.n / 2, *im = re + level.n / 4;
    if (level.turns.empty()) {  // all that is left, as complex points without imaginary parts
      re = x, im = scratch, scratch += level.n;
      for (int64_t j = 0; j < level.n; j++) im[j] = V{};
      if (first)
        for (int64_t j = 0; j < level.n; j++) x[j] *= window[j];
    } else if (first) {
      split<true>(x, level, window);
    } else {
      split<false>(x, level, window);
    }
    level.transform.run(re, im, scratch);
    for (int64_t i = 0; i < level.transform.points; i++) power[level.bins[i]] = re[i] * re[i] + im[i] * im[i];
  }
}

// A filter bank without its zeros: band b is `counts[b]` weights from frequency `firsts[b]` on.
struct Filters {
  std::vector<float> bank;  // that it was made from
  std::vector<int64_t> firsts, counts, begins;
  std::vector<float> weights;

  Filters(const float* mel, int64_t frequencies, int64_t bands)
      : bank(mel, mel + frequencies * bands), firsts(bands), counts(bands), begins(bands) {
    for (int64_t k = 0; k < frequencies; k++)
      for (int64_t b = 0; b < bands; b++)
        if (mel[k * bands + b] != 0) {
          if (!counts[b]) firsts[b] = k;
          counts[b] = k + 1 - firsts[b];
        }
    for (int64_t b = 0; b < bands; b++) {
      begins[b] = weights.size();
      for (int64_t i = 0; i < counts[b]; i++) weights.push_back(mel[(firsts[b] + i) * bands + b]);
    }
  }

  bool are_of(const float* mel, int64_t frequencies, int64_t bands) const {
    return int64_t(firsts.size()) == bands && int64_t(bank.size()) == frequencies * bands &&
           !std::memcmp(bank.data(), mel, bank.size() * sizeof(float));
  }
};

void energies(const V* power, const Filters& filters, const LogMelCall& x, int64_t count, float* out) {
  const int64_t bands = x.bands;
  const float floor = float(x.floor);
  for (int64_t from = 0; from < bands; from += L) {
    V rows[L];
    for (int i = 0; i < L; i++) {
      V sum = {};
      if (from + i < bands) {
        const V* p = power + filters.firsts[from + i];
        const float* w = filters.weights.data() + filters.begins[from + i];
        for (int64_t k = 0; k < filters.counts[from + i]; k++) sum += w[k] * p[k];
      }
      rows[i] = log_of(sum + floor);
      if (x.mean && from + i < bands) rows[i] = (rows[i] - x.mean[from + i]) / x.deviation[from + i];
    }
    transpose(rows);
    for (int64_t t = 0; t < count; t++) store(out + t * bands + from, rows[t], bands - from);
  }
}

constexpr int DONE = 0, NO_MEMORY = 1;

int log_mel(const LogMelCall& x) {
  thread_local std::unique_ptr<Plan> kept;
  if (!kept || kept->n != x.n_fft) kept = std::make_unique<Plan>(x.n_fft);
  const Plan& plan = *kept;
  thread_local std::unique_ptr<Filters> kept_filters;
  if (!kept_filters || !kept_filters->are_of(x.mel, x.n_fft / 2 + 1, x.bands))
    kept_filters = std::make_unique<Filters>(x.mel, x.n_fft / 2 + 1, x.bands);
  const Filters& filters = *kept_filters;
  int64_t begin = 0, end = x.n_fft;
  while (begin < end && x.window[begin] == 0) begin++;
  while (begin < end && x.window[end - 1] == 0) end--;

  const int64_t rest = plan.levels.back().n, vectors = x.n_fft + x.n_fft / 2 + 1 + rest + plan.scratch();
  std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, (vectors * sizeof(V) + 63) / 64 * 64),
                                                std::free);
  if (!memory) return NO_MEMORY;
  V* frame = static_cast<V*>(memory.get());
  V* power = frame + x.n_fft;
  V* scratch = power + x.n_fft / 2 + 1;

  const int64_t number = (x.samples - x.n_fft) / x.hop + 1;
  for (int64_t clip = 0; clip < x.clips; clip++)
    for (int64_t t = 0; t < number; t += L) {
      const int64_t count = std::min<int64_t>(L, number - t);
      frames(x.waveform + clip * x.samples + t * x.hop, x.hop, count, x.n_fft, begin, end, frame);
      powers(frame, plan, x.window, scratch, power);
      energies(power, filters, x, count, x.out + (clip * number + t) * x.bands);
    }
  return DONE;
}

}  // namespace

#define JOIN(a, b) a##b
#define EXPORT(type, name, isa) __attribute__((visibility("default"))) type JOIN(name, isa)

extern "C" {
EXPORT(int, log_mel_, NAME)(const LogMelCall* x) {
  try {
    return log_mel(*x);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
}
