// Logits to tokens, one row at a time. A row's result depends on its logits and its parameters only: every sum has one order.
//
// The definition is sampling.py of either engine, in the order temperature, min_p, top_k, top_p, inverse CDF. Each filter keeps
// the tokens from some logit upwards, so together they are one bound, and no vocabulary is sorted to find it. Logits that are
// equal as numbers, -0 and 0 among them, stay together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "pool.h"

namespace tandem {

constexpr int TOP = 20;  // common.request.MAX_LOGPROBS

struct SampleParams {
  uint32_t seed[2];
  int32_t position;    // of the token to choose
  float temperature;   // 0 is greedy
  float top_p, min_p;  // 1 and 0 keep all
  int32_t top_k;       // 0 keeps all
  int32_t score;       // the token to report on; negative: the chosen one
  bool sampled;        // otherwise greedy
  bool filtered;       // otherwise top_k, top_p and min_p are not looked at
  bool logprobs;
};

struct Sampled {
  int32_t token;
  int32_t finite;   // whether every logit is
  uint32_t digest;  // of the bits of the logits in order; a change of any one bit changes it
  // Of the raw logits, written only where asked for. Of fewer than TOP tokens the rest has id 0 and logprob -inf.
  float logprob;
  int32_t rank;          // 1 + how many logits are greater
  int32_t top_ids[TOP];  // falling, ties to the lower id
  float top_logprobs[TOP];
};

namespace sampling {

using tandem::load, tandem::select;
using U = uint32_t __attribute__((vector_size(64)));

constexpr int BLOCK = 128, VECTORS = BLOCK / LANES;
constexpr float INF = __builtin_inff(), NOT_A_NUMBER = __builtin_nanf("");
constexpr I LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

TANDEM_INLINE I select(I mask, I yes, I no) { return (mask & yes) | (~mask & no); }

TANDEM_INLINE I greater(I a, I b) {
#if TANDEM_AVX512
  return (I)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return select(above(a, b), a, b);
#endif
}

TANDEM_INLINE I lesser(I a, I b) { return ~greater(~a, ~b); }

// One bit for each lane whose mask is set.
TANDEM_INLINE unsigned bits(I mask) {
#if TANDEM_AVX512
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  unsigned set = 0;
  for (int i = 0; i < LANES; ++i) set |= unsigned(mask[i] & 1) << i;
  return set;
#endif
}

TANDEM_INLINE int32_t greatest(I v) {
  int32_t m = v[0];
  for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

TANDEM_INLINE int32_t least(I v) { return ~greatest(~v); }

// Floats as integers in the same order, and back.
TANDEM_INLINE I key(V x) { return (I)x ^ (((I)x >> 31) & 0x7fffffff); }

TANDEM_INLINE V value(I key) { return (V)(key ^ ((key >> 31) & 0x7fffffff)); }

TANDEM_INLINE int32_t key(float x) { return key(set1(x))[0]; }

TANDEM_INLINE float value(int32_t key) { return value(I{} + key)[0]; }

TANDEM_INLINE int32_t halfway(int32_t low, int32_t high) { return int32_t(low + (int64_t(high) - low) / 2); }

struct Block {
  V x[VECTORS];
};

// The first n of sixteen, then `fill`, for n of any size and sign.
TANDEM_INLINE V load(const float* p, int n, float fill) {
  if (n >= LANES) return load(p);
  return select(above(I{} + n, LANE), n > 0 ? load(p, n) : V{}, set1(fill));
}

// Lanes past the end are NaN unless told otherwise: no comparison holds for them.
TANDEM_INLINE Block block(const float* p, int n, float fill = NOT_A_NUMBER) {
  Block b;
#pragma GCC unroll 8
  for (int i = 0; i < VECTORS; ++i) b.x[i] = n >= BLOCK ? load(p + i * LANES) : load(p + i * LANES, n - i * LANES, fill);
  return b;
}

// By lane; -inf where all are NaN.
TANDEM_INLINE V most(const Block& b) {
  V m = set1(-INF);
#pragma GCC unroll 8
  for (int i = 0; i < VECTORS; ++i) m = max(b.x[i], m);
  return m;
}

// A sum of any length in a fixed order: short ones by lane, each over its lanes, those in float64. Long float32 sums of equal
// terms would lean to one side.
class Sum {
 public:
  TANDEM_INLINE void add(V v) {
    lanes_ += v;
    if (++terms_ == 64) flush();
  }
  TANDEM_INLINE double total() {
    flush();
    return total_;
  }

 private:
  TANDEM_INLINE void flush() {
    total_ += sum(lanes_);
    lanes_ = V{};
    terms_ = 0;
  }
  V lanes_{};
  double total_ = 0;
  int terms_ = 0;
};

// ── what every row needs: one pass ───────────────────────────────────────────────────────────────────────────────────────

struct Scan {
  float peak;            // the highest logit, NaN apart
  int32_t token;         // the lowest id that has it
  bool finite, numbers;  // no infinities and NaN; no NaN
  uint32_t digest;
};

// The round of xxHash32 (Collet 2012). For each h it is a bijection of x, for each x one of h: so a chain of rounds passes on a
// change of any one bit.
template <class T>
TANDEM_INLINE T mix(T h, T x) {
  h += x * 0x85ebca77u;
  return (h << 13 | h >> 19) * 0x9e3779b1u;
}

// Puts the highest logit of each lane of each whole block into `maxima` unless it is null.
inline Scan scan(const float* x, int n, float* maxima) {
  constexpr int CHAINS = 4;  // enough to hide the latency of `mix`
  U chain[CHAINS] = {};
  V best = set1(-INF);
  I where{}, magnitude{};
  for (int begin = 0; begin < n; begin += BLOCK) {
    const Block raw = block(x + begin, n - begin, 0.0f);
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) {
      chain[i % CHAINS] = mix(chain[i % CHAINS], (U)raw.x[i]);
      magnitude = greater(magnitude, (I)raw.x[i] & 0x7fffffff);
    }
    const bool whole = n - begin >= BLOCK;
    const V m = most(whole ? raw : block(x + begin, n - begin));
    if (maxima && whole) store(maxima + begin / BLOCK * LANES, m);
    where = select(above(m, best), I{} + begin, where);
    best = max(m, best);
  }
  Scan s;
  s.peak = max(best);
  const int32_t infinite = 0x7f800000, largest = greatest(magnitude);
  s.finite = largest < infinite;
  s.numbers = largest <= infinite;
  const int begin = least(select(reaches(best, set1(s.peak)), where, I{} + INT32_MAX));
  const int end = begin + BLOCK < n ? begin + BLOCK : n;
  s.token = begin;  // stays where all are NaN
  for (int i = end; i-- > begin;) s.token = x[i] == s.peak ? i : s.token;
  for (int i = 1; i < CHAINS; ++i) chain[0] = mix(chain[0], chain[i]);
  s.digest = 0;
  for (int i = 0; i < LANES; ++i) s.digest = mix(s.digest, uint32_t(chain[0][i]));
  return s;
}

// ── filters ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

// The unnormalized probability of tokens: of the highest logit 1, below the bound 0.
struct Weight {
  float temperature, peak, bound;  // peak: the highest logit over the temperature
  TANDEM_INLINE V operator()(V x) const {
    return select(reaches(x, set1(bound)), exp(x / set1(temperature) - set1(peak)), V{});
  }
};

struct Count {
  TANDEM_INLINE V operator()(V) const { return set1(1.0f); }
};

// Some of the logits, as keys, with the least and the greatest by lane.
struct Candidates {
  float* keys;
  int n = 0;
  I low = I{} + INT32_MAX, high = I{} + INT32_MIN;

