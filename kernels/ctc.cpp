// CTC loss and its gradient on a CPU, a row of the batch at a time (Graves et al. 2006).
//
// The idea. Sums over paths are sums of products: in logarithms each of them takes three exponentials and a logarithm a
// state and frame, as numbers one multiplication and three additions, which vectors do. Numbers of a long row leave
// the range of a double, though, in two ways, and two factors that are taken out of the result again keep them in it:
//   scale   frames are divided by their sum, as in hidden Markov models
//   tilt    whoever enters a label is multiplied by one over its mean probability. All whole paths enter all labels, so
//           they all get the same factor; but among parts of paths, those that have said little so far no longer
//           outweigh by hundreds of decades, in a net that answers mostly blank, those that will come to the end
// Where that is not enough the row is said to be lost, and kernels/ctc.py takes torch's.
//
// States lie as two arrays, blank i after label i, so that neighbours are loads one number apart.
//
// kernels/ctc.py holds the definition. This file is compiled once for each instruction set and knows nothing of Python
// or torch: a plain C interface.

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

// What Python hands over; kernels/ctc.py has the same fields in the same order.
struct CtcCall {
  int64_t B, T, V, blank, N;
  const float* log_probs;        // (B, T, V)
  const int64_t* labels;         // (N,), those of all rows, one after the other
  const int64_t* lengths;        // (B,), of at most T
  const int64_t* label_lengths;  // (B,)
  float* nats;                   // (B,), NaN where a row is lost
  float* gradient;               // (B, T, V), zeros beforehand; null: not wanted
};

namespace {

constexpr int N = L<double>;
using D = V<double>;

INLINE double sum_of(D v) {
  double s = 0;
  UNROLL for (int i = 0; i < N; i++) s += v[i];
  return s;
}

// Memory of a row, kept from one to the next.
struct Room {
  std::vector<double> alpha, chances, enter, skip, chance, beta, weight;
  std::vector<double> means, share;
  std::vector<int64_t> columns, slots;
  std::vector<int32_t> slot_of;  // by label; -1: not yet in this row
};

struct Row {
  const CtcCall& x;
  const float* log_probs;
  const int64_t* labels;
  const int64_t frames, count;  // of labels
  float* gradient;
  Room& room;

  // Entries 0 .. count of both arrays and one more that stays zero, as whole vectors; a vector of zeros goes before each.
  const int64_t width = (count + 2 + N - 1) / N * N;
  const int64_t stride = 2 * (width + N) + N;

  double* blanks(double* at) const { return at + N; }
  double* said(double* at) const { return at + N + width + N; }

  // Probabilities of the labels that the row has, slot 0 the blank, and factors of the transitions.
  bool begin() {
    room.columns.assign(1, x.blank);
    room.slots.assign(width, 0);
    room.slot_of.resize(x.V, -1);
    room.slot_of[x.blank] = 0;
    for (int64_t i = 0; i < count; i++)
      if (labels[i] < 0 || labels[i] >= x.V) return false;
    for (int64_t i = 0; i < count; i++) {
      int32_t& slot = room.slot_of[labels[i]];
      if (slot < 0) {
        slot = int32_t(room.columns.size());
        room.columns.push_back(labels[i]);
      }
      room.slots[i + 1] = slot;
    }
    for (int64_t column : room.columns) room.slot_of[column] = -1;  // for the next row
    const int64_t used = room.columns.size();
    room.chances.resize(frames * used);
    room.means.assign(used, 0.0);
    for (int64_t t = 0; t < frames; t++)
      for (int64_t u = 0; u < used; u++) {
        const double p = std::exp(double(log_probs[t * x.V + room.columns[u]]));
        room.chances[t * used + u] = p;
        room.means[u] += p / frames;
      }
    room.enter.assign(width + N, 0.0);  // read one entry further than written
    room.skip.assign(width + N, 0.0);
    for (int64_t i = 1; i <= count; i++) {
      const double mean = room.means[room.slots[i]];
      if (!(mean > 1e-100)) return false;
      room.enter[i] = 1 / mean;
      room.skip[i] = i > 1 && labels[i - 1] != labels[i - 2] ? room.enter[i] : 0.0;
    }
    room.chance.assign(width, 0.0);
    return true;
  }

  // Probabilities of a frame by label, times a factor.
  void look(int64_t t, double factor) {
    const double* p = room.chances.data() + t * room.columns.size();
    for (int64_t i = 1; i <= count; i++) room.chance[i] = factor * p[room.slots[i]];
  }
  double blank(int64_t t) const { return room.chances[t * room.columns.size()]; }

