// The same cells where a unit sees itself alone: no products of matrices. Rows [r0, r1) of the batch and columns [k0,
// k1), one row after the other through time.

#pragma once

#include <algorithm>

#include "cells.h"
#include "work.h"

namespace {

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

  int64_t length(int64_t row) const { return x.lengths ? std::clamp<int64_t>(x.lengths[row], 0, x.T) : x.T; }

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
          simple(width) ? forward_row<true>(it, it.r0 + r, t, backwards ? -x.B : x.B, h + r * room, c + r * room)
                        : forward_row<false>(it, it.r0 + r, t, backwards ? -x.B : x.B, h + r * room, c + r * room);
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

  bool simple(int64_t width) const { return !x.mask && !zone_h.on && !zone_c.on && width % L<R> == 0; }

  // Vector at column j of a row of weights, biases or masks; none is zero.
  static INLINE V<R> optional(const R* p, int64_t j, int valid) { return p ? load<R>(p + j, valid) : V<R>{}; }

  // What lies before us in memory is fetched meanwhile, once a line.
  static INLINE void fetch_line(const R* p, int64_t j) {
    if (j * int64_t(sizeof(R)) % 64 == 0) fetch(p + j);
  }

  // One row at one step. Everything that a vector needs is a pointer of our own: through `x` the compiler would load
  // all of them again after each store. `ahead`: frames from this step to the next. SIMPLE: no mask, no zoneout, whole
  // vectors.
  template <bool SIMPLE>
  void forward_row(const Item& it, int64_t row, int64_t t, int64_t ahead, R* h_at, R* c_at) const {
    const int64_t H = this->H, width = it.k1 - it.k0, k0 = it.k0, frame = t * x.B + row;
    const R *u_at = at<R>(x.u, frame * G * H + k0), *weight = at<R>(x.weight, k0);
    const R* bias = x.bias ? at<R>(x.bias, k0) : nullptr;
    const R* mask = !SIMPLE && x.mask ? at<R>(x.mask, row * H + k0) : nullptr;
    R *y_at = at<R>(x.y, frame * H + k0), *saved = x.saved ? at<R>(x.saved, frame * std::max(S, 1) * H + k0) : nullptr;
    const int64_t next = ahead * H;
    const Zone<R> zone_h = this->zone_h, zone_c = this->zone_c;
    for (int64_t j = 0; j < width; j += L<R>) {
      const int valid = SIMPLE ? L<R> : int(std::min<int64_t>(L<R>, width - j));
      const V<R> hp = load<R>(h_at + j, valid), hm = mask ? hp * load<R>(mask + j, valid) : hp;
      V<R> u[G], v[G], s[S + 1], h, c = {}, cp = {};
      UNROLL for (int g = 0; g < G; g++) {
        u[g] = load<R>(u_at + g * H + j, valid);
        fetch_line(u_at + g * H + next * G, j);
        v[g] = load<R>(weight + g * H + j, valid) * hm;
        if (C != RNN_MODRELU && bias) v[g] += load<R>(bias + g * H + j, valid);
      }
      if constexpr (C == GRU_ORIGINAL) {
        Cell<R, C>::gates(u, v, s);
        v[2] = load<R>(weight + 2 * H + j, valid) * (s[0] * hm) + optional(bias, 2 * H + j, valid);
      }
      if (C == LSTM) cp = load<R>(c_at + j, valid);
      Cell<R, C>::forward(u, v, C == RNN_MODRELU ? optional(bias, j, valid) : V<R>{}, hp, cp, h, c, s);
      if (S == 0 && saved) store<R>(saved + j, h, valid);
      if (!SIMPLE && zone_h.on) h += zone_h.old_share(row, t, k0 + j) * (hp - h);
      if constexpr (C == LSTM) {
        if (!SIMPLE && zone_c.on) c += zone_c.old_share(row, t, k0 + j) * (cp - c);
        store<R>(c_at + j, c, valid);
        s[4] = c;
      }
      store<R>(h_at + j, h, valid);
      store<R>(y_at + j, h, valid);
      fetch_line(y_at + next, j);
      if (S && saved) {
        UNROLL for (int i = 0; i < S; i++) {
          store<R>(saved + i * H + j, s[i], valid);
          fetch_line(saved + i * H + next * S, j);
        }
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
        const Gradients to{dh + r * room, dc + r * room, dw, db, room};
        simple(width) ? backward_row<true>(it, row, t, first, backwards, to)
                      : backward_row<false>(it, row, t, first, backwards, to);
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

  struct Gradients {
    R *dh, *dc, *dw, *db;
    int64_t room;  // from one gate to the next
  };

  // As `forward_row`. `first`: before this step came the initial state.
  template <bool SIMPLE>
  void backward_row(const Item& it, int64_t row, int64_t t, bool first, bool backwards, Gradients to) const {
    const int64_t H = this->H, width = it.k1 - it.k0, k0 = it.k0, place = row * H + k0, frame = t * x.B + row;
    const int64_t ahead = (backwards ? 1 : -1) * x.B, before = frame + ahead, next = ahead * H, room = to.room;
    const R *y_at = at<R>(x.y, frame * H + k0), *dy_at = at<R>(x.dy, frame * H + k0), *weight = at<R>(x.weight, k0);
    const R* saved = x.saved ? at<R>(x.saved, frame * std::max(S, 1) * H + k0) : nullptr;
    const R* hp_at = !first ? at<R>(x.y, before * H + k0) : x.h0 ? at<R>(x.h0, place) : nullptr;
    const R* cp_at = C != LSTM ? nullptr
                     : !first  ? at<R>(x.saved, (before * S + 4) * H + k0)
                     : x.c0    ? at<R>(x.c0, place)
                               : nullptr;
    const R* mask = !SIMPLE && x.mask ? at<R>(x.mask, place) : nullptr;
    R *du_at = at<R>(x.du, frame * G * H + k0), *dh_at = to.dh, *dc_at = to.dc, *dw_at = to.dw;
    R* db_at = dbias ? to.db : nullptr;
    const Zone<R> zone_h = this->zone_h, zone_c = this->zone_c;
    for (int64_t j = 0; j < width; j += L<R>) {
      const int valid = SIMPLE ? L<R> : int(std::min<int64_t>(L<R>, width - j));
      V<R> s[S + 1], du[G], dv[G], dh_old = {}, dc_old = {}, c_new = {}, cp = {}, dc = {}, dc_through = {},
                                   through = {};
      UNROLL for (int i = 0; i < S; i++) {
        s[i] = load<R>(saved + i * H + j, valid);
        fetch_line(saved + i * H + next * S, j);
      }
      const V<R> hp = optional(hp_at, j, valid), hm = mask ? hp * load<R>(mask + j, valid) : hp;
      const V<R> now = load<R>(y_at + j, valid);
      V<R> dh = load<R>(dh_at + j, valid) + load<R>(dy_at + j, valid);
      fetch_line(dy_at + next, j);
      fetch_line(y_at + 2 * next, j);
      const V<R> candidate = S == 0 && saved ? load<R>(saved + j, valid) : now;
      if (!SIMPLE && zone_h.on) {
        through = dh * zone_h.old_share(row, t, k0 + j);
        dh -= through;
      }
      if constexpr (C == LSTM) {
        cp = optional(cp_at, j, valid);
        c_new = s[4];
        dc = load<R>(dc_at + j, valid);
        if (!SIMPLE && zone_c.on) {
          c_new = s[1] * cp + s[0] * s[2];
          dc_old = dc * zone_c.old_share(row, t, k0 + j);
          dc -= dc_old;
        }
      }
      Cell<R, C>::backward(s, candidate, hp, cp, c_new, dh, dc, du, dv, dh_old, dc_through);
      V<R> carried = {};
      if constexpr (C == GRU_ORIGINAL) {
        const V<R> back = dv[2] * load<R>(weight + 2 * H + j, valid);  // the gradient of r * hm
        du[0] = dv[0] = back * hm * s[0] * (R(1) - s[0]);
        carried = back * s[0];
      }
      UNROLL for (int g = 0; g < G; g++) {
        store<R>(du_at + g * H + j, du[g], valid);
        fetch_line(du_at + g * H + next * G, j);
        if (!(C == GRU_ORIGINAL && g == 2)) carried += dv[g] * load<R>(weight + g * H + j, valid);
        const V<R> met = C == GRU_ORIGINAL && g == 2 ? s[0] * hm : hm;
        R* dw = dw_at + g * room + j;
        store<R>(dw, load<R>(dw, valid) + dv[g] * met, valid);
        if (db_at) {
          R* db = db_at + g * room + j;
          store<R>(db, load<R>(db, valid) + bias_gradient<R, C>(dv[g], candidate), valid);
        }
      }
      if (mask) carried *= load<R>(mask + j, valid);
      store<R>(dh_at + j, dh_old + through + carried, valid);
      if (C == LSTM) store<R>(dc_at + j, dc_old + dc_through, valid);
    }
  }
};

}  // namespace
