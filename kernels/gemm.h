// The only hot loop: rows of state times a panel of weights, in registers; and how the panels are packed.

#pragma once

#include <algorithm>

#include "call.h"
#include "vectors.h"

namespace {

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

}  // namespace
