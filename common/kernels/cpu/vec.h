// Sixteen floats at a time, and the two element types of weights, activations and KV: float32 and bfloat16.
//
// Two implementations of the few operations that matter, chosen when this is compiled: AVX-512, and the compiler's own vectors
// (AVX2, Arm, anything else); and two of products of bfloat16: dot products of pairs, and fused multiply-adds of what was widened,
// for processors that have no dot products or slow ones. Within one build every operation is a fixed sequence of roundings, so
// what is computed does not depend on who calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(TANDEM_PORTABLE)
#define TANDEM_AVX512 1
#define TANDEM_VECTORS "AVX-512"
#if defined(__AVX512BF16__)
#define TANDEM_AVX512BF16 1
#endif
#else
#define TANDEM_VECTORS "portable vectors"
#endif
#if defined(TANDEM_WIDEN) || !defined(TANDEM_AVX512BF16)
#define TANDEM_DOT 0
#else
#define TANDEM_DOT 1
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#define TANDEM_INLINE inline __attribute__((always_inline))

namespace tandem {

constexpr int LANES = 16;
using bf16 = uint16_t;
using V = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));

TANDEM_INLINE V set1(float x) { return x - V{}; }  // -0 too; x + 0 would lose it

TANDEM_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

TANDEM_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

// The first n of sixteen; the others are 0.
TANDEM_INLINE V load(const float* p, int n) {
  if (n >= LANES) return load(p);
#if TANDEM_AVX512
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#else
  float lanes[LANES] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
#endif
}

TANDEM_INLINE void store(float* p, V v, int n) {
  if (n >= LANES) return store(p, v);
  std::memcpy(p, &v, n * sizeof(float));
}

TANDEM_INLINE V widen(const bf16* p) {
#if TANDEM_AVX512
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  I bits;
  for (int i = 0; i < LANES; ++i) bits[i] = int32_t(uint32_t(p[i]) << 16);
  return (V)bits;
#endif
}

