// Block-diagonal recurrences, dense ones among them: a work item walks through time, forward and backward.

#pragma once

#include <algorithm>
#include <vector>

#include "cells.h"
#include "gemm.h"
#include "work.h"

namespace {

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
    for (int64_t t = team.begin(s.T); t < team.end(s.T); t++)
      for (int64_t r = std::max(rows.running[t], it.r0); r < it.r1; r++) past_the_end(t * s.B + rows.order[r], it);
    team.meet();
    for (int64_t step = 0; step < s.T; step++)
      for (int pass = 0; pass < passes_of(C); pass++) {
        for (Block& b : all) {
          const int64_t t = b.backwards ? s.T - 1 - step : step;
          const int64_t active = std::clamp<int64_t>(rows.running[t] - it.r0, 0, n);
          run(b, it, t, step & 1, active, pass, team);
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

  void past_the_end(int64_t frame, const Item& it) const {
    std::fill_n(at<R>(x.y, frame * s.H + it.k0 * s.P), (it.k1 - it.k0) * s.P, R(0));
    for (int64_t k = it.k0; x.saved && k < it.k1; k++)
      std::fill_n(at<R>(x.saved, s.saved(SAVED, k) + frame * SAVED * s.P), SAVED * s.P, R(0));
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
    const bool simple = !x.mask && !zone_h.on && !zone_c.on;
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
            const int valid = s.valid(j);
            const V<R>* sum = sums + (r - first) * NJ + i;
            if (SIMPLE && valid == L<R>)
              epilogue<true>(l, r, order[r], pass, j * L<R>, L<R>, sum, z.NU);
            else if (valid)
              epilogue<false>(l, r, order[r], pass, j * L<R>, valid, sum, z.NU);
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
    for (int64_t t = team.begin(s.T); t < team.end(s.T); t++)
      for (int64_t r = std::max(rows.running[t], it.r0); r < it.r1; r++) past_the_end(t * s.B + rows.order[r], it);
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
        through_time(b, it, t, active, team);
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

  void past_the_end(int64_t frame, const Item& it) const {
    for (int g = 0; g < G; g++)
      std::fill_n(at<R>(x.du, (frame * G + g) * s.H + it.k0 * s.P), (it.k1 - it.k0) * s.P, R(0));
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
  void through_time(Block& b, const Item& it, int64_t t, int64_t active, Team team) const {
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
    const bool simple = !x.mask && !zone_h.on && !zone_c.on;
    simple ? run_tiles<true>(b, l, it, active, team) : run_tiles<false>(b, l, it, active, team);
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
            const int valid = s.valid(panel * NU + i);
            const V<R> sum = sums[(r - first) * NU + i];
            if (valid && ended)
              arrive(l, r, order[r], unit, valid, sum);
            else if (SIMPLE && valid == L<R>)
              epilogue<true>(l, r, order[r], unit, L<R>, sum);
            else if (valid)
              epilogue<false>(l, r, order[r], unit, valid, sum);
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

}  // namespace
