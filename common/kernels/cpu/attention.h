// Attention of packed tokens over pages, softmax block by block with a running maximum and sum (Dao et al. 2022,
// arXiv:2205.14135, §3.1).
//
// K lies as [K, pages, H / PAIR, B, PAIR], V as [K, pages, B / PAIR, H', PAIR], H' being H rounded up to sixteen: so sixteen keys'
// scores, and sixteen dimensions of the output, are one register each. Blocks of 64 keys and partitions of 512 are absolute
// positions in the sequence, and each partition has a maximum and a sum of its own: decode and prefill, alone or in company, cut
// in parts or not, do the same arithmetic in the same order.
#pragma once

#include <vector>

#include "amx.h"
#include "pool.h"
#include "step.h"

namespace tandem {

constexpr int BLOCK = 64, PARTITION = 512, SUB = BLOCK / LANES, AHEAD = 1, MAX_HEAD_DIM = 512;
constexpr float MASKED = -3e38f;  // in units of log 2: below every score, as long as attention's scale is at most 1 / 2
// A maximum that rises by no more than this, in units of log 2, stays as it is: sums need not be scaled anew nearly as often, and
// what is 2^8 times as large keeps as many bits.
constexpr float SLACK = 8;

constexpr int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// One layer's pages.
template <class E>
struct Pages {
  using T = typename E::T;
  T *k, *v;
  int kv_heads, pages, page, head_dim;  // K, pages, B, H

  size_t k_page() const { return size_t(page) * head_dim; }
  size_t v_page() const { return size_t(page) * padded(head_dim); }

  // The groups of one dimension pair of keys 16 * i of a page start at this plus pair * page * PAIR.
  T* keys(int head, int page_id, int at) const {
    return k + (size_t(head) * pages + page_id) * k_page() + size_t(at) * E::PAIR;
  }
  // The groups of key pair `at / PAIR`.
  T* values(int head, int page_id, int at) const {
    return v + (size_t(head) * pages + page_id) * v_page() + size_t(at) * padded(head_dim);
  }
  // The cache lines that `put` will write.
  void fetch(int head, int slot) const {
    const int id = slot / page, at = slot % page;
    const T* to = keys(head, id, at);
    for (int h = 0; h < head_dim; h += E::PAIR, to += size_t(page) * E::PAIR) __builtin_prefetch(to, 1, 2);
    const char* row = (const char*)values(head, id, at / E::PAIR * E::PAIR);
    for (size_t i = 0; i < padded(head_dim) * E::PAIR * sizeof(T); i += 64) __builtin_prefetch(row + i, 1, 2);
  }
  // Write one token's head, head_dim elements each.
  void put(int head, int slot, const T* key, const T* value) const {
    constexpr int G = E::PAIR;
    const int id = slot / page, at = slot % page;
    T* to = keys(head, id, at);
    for (int h = 0; h < head_dim; h += G, to += size_t(page) * G) std::memcpy(to, key + h, sizeof(T) * G);
    to = values(head, id, at / G * G) + at % G;
    for (int h = 0; h < head_dim; ++h) to[h * G] = value[h];
  }
};

// What one query head of one token has gathered in one partition: the maximum of its scores, in units of log 2 and up to SLACK, and
// the sum of their powers of 2 less it, lane by lane.
struct Partial {
  float peak;
  V total;
};

// Rows of a tile that go through a block together: their scores and probabilities stay in the first-level cache.
template <class E>
constexpr int GROUP = E::TILES ? TILE_ROWS : 12;

// Scratch of one tile, grown once and kept by its thread.
template <class E>
struct Tile {
  alignas(64) float s[2][GROUP<E> * BLOCK];
  alignas(64) typename E::A p[GROUP<E> * BLOCK];
  alignas(64) typename E::T values[E::TILES ? LANES * MAX_HEAD_DIM : 1];  // of the last sixteen keys, where fewer are written
  Buffer<typename E::A> q;
  Buffer<float> acc;
  Buffer<Partial> partials;
  Buffer<int> position;

