// The operators on untyped views, checked: what the bindings call. Each returns nullptr, or what is wrong with its arguments.
#pragma once

#include "model.h"
#include "sample.h"

namespace tandem {

struct View {
  void* data;
  int itemsize, rank;
  const int64_t* dims;

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
  bool holds(int item, int64_t n) const { return itemsize == item && size() >= n; }
};

// The words of a step that its header promises, or 0 if it makes no sense.
inline int64_t words(const View& step) {
  const auto* p = (const int32_t*)step.data;
  if (step.itemsize != 4 || step.size() < Step::HEADER) return 0;
  for (int i = 0; i < Step::HEADER; ++i)
    if (p[i] < 0) return 0;
  const int64_t T = p[0], S = p[1], R = p[2], P = p[3], F = p[4];
  return Step::HEADER + 3 * T + 2 * S + 1 + S * P + 2 * F + 2 * R + (p[5] ? 3 * R : 0) + (p[6] ? 3 * R : 0);
}

inline const char* check(const View& step, const View& weights) {
  const int64_t n = words(step);
  if (!n || step.size() < n) return "step is not what step.py packs";
  const auto* w = (const Weights*)weights.data;
  if (weights.itemsize != 1 || weights.size() < int64_t(sizeof(Weights)) || w->magic != Weights::MAGIC || w->bytes != weights.size())
    return "weights are not what pack.py packs";
  const Step s((const int32_t*)step.data);
  if (s.query_starts[0] != 0 || s.query_starts[s.seqs] != s.tokens) return "the sequences of the step do not cover its tokens";
  for (int i = 0; i < s.seqs; ++i) {
    const int first = s.query_starts[i], stop = s.query_starts[i + 1];
    if (first >= stop || stop > s.tokens) return "the sequences of the step are out of order";
    if (s.positions[first] < 0 || s.positions[stop - 1] >= s.kv_lengths[i]) return "a position lies outside its sequence";
  }
  for (int r = 0; r < s.rows; ++r)
    if (s.logit_rows[r] < 0 || s.logit_rows[r] >= s.tokens) return "a logit row lies outside the step";
  return nullptr;
}

// How many threads compute from the next operator on. Not while one runs: it has sized its scratch by their number.
inline void threads(int count) {
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  Pool::get().resize(count);
}

template <class F>
inline void typed(const Weights& w, F&& f) {
  if (w.itemsize == 2) f(BF16{});
  else f(F32{});
}

// K as [K, pages, H / PAIR, B, PAIR], V as [K, pages, B / PAIR, H', PAIR].
inline const char* check_pages(const Weights& w, const View& k, const View& v) {
  if (!w.qkv) return "weights are the head's, and a layer's were expected";
  const int64_t G = 4 / w.itemsize;
  if (k.rank != 5 || v.rank != 5 || k.itemsize != w.itemsize || v.itemsize != w.itemsize) return "pages have the wrong type or rank";
  const int64_t B = k.dims[3];
  if (k.dims[0] != w.kv_heads || k.dims[2] != w.head_dim / G || k.dims[4] != G || B % LANES) return "k has the wrong shape";
  if (v.dims[0] != w.kv_heads || v.dims[1] != k.dims[1] || v.dims[2] != B / G || v.dims[3] != padded(w.head_dim) || v.dims[4] != G)
    return "v has the wrong shape";
  return nullptr;
}

template <class E>
inline Pages<E> pages_of(const Weights& w, const View& k, const View& v) {
  using T = typename E::T;
  return {(T*)k.data, (T*)v.data, w.kv_heads, int(k.dims[1]), int(k.dims[3]), w.head_dim};
}

inline const char* embed(const View& step, const View& weights, const View& last_tokens, const View& x) {
  if (const char* wrong = check(step, weights)) return wrong;
  const Step s((const int32_t*)step.data);
  const Weights& w = *(const Weights*)weights.data;
  if (last_tokens.itemsize != 4 || !x.holds(4, int64_t(s.tokens) * w.inputs)) return "last_tokens or x has the wrong type or size";
  if (!w.head) return "weights are a layer's, and the head's were expected";
  for (int t = 0; t < s.tokens; ++t)
    if (s.token_ids[t] < 0 || s.token_ids[t] >= w.vocab) return "a token id lies outside the vocabulary";
  for (int i = 0; i < s.fills; ++i) {
    if (s.fill_at[i] < 0 || s.fill_at[i] >= s.tokens || s.fill_row[i] < 0 || s.fill_row[i] >= last_tokens.size())
      return "a token to fill in lies outside the step, or its row outside last_tokens";
    const int32_t token = ((const int32_t*)last_tokens.data)[s.fill_row[i]];
    if (token < 0 || token >= w.vocab) return "a last token lies outside the vocabulary";
  }
  typed(w, [&](auto e) { embed<decltype(e)>(s, w, (const int32_t*)last_tokens.data, (float*)x.data); });
  return nullptr;
}

// What a layer reads and writes besides its weights.
inline const char* check_project(const Step& s, const Weights& w, const View& rope, const View& x, const View& k, const View& v,
                                 const View& q) {
  if (const char* wrong = check_pages(w, k, v)) return wrong;
  if (rope.itemsize != 4 || rope.rank != 2 || rope.dims[1] != w.head_dim) return "rope has the wrong type or shape";
  if (!x.holds(4, int64_t(s.tokens) * w.inputs)) return "x has the wrong type or size";
  if (!q.holds(w.itemsize, int64_t(s.tokens) * w.heads * w.head_dim)) return "q has the wrong type or size";
  for (int t = 0; t < s.tokens; ++t) {
    if (s.slots[t] < 0 || s.slots[t] >= k.dims[1] * k.dims[3]) return "a slot lies outside the pages";
    if (s.positions[t] < 0 || s.positions[t] >= rope.dims[0]) return "a position lies outside the rotary table";
  }
  return nullptr;
}

inline const char* check_attend(const Step& s, const Weights& w, const View& k, const View& v, const View& q) {
  if (const char* wrong = check_pages(w, k, v)) return wrong;
  if (!q.holds(w.itemsize, int64_t(s.tokens) * w.heads * w.head_dim)) return "q has the wrong type or size";
  // Every layer looks at the whole table: no branch in the loop, so that it is a few hundred instructions.
  uint32_t most = 0;
  for (int i = 0; i < s.seqs * s.pages; ++i) most = uint32_t(s.page_table[i]) > most ? uint32_t(s.page_table[i]) : most;
  if (int64_t(most) >= k.dims[1]) return "a page of the table lies outside the pool";
  for (int i = 0; i < s.seqs; ++i)
    if (s.kv_lengths[i] > int64_t(s.pages) * k.dims[3]) return "a sequence is longer than its row of the page table";
  return nullptr;
}

inline const char* layer(const View& step, const View& weights, const View& rope, const View& k, const View& v, const View& q,
                         const View& x) {
  if (const char* wrong = check(step, weights)) return wrong;
  const Step s((const int32_t*)step.data);
  const Weights& w = *(const Weights*)weights.data;
  if (const char* wrong = check_project(s, w, rope, x, k, v, q)) return wrong;
  if (const char* wrong = check_attend(s, w, k, v, q)) return wrong;
  typed(w, [&](auto e) {
    using E = decltype(e);
    layer<E>(s, w, (const float*)rope.data, pages_of<E>(w, k, v), (typename E::T*)q.data, (float*)x.data);
  });
  return nullptr;
}

inline const char* project(const View& step, const View& weights, const View& rope, const View& x, const View& k, const View& v,
                           const View& q) {
  if (const char* wrong = check(step, weights)) return wrong;
  const Step s((const int32_t*)step.data);
  const Weights& w = *(const Weights*)weights.data;
  if (const char* wrong = check_project(s, w, rope, x, k, v, q)) return wrong;
  typed(w, [&](auto e) {
    using E = decltype(e);
    project<E>(s, w, (const float*)rope.data, pages_of<E>(w, k, v), (const float*)x.data, (typename E::T*)q.data);
  });
  return nullptr;
}

inline const char* attend(const View& step, const View& weights, const View& k, const View& v, const View& q) {
  if (const char* wrong = check(step, weights)) return wrong;
  const Step s((const int32_t*)step.data);
  const Weights& w = *(const Weights*)weights.data;
  if (const char* wrong = check_attend(s, w, k, v, q)) return wrong;
  typed(w, [&](auto e) {
    using E = decltype(e);
    attend<E>(s, w, pages_of<E>(w, k, v), (typename E::T*)q.data);
  });
  return nullptr;
}

inline const char* combine(const View& step, const View& weights, const View& attended, const View& x) {
  if (const char* wrong = check(step, weights)) return wrong;
  const Step s((const int32_t*)step.data);
  const Weights& w = *(const Weights*)weights.data;
  if (!x.holds(4, int64_t(s.tokens) * w.inputs)) return "x has the wrong type or size";
  if (!w.qkv) return "weights are the head's, and a layer's were expected";
  if (!attended.holds(w.itemsize, int64_t(s.tokens) * w.heads * w.head_dim)) return "attended has the wrong type or size";
  typed(w, [&](auto e) {
    using E = decltype(e);
    combine<E>(s, w, (const typename E::T*)attended.data, (float*)x.data);
  });
  return nullptr;
}

inline const char* head(const View& step, const View& weights, const View& x, const View& logits) {
  if (const char* wrong = check(step, weights)) return wrong;
  const Step s((const int32_t*)step.data);
  const Weights& w = *(const Weights*)weights.data;
  if (!w.head) return "weights are a layer's, and the head's were expected";
  if (!x.holds(4, int64_t(s.tokens) * w.inputs)) return "x has the wrong type or size";
  if (logits.rank != 2 || logits.dims[1] != w.vocab || !logits.holds(4, int64_t(s.rows) * w.vocab))
    return "logits have the wrong type or shape";
  typed(w, [&](auto e) { head<decltype(e)>(s, w, (const float*)x.data, (float*)logits.data); });
  return nullptr;
}

// sampled[R] of struct Sampled, as int32 words; each row's token also becomes the last one of its permanent row.
inline const char* sample(const View& step, const View& logits, const View& last_tokens, const View& sampled) {
  const int64_t n = words(step);
  if (!n || step.size() < n) return "step is not what step.py packs";
  const Step s((const int32_t*)step.data);
  if (logits.rank != 2 || logits.itemsize != 4 || logits.dims[0] < s.rows || logits.dims[1] < 1) return "logits have the wrong type or shape";
  if (last_tokens.itemsize != 4) return "last_tokens have the wrong type";
  for (int r = 0; r < s.rows; ++r)
    if (s.logit_rows[r] < 0 || s.logit_rows[r] >= s.tokens) return "a logit row lies outside the step";
  if (!sampled.holds(4, int64_t(s.rows) * int64_t(sizeof(Sampled) / 4))) return "sampled has the wrong type or size";
  for (int r = 0; r < s.rows; ++r)
    if (s.row[r] < 0 || s.row[r] >= last_tokens.size()) return "a permanent row lies outside last_tokens";
  const int vocab = int(logits.dims[1]);
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  const int size = padded(vocab);
  float* scratch = Scratch::get().take<float>(1, s.sampled ? size_t(Pool::get().wanted()) * size : 0);
  Pool::get().run([&](Member& team) {
    team.share(s.rows, [&](int r) {
      SampleParams p{};
      p.position = s.positions[s.logit_rows[r]] + 1;
      p.sampled = s.sampled && s.temperature[r] > 0, p.filtered = p.sampled && s.filtered, p.logprobs = s.logprobs;
      if (p.sampled) p.seed[0] = s.seeds[2 * r], p.seed[1] = s.seeds[2 * r + 1], p.temperature = s.temperature[r];
      p.top_p = p.filtered ? s.top_p[r] : 1.0f, p.min_p = p.filtered ? s.min_p[r] : 0.0f, p.top_k = p.filtered ? s.top_k[r] : 0;
      Sampled& out = ((Sampled*)sampled.data)[r];
      sample_row((const float*)logits.data + size_t(r) * vocab, vocab, p, p.sampled ? scratch + size_t(team.id) * size : nullptr, out);
      ((int32_t*)last_tokens.data)[s.row[r]] = out.token;
    });
  });
  return nullptr;
}

}  // namespace tandem
