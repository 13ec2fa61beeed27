// What happens to the sums: gates, states and their derivatives, a vector of units at a time.

#pragma once

#include "call.h"
#include "vectors.h"

namespace {

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

}  // namespace