  void fit(int rows, int head_dim, int partitions) {
    auto grow = [](auto& v, size_t n) { if (v.size() < n) v.resize(n); };
    grow(q, size_t(rows) * head_dim);
    grow(acc, size_t(rows) * padded(head_dim) * partitions);
    grow(partials, size_t(rows) * partitions);
    grow(position, rows);
  }
};

// s[r][64] = q[r] · k of one block: R rows, keys in C groups of sixteen. Of the next block all groups are fetched.
template <class E, int R, int C>
inline void scores(const typename E::A* q, int head_dim, const typename E::T* const* k, const typename E::T* const* next,
                   size_t stride, float* s) {
  V acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) acc[r][j] = V{};
  for (int h = 0; h < head_dim / E::PAIR; ++h) {
    typename E::Vec b[C];
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) b[j] = E::vec(k[j] + h * stride);
    if (next)
      for (int j = 0; j < SUB; ++j) prefetch(next[j] + h * stride);
#pragma GCC unroll 2
    for (int step = 0; step < E::STEPS; ++step) {
      typename E::Vec part[C];
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) part[j] = E::part(b[j], step);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < C; ++j) acc[r][j] = E::madd(acc[r][j], q + r * head_dim + h * E::PAIR + step, part[j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) store(s + r * BLOCK + j * LANES, acc[r][j]);
}