  // Sixteen from the i-th; past the end what is below every key.
  TANDEM_INLINE I at(int i) const {
    const I k = (I)load(keys + i, n - i);
    return n - i >= LANES ? k : select(above(I{} + (n - i), LANE), k, I{} + INT32_MIN);
  }

  TANDEM_INLINE void add(I k, I keep) {
    low = lesser(low, select(keep, k, I{} + INT32_MAX));
    high = greater(high, select(keep, k, I{} + INT32_MIN));
    const unsigned set = bits(keep);
    const int count = __builtin_popcount(set);
#if TANDEM_AVX512
    const __m512 packed = _mm512_maskz_compress_ps(__mmask16(set), (__m512)k);
    _mm512_mask_storeu_ps(keys + n, __mmask16((1u << count) - 1), packed);
#else
    float* to = keys + n;
    for (int i = 0; i < LANES; ++i)
      if (set >> i & 1) std::memcpy(to++, (const char*)&k + i * sizeof(float), sizeof(float));
#endif
    n += count;
  }
};

// The logits in [low, high). `keys` has room for all, and may be x.
inline Candidates gather(const float* x, int n, float low, float high, float* keys) {
  Candidates c{keys};
  for (int begin = 0; begin < n; begin += BLOCK) {
    const Block b = block(x + begin, n - begin);
    if (!bits(reaches(most(b), set1(low)))) continue;
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) c.add(key(b.x[i]), reaches(b.x[i], set1(low)) & above(set1(high), b.x[i]));
  }
  return c;
}

// The highest of the candidates such that it, those above it and `base` have a mass of `need`; the lowest if none has.
// Bisection, which forgets the candidates of the other half: by value at first, which leaves few, then by key, which ends.
template <class Mass>
inline float cut(Candidates c, double base, double need, const Mass& mass) {
  for (int round = 0;; ++round) {
    const int32_t low = least(c.low), high = greatest(c.high);
    if (low >= high) return value(low);
    const int32_t middle = round < 8 ? key(0.5f * value(low) + 0.5f * value(high)) : halfway(low, high);
    const int32_t pivot = middle <= low ? low + 1 : middle < high ? middle : high;
    Sum sum;
    for (int i = 0; i < c.n; i += LANES) {
      const I k = c.at(i);
      sum.add(select(reaches(k, I{} + pivot), mass(value(k)), V{}));
    }
    const double reached = base + sum.total();
    const bool enough = reached >= need;
    if (!enough) base = reached;
    Candidates rest{c.keys};
    for (int i = 0; i < c.n; i += LANES) {
      const I k = c.at(i);
      const I upper = reaches(k, I{} + pivot);
      rest.add(k, enough ? upper : ~upper & above(k, I{} + INT32_MIN));
    }
    c = rest;
  }
}

// The k-th highest logit. `scratch` holds the maxima that `scan` left.
inline float kth(const float* x, int n, int k, float* scratch) {
  // Maxima of disjoint groups are logits too: the k-th of them leaves few below k-th place to look at.
  const int groups = n / BLOCK * LANES;
  const float low = k <= groups ? cut(gather(scratch, groups, -INF, INF, scratch), 0, k, Count{}) : -INF;
  return cut(gather(x, n, low, INF, scratch), 0, k, Count{});
}

// The lowest logit of the smallest set of the likeliest tokens that has top_p of the weight.
inline float nucleus(const float* x, int n, const Weight& weight, float top_p, float* scratch) {
  // The weight from each of some logits upwards, to look closer between two of them only: so far below the peak, over the
  // temperature. Real distributions end near the first, flat ones far down.
  constexpr int EDGES = 8;
  constexpr float DEPTHS[EDGES] = {1, 2, 3, 4, 6, 8, 11, 15};
  float edges[EDGES];
  for (int j = 0; j < EDGES; ++j) edges[j] = (weight.peak - DEPTHS[j]) * weight.temperature;
  V lanes[EDGES + 1] = {};
  double reached[EDGES + 1] = {};
  for (int begin = 0; begin < n; begin += BLOCK) {
    const Block b = block(x + begin, n - begin);
    if (bits(reaches(most(b), set1(weight.bound)))) {
      for (int i = 0; i < VECTORS; ++i) {
        const V w = weight(b.x[i]);
#pragma GCC unroll 8
        for (int j = 0; j < EDGES; ++j) lanes[j] += select(reaches(b.x[i], set1(edges[j])), w, V{});
        lanes[EDGES] += w;
      }
    }
    if (begin / BLOCK % 8 == 7 || n - begin <= BLOCK) {  // as Sum does
      for (int j = 0; j <= EDGES; ++j) reached[j] += sum(lanes[j]), lanes[j] = V{};
    }
  }
  const double need = double(top_p) * reached[EDGES];
  int j = 0;
  while (j < EDGES && reached[j] < need) ++j;
  const float low = j < EDGES && edges[j] > weight.bound ? edges[j] : weight.bound, high = j ? edges[j - 1] : INF;
  return cut(gather(x, n, low, high, scratch), j ? reached[j - 1] : 0, need, weight);
}

// The least logit that comes to t or more when divided by the temperature, if `peak` does. Division keeps order, so this bound
// on logits keeps the same tokens as t does on what is divided, ties that the division makes included.
inline float undivided(float t, float temperature, float peak) {
  int32_t low = key(-INF), high = key(peak);
  while (low < high) {
    const int32_t middle = halfway(low, high);
    if (value(middle) / temperature >= t) high = middle;
    else low = middle + 1;
  }
  return value(low);
}

// The least logit that the filters keep.
inline float filter(const float* x, int n, const SampleParams& p, float peak, float* scratch) {
  const float T = p.temperature;
  float t = peak / T + std::log(p.min_p);
  if (p.top_k > 0 && p.top_k < n) {
    const float last = kth(x, n, p.top_k, scratch) / T;
    t = last > t ? last : t;
  }
  const float bound = undivided(t, T, peak);
  if (!(p.top_p < 1)) return bound;
  return undivided(nucleus(x, n, Weight{T, peak / T, bound}, p.top_p, scratch) / T, T, peak);
}

// ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────────

// In (0, 1). Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.2) of key = seed
// and counter = (position, 0); the upper 23 bits of the first word, centred.
inline float uniform(const uint32_t seed[2], int32_t position) {
  constexpr int TURNS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {seed[0], seed[1], seed[0] ^ seed[1] ^ 0x1bd11bda};
  uint32_t x = uint32_t(position) + keys[0], y = keys[1];
  for (int group = 0; group < 5; ++group) {
    for (const int turn : TURNS[group % 2]) {
      x += y;
      y = (y << turn | y >> (32 - turn)) ^ x;
    }
    x += keys[(group + 1) % 3];
    y += keys[(group + 2) % 3] + group + 1;
  }
  return (float(x >> 9) + 0.5f) * 0x1p-23f;
}

// The token at which the cumulative weight, in the order of ids, first exceeds u of the whole.
inline int32_t inverse_cdf(const float* x, int n, const Weight& weight, float u, float* upto) {
  const int blocks = (n + BLOCK - 1) / BLOCK;
  double total = 0;
  for (int k = 0; k < blocks; ++k) {
    const Block b = block(x + k * BLOCK, n - k * BLOCK);
    if (bits(reaches(most(b), set1(weight.bound)))) {
      V w{};
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) w += weight(b.x[i]);
      total += sum(w);
    }
    upto[k] = float(total);
  }
  const float target = u * upto[blocks - 1];  // less than the last: u is at most 1 - 2^-24
  int which = 0;
  while (upto[which] <= target) ++which;
  const double rest = double(target) - (which ? upto[which - 1] : 0);
  const Block b = block(x + which * BLOCK, n - which * BLOCK);
  float w[BLOCK];
  for (int i = 0; i < VECTORS; ++i) store(w + i * LANES, weight(b.x[i]));
  double inside = 0;
  int last = 0;
  for (int i = 0; i < BLOCK; ++i) {
    if (!(w[i] > 0)) continue;
    last = i;  // rounding may carry the target past the block's end: then its last token of any weight is meant
    inside += w[i];
    if (inside > rest) break;
  }
  return which * BLOCK + last;
}

// ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

// -inf where a token has no bit.
inline void mask_row(float* x, int n, const uint32_t* bits) {
  for (int begin = 0; begin < n; begin += 32)
    if (const uint32_t word = bits[begin / 32]; word != 0xffffffff)
      for (int i = begin; i < n && i < begin + 32; ++i) x[i] = word >> (i - begin) & 1 ? x[i] : -INF;
}

// A logit under a bias, a repetition factor and a penalty.
inline float edited(float x, const float values[3]) {
  const float biased = x + values[0];
  const float repeated = biased > 0 ? biased / values[1] : biased * values[1];
  return repeated - values[2];
}

// ── logprobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

inline void logprobs(const float* x, int n, int32_t token, const Scan& s, Sampled& out) {
  const Weight weight{1, s.peak, -INF};
  const V chosen = set1(x[token]);
  float top[TOP];
  int filled = 0;
  I higher{};
  Sum sum;
  for (int begin = 0; begin < n; begin += BLOCK) {
    const Block b = block(x + begin, n - begin);
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) {
      sum.add(weight(b.x[i]));
      higher -= above(b.x[i], chosen);
    }
    if (filled == TOP && !bits(above(most(b), set1(top[TOP - 1])))) continue;
    for (int i = 0; i < VECTORS; ++i) {
      const int first = begin + i * LANES, real = n - first < LANES ? n - first : LANES;
      for (unsigned set = filled < TOP ? 0xffff : bits(above(b.x[i], set1(top[TOP - 1]))); set; set &= set - 1) {
        const int lane = __builtin_ctz(set);
        if (lane >= real) break;
        const float logit = x[first + lane];
        if (filled == TOP && !(logit > top[TOP - 1])) continue;
        int at = filled < TOP ? filled++ : TOP - 1;
        for (; at && logit > top[at - 1]; --at) top[at] = top[at - 1], out.top_ids[at] = out.top_ids[at - 1];
        top[at] = logit, out.top_ids[at] = first + lane;
      }
    }
  }
  const double norm = s.numbers ? s.peak + std::log(sum.total()) : NOT_A_NUMBER;
  out.logprob = float(x[token] - norm);
  out.rank = 1;
  for (int i = 0; i < LANES; ++i) out.rank += higher[i];
  for (int i = 0; i < TOP; ++i) {
    out.top_logprobs[i] = i < filled ? float(top[i] - norm) : -INF;
    if (i >= filled) out.top_ids[i] = 0;
  }
}

}  // namespace sampling

// float32[vocab] as changed -> its token; raw -> what else was asked for. `scratch` has room for `vocab` floats. To be called in
// the pool's `FloatMode`. Where NaN or inf is among the logits, all are -inf, or the highest overflows over the temperature, the
// token is greedy.
inline void sample_row(const float* raw, const float* changed, int vocab, const SampleParams& p, float* scratch, Sampled& out) {
  using namespace sampling;
  const bool hot = p.sampled && p.temperature > 0;
  float* maxima = hot && p.filtered && p.top_k > 0 ? scratch : nullptr;
  const Scan s = scan(changed, vocab, maxima), before = raw == changed ? s : scan(raw, vocab, nullptr);
  out.token = s.token;
  out.finite = before.finite;
  out.digest = before.digest;
  const float peak = s.peak / p.temperature;
  if (hot && s.numbers && std::isfinite(peak)) {
    const float bound = p.filtered ? filter(changed, vocab, p, s.peak, scratch) : -INF;
    out.token = inverse_cdf(changed, vocab, Weight{p.temperature, peak, bound}, uniform(p.seed, p.position), scratch);
  }
  if (p.logprobs) logprobs(raw, vocab, p.score < 0 ? out.token : p.score, before, out);
}

}  // namespace tandem
