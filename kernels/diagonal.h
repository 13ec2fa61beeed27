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

}  // namespace