// acc[r][16 * C] += p[r][:keys] v: R rows, C registers of dimensions.
template <class E, int R, int C>
inline void weigh(const typename E::A* p, int keys, const typename E::T* const* v, const typename E::T* const* next, int width,
                  float* acc) {
  constexpr int G = E::PAIR;
  V sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[r][c] = load(acc + r * width + c * LANES);
  for (int i = 0; i < keys; i += G) {
    const auto* row = v[i / LANES] + size_t(i % LANES) * width;
    typename E::Vec b[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      b[c] = E::vec(row + c * LANES * G);
      if (i + 1 == keys) b[c] = E::first(b[c]);  // no token has written the other of the pair yet
    }
    if (next)
      for (int c = 0; c < C; ++c) prefetch(next[i / LANES] + size_t(i % LANES) * width + c * LANES * G);
#pragma GCC unroll 2
    for (int step = 0; step < E::STEPS; ++step) {
      typename E::Vec part[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) part[c] = E::part(b[c], step);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[r][c] = E::madd(sum[r][c], p + r * BLOCK + i + step, part[c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(acc + r * width + c * LANES, sum[r][c]);
}

#if TANDEM_TILES
// s[r][64] = q[r] · k of one block by the matrix unit: up to sixteen rows, keys in groups of sixteen. Of the next block all groups
// are fetched.
inline void score_tile(const bf16* q, int head_dim, int groups, const bf16* const* k, const bf16* const* next, size_t stride,
                       float* s) {
  constexpr int WIDTH = BLOCK * sizeof(float);
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int h = 0; h < head_dim; h += TILE_INPUTS) {
    const size_t at = h / 2 * stride;
    _tile_loadd(4, q + h, head_dim * sizeof(bf16));
#define TANDEM_SCORE(J)                                 \
  do {                                                  \
    _tile_loadd(6, k[J] + at, stride * sizeof(bf16));   \
    _tile_dpbf16ps(J, 4, 6);                            \
  } while (false)
    TANDEM_SCORE(0);
    if (groups > 1) TANDEM_SCORE(1);
    if (groups > 2) TANDEM_SCORE(2);
    if (groups > 3) TANDEM_SCORE(3);
#undef TANDEM_SCORE
    if (next)
      for (int j = 0; j < SUB; ++j)
        for (int i = 0; i < TILE_INPUTS / 2; ++i) prefetch(next[j] + at + i * stride);
  }
  _tile_stored(0, s, WIDTH);
  _tile_stored(1, s + 16, WIDTH);
  _tile_stored(2, s + 32, WIDTH);
  _tile_stored(3, s + 48, WIDTH);
}

// The unit multiplies what it loads: of sixteen keys' values those that no token has written yet are 0 in a copy.
inline const bf16* written(const bf16* v, int keys, int width, bf16* copy) {
  for (int i = 0; i < LANES; i += 2)
    for (int h = 0; h < 2 * width; h += 2 * LANES) {
      const I pairs = i < keys ? BF16::vec(v + size_t(i) * width + h) : I{};
      const I known = i + 1 == keys ? BF16::first(pairs) : pairs;
      std::memcpy(copy + size_t(i) * width + h, &known, sizeof known);
    }
  return copy;
}

// acc[r][:width] += p[r] v of one block by the matrix unit, likewise.
inline void weigh_tile(const bf16* p, int groups, const bf16* const* v, const bf16* const* next, int width, float* acc) {
  const size_t row = width * sizeof(float);
  asm volatile("" ::: "memory");
  for (int h = 0; h < width; h += 4 * LANES) {
    const int columns = (width - h) / LANES;
    float* sum = acc + h;
    _tile_loadd(0, sum, row);
    if (columns > 1) _tile_loadd(1, sum + 16, row);
    if (columns > 2) _tile_loadd(2, sum + 32, row);
    if (columns > 3) _tile_loadd(3, sum + 48, row);
    for (int j = 0; j < groups; ++j) {
      const bf16* from = v[j] + 2 * h;
      _tile_loadd(5, p + j * LANES, BLOCK * sizeof(bf16));
#define TANDEM_WEIGH(C)                         \
  do {                                          \
    _tile_loadd(7, from + 2 * C * LANES, row);  \
    _tile_dpbf16ps(C, 5, 7);                    \
  } while (false)
      TANDEM_WEIGH(0);
      if (columns > 1) TANDEM_WEIGH(1);
      if (columns > 2) TANDEM_WEIGH(2);
      if (columns > 3) TANDEM_WEIGH(3);
#undef TANDEM_WEIGH
    }
    _tile_stored(0, sum, row);
    if (columns > 1) _tile_stored(1, sum + 16, row);
    if (columns > 2) _tile_stored(2, sum + 32, row);
    if (columns > 3) _tile_stored(3, sum + 48, row);
  }
  if (next)
    for (int j = 0; j < SUB; ++j)
      for (int i = 0; i < LANES * width; i += 64 / sizeof(bf16)) prefetch(next[j] + i);
}
#endif

// s[r][64] = q[r] · k of one block, for a group of rows.
template <class E>
inline void all_scores(typename E::Registers&, const typename E::A* q, int rows, int head_dim, int groups,
                       const typename E::T* const* k, const typename E::T* const* next_k, size_t k_stride, float* s) {
  for (int n; rows; rows -= n, q += n * head_dim, s += n * BLOCK, next_k = nullptr) {
#define TANDEM_SCORES(R, C) scores<E, R, C>(q, head_dim, k, next_k, k_stride, s)
#define TANDEM_GROUPS(R) \
  n = R, groups == 4 ? TANDEM_SCORES(R, 4) : groups == 3 ? TANDEM_SCORES(R, 3) : groups == 2 ? TANDEM_SCORES(R, 2) : TANDEM_SCORES(R, 1)
    switch (rows) {
      case 1: TANDEM_GROUPS(1); break;
      case 2: TANDEM_GROUPS(2); break;
      case 3: TANDEM_GROUPS(3); break;
      case 4: TANDEM_GROUPS(4); break;
      case 5: TANDEM_GROUPS(5); break;
      default: TANDEM_GROUPS(6);
    }
#undef TANDEM_GROUPS
#undef TANDEM_SCORES
  }
}

// acc[r] += p[r][:keys] v of one block, for a group of rows.
template <class E>
inline void all_weighed(typename E::Registers&, const typename E::A* p, int rows, int width, int keys,
                        const typename E::T* const* v, const typename E::T* const* next_v, float* acc) {
  for (int h = 0; h < width; h += 4 * LANES) {
    const int columns = (width - h) / LANES < 4 ? (width - h) / LANES : 4;
    const typename E::T *values[SUB], *after[SUB];
    for (int j = 0; j < SUB; ++j) values[j] = v[j] + size_t(h) * E::PAIR, after[j] = next_v ? next_v[j] + size_t(h) * E::PAIR : nullptr;
    for (int r = 0; r < rows;) {
      float* out = acc + size_t(r) * width + h;
      const auto* const* next = r == 0 && next_v ? after : nullptr;
      const int left = rows - r;
#define TANDEM_WEIGH(R, C) weigh<E, R, C>(p + r * BLOCK, keys, values, next, width, out)
#define TANDEM_COLUMNS(R) \
  columns == 4 ? TANDEM_WEIGH(R, 4) : columns == 3 ? TANDEM_WEIGH(R, 3) : columns == 2 ? TANDEM_WEIGH(R, 2) : TANDEM_WEIGH(R, 1)
      if (left >= 6) TANDEM_COLUMNS(6), r += 6;
      else if (left >= 4) TANDEM_COLUMNS(4), r += 4;
      else if (left == 3) TANDEM_COLUMNS(3), r += 3;
      else if (left == 2) TANDEM_COLUMNS(2), r += 2;
      else TANDEM_COLUMNS(1), r += 1;
#undef TANDEM_COLUMNS
#undef TANDEM_WEIGH
    }
  }
}

#if TANDEM_TILES
// Both by the matrix unit.
template <>
inline void all_scores<BF16Tiles>(Registers& registers, const bf16* q, int rows, int head_dim, int groups, const bf16* const* k,
                                  const bf16* const* next_k, size_t k_stride, float* s) {
  registers.for_queries(rows);
  score_tile(q, head_dim, groups, k, next_k, k_stride, s);
}

template <>
inline void all_weighed<BF16Tiles>(Registers& registers, const bf16* p, int rows, int width, int keys, const bf16* const* v,
                                   const bf16* const* next_v, float* acc) {
  registers.for_queries(rows);
  weigh_tile(p, padded(keys) / LANES, v, next_v, width, acc);
}
#endif

// A row's probabilities from its scores of one block, C groups of sixteen keys. Keys outside [from, last] count as 0; if WHOLE, none
// is. Without branches between the groups their powers overlap.
template <class E, int C, bool WHOLE>
inline void soften(const float* s, int first, int from, int last, float scale, typename E::A* p, Partial& partial, float* acc,
                   int width) {
  constexpr bool ROUGH = sizeof(typename E::T) == sizeof(bf16);
  I lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  const V low = set1(MASKED);
  V x[C], top = low;
  I seen[C];
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) {
    x[j] = load(s + j * LANES) * scale;
    const I key = lane + (first + j * LANES);
    seen[j] = (I)((key <= last) & (key >= from));
    if (!WHOLE) x[j] = select(seen[j], x[j], low);
    top = max(x[j], top);
  }
  if (any_above(top, set1(partial.peak + SLACK))) {
    const float peak = max(top);
    const V decay = exp2(set1(partial.peak - peak));
    partial.total = partial.total * decay;
    for (int h = 0; h < width; h += LANES) store(acc + h, load(acc + h) * decay);
    partial.peak = peak;
  }
  const V peak = set1(partial.peak);
  V total = partial.total;
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) {
    const V below = x[j] - peak;  // both rounded: however large, the greatest is 0
    V e = ROUGH ? rough_exp2(below) : exp2(below);
    if (!WHOLE) e = select(seen[j], e, V{});
    total = total + put_operands<E>(p + j * LANES, e);  // as rounded, so that the weights add up to one
  }
  partial.total = total;
}

// One block for all rows of a tile, of which the last sees `keys` keys: what lies behind them is not looked at.
template <class E>
inline void attend_block(typename E::Registers& registers, Tile<E>& tile, int rows, int head_dim, const typename E::T* const* k,
                         const typename E::T* const* v, const typename E::T* const* next_k, const typename E::T* const* next_v,
                         size_t k_stride, int first, int keys, int window, float scale, Partial* partials, float* acc) {
  const int width = padded(head_dim), groups = padded(keys) / LANES;
#if TANDEM_TILES
  const bf16* values[SUB];
  if constexpr (E::TILES) {
    std::copy(v, v + SUB, values);
    if (keys % LANES) values[keys / LANES] = written(v[keys / LANES], keys % LANES, width, tile.values);
    v = values;
  }
#endif
  auto score = [&](int row) {
    const int n = rows - row < GROUP<E> ? rows - row : GROUP<E>;
    all_scores<E>(registers, &tile.q[size_t(row) * head_dim], n, head_dim, groups, k, row ? nullptr : next_k, k_stride,
                  tile.s[row / GROUP<E> % 2]);
  };
  score(0);
  for (int row = 0; row < rows; row += GROUP<E>) {
    const int n = rows - row < GROUP<E> ? rows - row : GROUP<E>;
    // The next group's products are on their way while vectors work on this one.
    if (row + n < rows) score(row + n);
    for (int r = 0; r < n; ++r) {
      const int last = tile.position[row + r], from = window ? last - window + 1 : 0;
      const bool whole = last >= first + BLOCK - 1 && from <= first;
      const float* s = tile.s[row / GROUP<E> % 2] + r * BLOCK;
      auto* p = tile.p + r * BLOCK;
      float* sum = acc + size_t(row + r) * width;
#define TANDEM_SOFTEN(C, WHOLE) soften<E, C, WHOLE>(s, first, from, last, scale, p, partials[row + r], sum, width)
      if (whole) TANDEM_SOFTEN(4, true);
      else if (groups == 4) TANDEM_SOFTEN(4, false);
      else if (groups == 3) TANDEM_SOFTEN(3, false);
      else if (groups == 2) TANDEM_SOFTEN(2, false);
      else TANDEM_SOFTEN(1, false);
#undef TANDEM_SOFTEN
    }
    all_weighed<E>(registers, tile.p, n, width, keys, v, row ? nullptr : next_v, acc + size_t(row) * width);
  }
}

// A run of query tokens of one sequence with one key and value head.
struct Run {
  int seq, head, token, count;  // its first token, among all of the step
  int begin, end;               // partitions it sees
  int part;                     // in the shared scratch, if the partitions are shared out
};

template <class E>
class Attention {
 public:
  using T = typename E::T;

  Attention(const Step& step, const Weights& w, const Pages<typename E::Stored>& pages, T* q, int threads)
      : step_(step), w_(w), pages_(pages), q_(q) {
    plan(threads);
  }

  // Threads call this together. q becomes the output.
  void operator()(Member& team) {
    typename E::Registers registers;
    if (!split_) {
      team.share(int(runs_.size()), [&](int i) {
        static thread_local Tile<E> tile;
        const Run& run = runs_[i];
        const int n = run.end - run.begin, rows = run.count * group();
        const Run* after = i + 1 < int(runs_.size()) ? &runs_[i + 1] : nullptr;
        tile.fit(rows, w_.head_dim, n);
        load(tile, run);
        for (int part = 0; part < n; ++part)
          partition(registers, tile, run, run.begin + part, after, &tile.partials[size_t(part) * rows],
                    &tile.acc[size_t(part) * rows * padded(w_.head_dim)]);
        merge(run, n, tile.partials.data(), tile.acc.data());
      });
      return;
    }
    team.share(int(work_.size()), [&](int i) {
      static thread_local Tile<E> tile;
      const Run& run = runs_[work_[i].first];
      tile.fit(run.count * group(), w_.head_dim, 1);
      load(tile, run);
      const size_t at = size_t(run.part) + size_t(work_[i].second) * run.count * group();
      partition(registers, tile, run, run.begin + work_[i].second, nullptr, &partials_[at], &acc_[at * padded(w_.head_dim)]);
    });
    team.barrier();
    team.share(int(runs_.size()), [&](int i) {
      const Run& run = runs_[i];
      merge(run, run.end - run.begin, &partials_[run.part], &acc_[size_t(run.part) * padded(w_.head_dim)]);
    });
  }

 private:
  int group() const { return w_.heads / w_.kv_heads; }

  void plan(int threads) {
    const int most = w_.head_dim > 128 ? 32 : E::TILES ? 96 : 48, count = most / group() > 1 ? most / group() : 1;
    for (int s = 0; s < step_.seqs; ++s) {
      const int first = step_.query_starts[s], stop = step_.query_starts[s + 1];
      for (int token = first; token < stop; token += count) {
        const int n = token + count < stop ? count : stop - token;
        const int low = w_.window ? step_.positions[token] - w_.window + 1 : 0;
        const int begin = (low > 0 ? low : 0) / PARTITION, end = step_.positions[token + n - 1] / PARTITION + 1;
        for (int head = 0; head < w_.kv_heads; ++head) runs_.push_back({s, head, token, n, begin, end, 0});
      }
    }
    // Few runs leave threads idle at the end: then their partitions are shared out instead.
    bool divisible = false;
    for (const Run& run : runs_) divisible |= run.end - run.begin > 1;
    split_ = divisible && threads > 1 && int(runs_.size()) < 4 * threads;
    if (!split_) return;
    size_t parts = 0;
    for (size_t i = 0; i < runs_.size(); ++i) {
      Run& run = runs_[i];
      run.part = int(parts);
      for (int part = 0; part < run.end - run.begin; ++part) work_.push_back({int(i), part});
      parts += size_t(run.end - run.begin) * run.count * group();
    }
    partials_.resize(parts);
    acc_.resize(parts * padded(w_.head_dim));
  }

  void load(Tile<E>& tile, const Run& run) {
    const int Q = group(), H = w_.head_dim;
    for (int t = 0; t < run.count; ++t)
      for (int g = 0; g < Q; ++g) {
        operands<E>(q_ + (size_t(run.token + t) * w_.heads + run.head * Q + g) * H, H, &tile.q[size_t(t * Q + g) * H]);
        tile.position[t * Q + g] = step_.positions[run.token + t];
      }
  }

  // The first key that a run looks at, in whole blocks, and its last.
  int first_of(const Run& run) const {
    const int low = w_.window ? step_.positions[run.token] - w_.window + 1 : 0;
    return low > 0 ? low / BLOCK * BLOCK : 0;
  }
  int last_of(const Run& run) const { return step_.positions[run.token + run.count - 1]; }

  // Where the keys and values of a block lie. Beyond the sequence's end any page will do: what it holds is masked.
  void find(const Run& run, int first, const T** k, const T** v) const {
    const int length = step_.kv_lengths[run.seq], B = pages_.page;
    const int32_t* table = step_.page_table + size_t(run.seq) * step_.pages;
    for (int j = 0; j < SUB; ++j) {
      const int key = first + j * LANES, id = key < length ? table[key / B] : 0;
      k[j] = pages_.keys(run.head, id, key < length ? key % B : 0);
      v[j] = pages_.values(run.head, id, key < length ? key % B : 0);
    }
  }

  // `after`: the run that this thread is likely to come to next.
  void partition(typename E::Registers& registers, Tile<E>& tile, const Run& run, int part, const Run* after, Partial* partials,
                 float* acc) {
    const int rows = run.count * group(), H = w_.head_dim;
    for (int r = 0; r < rows; ++r) partials[r] = {MASKED, V{}};
    std::memset(acc, 0, sizeof(float) * rows * padded(H));
    const int last = last_of(run), own = first_of(run), begin = own > part * PARTITION ? own : part * PARTITION;
    const int end = last + 1 < (part + 1) * PARTITION ? last + 1 : (part + 1) * PARTITION;
    const T *k[SUB], *v[SUB], *next_k[SUB], *next_v[SUB];
    for (int first = begin; first < end; first += BLOCK) {
      find(run, first, k, v);
      // What comes AHEAD blocks later is fetched meanwhile: of this run, be it in the next partition, or of the run after it.
      const int soon = first + AHEAD * BLOCK;
      const bool more = soon <= last;
      const int then = more || !after ? 0 : soon - (last / BLOCK + 1) * BLOCK + first_of(*after);
      const bool other = !more && after && then <= last_of(*after);
      if (more) find(run, soon, next_k, next_v);
      else if (other) find(*after, then, next_k, next_v);
      const int keys = last + 1 - first < BLOCK ? last + 1 - first : BLOCK;
      attend_block<E>(registers, tile, rows, H, k, v, more || other ? next_k : nullptr, more || other ? next_v : nullptr,
                      size_t(pages_.page) * E::PAIR, first, keys, w_.window, w_.attention_scale * LOG2E, partials, acc);
    }
  }

  // The partitions' sums, each weighed by how far its maximum is below the highest, gathered in the first of them.
  void merge(const Run& run, int parts, const Partial* partials, float* acc) {
    const int Q = group(), H = w_.head_dim, width = padded(H), rows = run.count * Q;
    for (int r = 0; r < rows; ++r) {
      float peak = MASKED, total = 0;
      for (int part = 0; part < parts; ++part) peak = std::fmax(peak, partials[size_t(part) * rows + r].peak);
      float* x = acc + size_t(r) * width;
      for (int part = 0; part < parts; ++part) {
        const Partial& one = partials[size_t(part) * rows + r];
        const V weight = exp2(set1(one.peak - peak));
        total += weight[0] * sum(one.total);
        const float* from = acc + (size_t(part) * rows + r) * width;
        for (int h = 0; h < H; h += LANES) {
          const V before = part ? tandem::load(x + h) : V{};
          store(x + h, fma(weight, tandem::load(from + h), before));
        }
      }
      T* out = q_ + (size_t(run.token + r / Q) * w_.heads + run.head * Q + r % Q) * H;
      const V share = set1(1.0f / total);
      for (int h = 0; h < H; h += LANES) tandem::put<E>(out + h, tandem::load(x + h) * share, H - h < LANES ? H - h : LANES);
    }
  }

  const Step& step_;
  const Weights& w_;
  const Pages<typename E::Stored>& pages_;
  T* q_;
  bool split_ = false;
  std::vector<Run> runs_;
  std::vector<std::pair<int, int>> work_;
  Buffer<Partial> partials_;
  Buffer<float> acc_;
};

}  // namespace tandem
