// Vectors of the instruction set that is compiled for: VECTOR_BYTES, a multiple of 16.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

namespace {

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

}  // namespace