TANDEM_INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest, ties to even; subnormals to 0; NaN stays NaN.
TANDEM_INLINE void narrow(bf16* p, V v) {
#if TANDEM_AVX512BF16
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
  for (int i = 0; i < LANES; ++i) {
    uint32_t bits;
    float x = v[i];
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    p[i] = (bits & 0x7fffffffu) > 0x7f800000u ? bf16(bits >> 16 | 64) : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
#endif
}

TANDEM_INLINE V fma(V a, V b, V c) {
#if TANDEM_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  V r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// Lane masks. Compilers compare vectors that are wider than the machine's one element at a time, so this hands them pieces.
template <class W, class Compare>
TANDEM_INLINE I compare(W a, W b, const Compare& holds) {
#if defined(__AVX512F__)
  return holds(a, b);
#else
#if defined(__AVX2__)
  constexpr int BYTES = 32;
#else
  constexpr int BYTES = 16;
#endif
  using Lane = std::remove_reference_t<decltype(a[0])>;
  typedef Lane Piece __attribute__((vector_size(BYTES)));
  I mask;
  for (int at = 0; at < int(sizeof mask); at += BYTES) {
    Piece x, y;
    std::memcpy(&x, (const char*)&a + at, BYTES);
    std::memcpy(&y, (const char*)&b + at, BYTES);
    const auto part = holds(x, y);
    std::memcpy((char*)&mask + at, &part, BYTES);
  }
  return mask;
#endif
}

template <class W>
TANDEM_INLINE I above(W a, W b) {
  return compare(a, b, [](const auto& x, const auto& y) { return x > y; });
}

template <class W>
TANDEM_INLINE I reaches(W a, W b) {
  return compare(a, b, [](const auto& x, const auto& y) { return x >= y; });
}

// Whether a is above b in any lane.
TANDEM_INLINE bool any_above(V a, V b) {
#if TANDEM_AVX512
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#else
  const I mask = above(a, b);
  bool any = false;
  for (int i = 0; i < LANES; ++i) any |= mask[i];
  return any;
#endif
}

// b where either is NaN.
TANDEM_INLINE V max(V a, V b) {
#if TANDEM_AVX512
  return _mm512_max_ps(a, b);
#else
  const I mask = above(a, b);
  return (V)(((I)a & mask) | ((I)b & ~mask));
#endif
}

// Lanes of mask are all ones or all zeros.
TANDEM_INLINE V select(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }

// One order of additions for every sum over lanes.
TANDEM_INLINE float sum(V v) {
  float x[LANES];
  store(x, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

TANDEM_INLINE float max(V v) {
#if TANDEM_AVX512
  return _mm512_reduce_max_ps(v);
#else
  float x = v[0];
  for (int i = 1; i < LANES; ++i) x = v[i] > x ? v[i] : x;
  return x;
#endif
}

// 2^x for x ≤ 127, within 2 units of the last place; exactly 1 at 0, exactly 0 below -126, greater x as 127. NaN stays NaN.
// The nearest whole number goes to the exponent, the rest, in [-1/2, 1/2], through a
// polynomial of degree 6, fitted by least squares to the relative error.
TANDEM_INLINE V exp2(V x) {
#if TANDEM_AVX512
  x = _mm512_min_ps(_mm512_set1_ps(127.0f), x);  // the second where one is NaN
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const I tiny = above(set1(-126.0f), x), huge = above(x, set1(127.0f));
  x = select(huge, set1(127.0f), select(tiny, set1(0.0f), x));
  const V shift = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number in the low bits
  const V t = x + shift, n = t - shift;
#endif
  const V r = x - n;
  V p = fma(set1(1.53707048e-4f), r, set1(1.33998483e-3f));
  p = fma(p, r, set1(9.61837325e-3f));
  p = fma(p, r, set1(5.55032904e-2f));
  p = fma(p, r, set1(2.40226485e-1f));
  p = fma(p, r, set1(6.93147206e-1f));
  p = fma(p, r, set1(1.0f));
#if TANDEM_AVX512
  return _mm512_scalef_ps(p, n);  // what falls below the smallest normal number is flushed to 0
#else
  return select(tiny, set1(0.0f), p * (V)((((I)t - (I)shift) + 127) << 23));
#endif
}

// The same for what is rounded to bfloat16 at once, for x below 128: within 9e-5, a twentieth of that rounding. What is above the
// whole number below x, in [0, 1], goes through a polynomial of degree 3.
TANDEM_INLINE V rough_exp2(V x) {
#if TANDEM_AVX512
  const V r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // of an infinite x: 0
  V p = fma(set1(7.706704289e-2f), r, set1(2.276449897e-1f));
  p = fma(p, r, set1(6.951167871e-1f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(p, x);  // whose exponent is that whole number
#else
  return exp2(x);
#endif
}

// 1 / x, likewise rough.
TANDEM_INLINE V rough_reciprocal(V x) {
#if TANDEM_AVX512
  return _mm512_rcp14_ps(x);  // within 2^-14
#else
  return 1.0f / x;
#endif
}

constexpr float LOG2E = 1.44269504f;

// e^x: as 2^(x log2 e), the product in two parts so that nothing of x is lost.
TANDEM_INLINE V exp(V x) {
  x = max(set1(-1000.0f), x);  // of the two orders the one that keeps NaN
  const V high = x * LOG2E, low = fma(x, set1(LOG2E), -high) + x * 1.92596303e-8f;
  return fma(exp2(high), low * 6.9314718e-1f, exp2(high));
}

// One element type: T is stored, PAIR of them along the axis that is summed over sit side by side, and sixteen such groups make
// one register, which takes STEPS multiplications with operands of type A: `madd` adds the products of one operand, the same for
// all lanes, with `part` of each lane's group. PAIR operands, of which every PAIR / STEPS-th is named, stand for a group.
struct F32 {
  using T = float;
  using A = float;
  using Stored = F32;
  static constexpr bool TILES = false;
  struct Registers {};
  using Vec = V;
  static constexpr int PAIR = 1, STEPS = 1;
  static TANDEM_INLINE Vec vec(const T* p) { return load(p); }
  static TANDEM_INLINE Vec part(Vec b, int) { return b; }
  static TANDEM_INLINE V madd(V acc, const A* a, Vec b) { return fma(set1(*a), b, acc); }
  static TANDEM_INLINE V get(const T* p) { return load(p); }
  static TANDEM_INLINE void put(T* p, V v) { store(p, v); }
  static TANDEM_INLINE Vec first(Vec b) { return b; }
};

struct BF16 {
  using T = bf16;
  using Stored = BF16;
  static constexpr bool TILES = false;
  struct Registers {};
  using Vec = I;
  static constexpr int PAIR = 2;
  static TANDEM_INLINE Vec vec(const T* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
#if TANDEM_DOT
  using A = bf16;
  static constexpr int STEPS = 1;
  static TANDEM_INLINE Vec part(Vec b, int) { return b; }
  static TANDEM_INLINE V madd(V acc, const A* a, Vec b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)(__m512i)b);
  }
#else
  using A = float;
  static constexpr int STEPS = 2;
  static TANDEM_INLINE Vec part(Vec b, int step) { return step ? b & int32_t(0xffff0000) : b << 16; }
  static TANDEM_INLINE V madd(V acc, const A* a, Vec b) { return fma(set1(*a), (V)b, acc); }
#endif
  static TANDEM_INLINE V get(const T* p) { return widen(p); }
  static TANDEM_INLINE void put(T* p, V v) { narrow(p, v); }
  // Each pair with its second element as 0.
  static TANDEM_INLINE Vec first(Vec b) { return b & 0xffff; }
};

// The first n of sixteen elements.
template <class E>
TANDEM_INLINE V get(const typename E::T* p, int n) {
  if (n >= LANES) return E::get(p);
  typename E::T lanes[LANES] = {};
  std::memcpy(lanes, p, n * sizeof(*p));
  return E::get(lanes);
}

template <class E>
TANDEM_INLINE void put(typename E::T* p, V v, int n) {
  if (n >= LANES) return E::put(p, v);
  typename E::T lanes[LANES];
  E::put(lanes, v);
  std::memcpy(p, lanes, n * sizeof(*p));
}

// n elements as operands.
template <class E>
TANDEM_INLINE void operands(const typename E::T* from, int n, typename E::A* to) {
  constexpr bool SAME = std::is_same_v<typename E::T, typename E::A>;
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    if constexpr (SAME) std::memcpy(to + i, from + i, LANES * sizeof(*from));
    else store(to + i, E::get(from + i));
  if (i == n) return;
  if constexpr (SAME) std::memcpy(to + i, from + i, (n - i) * sizeof(*from));
  else store(to + i, get<E>(from + i, n - i), n - i);
}

// Sixteen values as operands, rounded as elements are. Returns them so.
template <class E>
TANDEM_INLINE V put_operands(typename E::A* to, V v) {
  typename E::T lanes[LANES];
  E::put(lanes, v);
  const V rounded = E::get(lanes);
  if constexpr (std::is_same_v<typename E::T, typename E::A>) std::memcpy(to, lanes, sizeof lanes);
  else store(to, rounded);
  return rounded;
}

// A vector that begins with a cache line.
template <class T>
struct CacheLines {
  using value_type = T;
  CacheLines() = default;
  template <class U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const CacheLines&) const { return true; }
  bool operator!=(const CacheLines&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, CacheLines<T>>;

// Into the second-level cache: the first has too few places for what is on its way from memory.
TANDEM_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

TANDEM_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace tandem
