// What Python hands over, and the cells by number.

#pragma once

#include <cstdint>

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

}  // namespace