  // Sums over what has been said up to a frame, each divided by the whole of the frame before; false: the row is lost.
  bool forwards(double& nats) {
    room.alpha.assign(frames * stride, 0.0);
    double logarithm = 0, last = 1;
    for (int64_t t = 0; t < frames; t++) {
      double* at = room.alpha.data() + t * stride;
      double *b = blanks(at), *l = said(at);
      if (t == 0) {
        look(0, 1.0);
        b[0] = blank(0);
        if (count) l[1] = room.enter[1] * room.chance[1];
        last = b[0] + (count ? l[1] : 0.0);
      } else {
        const double *b0 = blanks(at - stride), *l0 = said(at - stride);
        look(t, 1 / last);
        const double stay = blank(t) / last;
        D total = {};
        for (int64_t i = 0; i < width; i += N) {
          const D lb = load(l0 + i);
          const D nb = (load(b0 + i) + lb) * stay;
          const D entered = load(&room.enter[i]) * load(b0 + i - 1) + load(&room.skip[i]) * load(l0 + i - 1);
          const D nl = (lb + entered) * load(&room.chance[i]);
          store(b + i, nb);
          store(l + i, nl);
          total += nb + nl;
        }
        last = sum_of(total);
      }
      if (!(last > 0 && last < std::numeric_limits<double>::infinity())) return false;
      logarithm += std::log(last);
    }
    double* at = room.alpha.data() + (frames - 1) * stride;
    const double whole = (blanks(at)[count] + (count ? said(at)[count] : 0.0)) / last;
    if (!(whole > 0)) return false;
    for (int64_t i = 1; i <= count; i++) logarithm -= std::log(room.enter[i]);
    nats = -(logarithm + std::log(whole));
    return true;
  }

  // From the end: what share of all paths is where in each frame, which is minus the gradient; false: the row is lost.
  bool backwards() {
    const int64_t used = room.columns.size();
    room.beta.assign(stride, 0.0);
    room.weight.assign(stride, 0.0);
    room.share.resize(used);
    double *b = blanks(room.beta.data()), *l = said(room.beta.data());
    double *wb = blanks(room.weight.data()), *wl = said(room.weight.data());
    b[count] = 1;
    if (count) l[count] = 1;
    for (int64_t t = frames - 1; t >= 0; t--) {
      double* at = room.alpha.data() + t * stride;
      double *ab = blanks(at), *al = said(at);
      D silent = {}, spoken = {};
      for (int64_t i = 0; i < width; i += N) {
        silent += load(ab + i) * load(b + i);
        const D here = load(al + i) * load(l + i);
        spoken += here;
        store(al + i, here);
      }
      const double total = sum_of(silent) + sum_of(spoken);
      if (!(total > 0 && total < std::numeric_limits<double>::infinity())) return false;
      std::fill(room.share.begin(), room.share.end(), 0.0);
      room.share[0] = sum_of(silent);
      for (int64_t i = 1; i <= count; i++) room.share[room.slots[i]] += al[i];
      for (int64_t u = 0; u < used; u++) gradient[t * x.V + room.columns[u]] = -float(room.share[u] / total);
      if (t == 0) break;
      D sum = {};  // of this frame's: the next is divided by it
      for (int64_t i = 0; i < width; i += N) sum += load(b + i) + load(l + i);
      const double factor = 1 / sum_of(sum);
      look(t, factor);
      const double stay = blank(t) * factor;
      for (int64_t i = 0; i < width; i += N) {
        store(wb + i, load(b + i) * stay);
        store(wl + i, load(l + i) * load(&room.chance[i]));
      }
      for (int64_t i = 0; i < width; i += N) {
        const D next = load(wl + i + 1);
        store(b + i, load(wb + i) + load(&room.enter[i + 1]) * next);
        store(l + i, load(wl + i) + load(wb + i) + load(&room.skip[i + 1]) * next);
      }
    }
    return true;
  }
};

constexpr int DONE = 0, NO_MEMORY = 1;

int ctc(const CtcCall& x) {
  thread_local Room room;
  const int64_t *labels = x.labels, *end = labels + x.N;
  for (int64_t i = 0; i < x.B; labels += x.label_lengths[i++]) {
    const int64_t frames = x.lengths[i], count = x.label_lengths[i];
    if (count < 0 || count > end - labels || frames < 0 || frames > x.T) {  // compiled graphs do not check
      std::fill(x.nats + i, x.nats + x.B, std::numeric_limits<float>::quiet_NaN());
      return DONE;
    }
    float* gradient = x.gradient ? x.gradient + i * x.T * x.V : nullptr;
    int64_t needed = count;  // frames: equal neighbours want a blank between them
    for (int64_t k = 1; k < count; k++) needed += labels[k] == labels[k - 1];
    if (frames < needed || frames == 0) {
      x.nats[i] = frames < needed ? std::numeric_limits<float>::infinity() : 0.0f;
      continue;
    }
    Row row{x, x.log_probs + i * x.T * x.V, labels, frames, count, gradient, room};
    double nats = 0;
    const bool kept = row.begin() && row.forwards(nats) && (!gradient || row.backwards());
    x.nats[i] = kept ? float(nats) : std::numeric_limits<float>::quiet_NaN();
  }
  return DONE;
}

}  // namespace

#define JOIN(a, b) a##b
#define EXPORT(type, name, isa) __attribute__((visibility("default"))) type JOIN(name, isa)

extern "C" {
EXPORT(int, ctc_, NAME)(const CtcCall* x) {
  try {
    return ctc(*x);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
}
