// The operators on untyped views, checked: what the bindings call. Each throws std::invalid_argument, which says what was expected
// and what came, before it writes anything.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "model.h"
#include "sample.h"
#include "sums.h"

namespace tandem {

struct View {
  void* data;
  std::string_view type;  // "float32", "bfloat16", "int32", "uint8", or another's name
  int rank;
  const int64_t* dims;

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dims[i];
    return n;
  }
};

[[noreturn]] inline void refuse(const std::string& why) { throw std::invalid_argument(why); }

constexpr int64_t ANY = -1;

// "float32[3, 4]"; a size that may be anything is "*".
inline std::string describe(std::string_view type, const int64_t* dims, size_t rank) {
  std::string text = std::string(type) + "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + (dims[i] == ANY ? "*" : std::to_string(dims[i]));
  return text + "]";
}

// `size` elements or more: arguments have room for the largest step.
inline void expect(const char* name, const View& v, std::string_view type, int64_t size) {
  if (v.type != type || v.size() < size)
    refuse(std::string(name) + ": expected " + std::string(type) + " of at least " + std::to_string(size) + " elements, got " +
           describe(v.type, v.dims, v.rank));
}

inline void expect(const char* name, const View& v, std::string_view type, std::initializer_list<int64_t> dims) {
  bool right = v.type == type && size_t(v.rank) == dims.size();
  for (size_t i = 0; right && i < dims.size(); ++i) right = dims.begin()[i] == ANY || dims.begin()[i] == v.dims[i];
  if (!right)
    refuse(std::string(name) + ": expected " + describe(type, dims.begin(), dims.size()) + ", got " +
           describe(v.type, v.dims, v.rank));
}

inline Step read_step(const View& step) {
  expect("step", step, "int32", Step::HEADER);
  const auto* p = (const int32_t*)step.data;
  for (int i = 0; i < Step::HEADER; ++i)
    if (p[i] < 0) refuse("step: expected the counts that step.py packs, got " + std::to_string(p[i]));
  const int64_t T = p[0], S = p[1], R = p[2], P = p[3], F = p[4];
  const int64_t arrays = 3 * T + 2 * S + 1 + S * P + 2 * F + 2 * R + (p[5] ? 3 * R : 0) + (p[6] ? 3 * R : 0) + (p[7] > 1 ? R : 0);
  expect("step", step, "int32", Step::HEADER + arrays);
  const Step s(p);
  if (s.query_starts[0] != 0 || s.query_starts[s.seqs] != s.tokens) refuse("the sequences of the step do not cover its tokens");
  for (int i = 0; i < s.seqs; ++i) {
    const int first = s.query_starts[i], stop = s.query_starts[i + 1];
    if (first >= stop || stop > s.tokens) refuse("the sequences of the step are out of order");
    if (s.positions[first] < 0 || s.positions[stop - 1] >= s.kv_lengths[i]) refuse("a position lies outside its sequence");
    bool gap = false;
    for (int t = first + 1; t < stop; ++t) gap |= s.positions[t] != s.positions[t - 1] + 1;
    if (gap) refuse("the positions of a sequence do not follow each other");
  }
  for (int r = 0; r < s.rows; ++r)
    if (s.logit_rows[r] < 0 || s.logit_rows[r] >= s.tokens) refuse("a logit row lies outside the step");
  return s;
}

inline const Weights& read_weights(const View& weights) {
  expect("weights", weights, "uint8", int64_t(sizeof(Weights)));
  const auto& w = *(const Weights*)weights.data;
  if (w.magic != Weights::MAGIC || w.bytes != weights.size() || (w.itemsize != 2 && w.itemsize != 4))
    refuse("weights: expected the buffer that pack.py packs, got other bytes");
  return w;
}

// One of the layers in uint8[L, n].
inline const Weights& read_layer(const View& weights, int64_t layer) {
  expect("weights", weights, "uint8", {ANY, ANY});
  if (layer < 0 || layer >= weights.dims[0])
    refuse("layer: expected one of " + std::to_string(weights.dims[0]) + ", got " + std::to_string(layer));
  const int64_t size = weights.dims[1];
  const Weights& w = read_weights({(char*)weights.data + layer * size, weights.type, 1, &size});
  if (!w.qkv) refuse("weights are the head's, and a layer's were expected");
  return w;
}

inline const Weights& read_head(const View& weights) {
  const Weights& w = read_weights(weights);
  if (!w.head) refuse("weights are a layer's, and the head's were expected");
  return w;
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

inline std::string_view element(const Weights& w) { return w.itemsize == 2 ? "bfloat16" : "float32"; }

// Pools of all layers, one after another: K as [L K, pages, H / PAIR, B, PAIR], V as [L K, pages, B / PAIR, H', PAIR].
inline void check_pages(const Weights& w, int64_t layers, const View& k, const View& v) {
  const int64_t G = 4 / w.itemsize;
  expect("k", k, element(w), {layers * w.kv_heads, ANY, w.head_dim / G, ANY, G});
  const int64_t B = k.dims[3];
  if (B % LANES) refuse("k: expected pages of a multiple of " + std::to_string(LANES) + " tokens, got " + std::to_string(B));
  expect("v", v, element(w), {layers * w.kv_heads, k.dims[1], B / G, padded(w.head_dim), G});
}

inline void check_q(const Step& s, const Weights& w, const View& q) {
  expect("q", q, element(w), int64_t(s.tokens) * w.heads * w.head_dim);
}

inline void check_x(const Step& s, const Weights& w, const View& x) { expect("x", x, "float32", int64_t(s.tokens) * w.inputs); }

// One layer's pages.
template <class E>
inline Pages<E> pages_of(const Weights& w, const View& k, const View& v, int64_t layer) {
  using T = typename E::T;
  const Pages<E> first{(T*)k.data, (T*)v.data, w.kv_heads, int(k.dims[1]), int(k.dims[3]), w.head_dim};
  const int head = int(layer) * w.kv_heads;
  return {first.keys(head, 0, 0), first.values(head, 0, 0), w.kv_heads, first.pages, first.page, w.head_dim};
}

// The table that a layer turns by, of ropes[tables, positions, H].
inline const float* rope_of(const Weights& w, const View& ropes) {
  return (const float*)ropes.data + w.rope * ropes.dims[1] * ropes.dims[2];
}

inline void embed(const View& step, const View& weights, const View& last_tokens, const View& x) {
  const Step s = read_step(step);
  const Weights& w = read_head(weights);
  expect("last_tokens", last_tokens, "int32", {ANY});
  check_x(s, w, x);
  for (int t = 0; t < s.tokens; ++t)
    if (s.token_ids[t] < 0 || s.token_ids[t] >= w.all_tokens) refuse("a token id lies outside the vocabulary");
  for (int i = 0; i < s.fills; ++i) {
    if (s.fill_at[i] < 0 || s.fill_at[i] >= s.tokens || s.fill_row[i] < 0 || s.fill_row[i] >= last_tokens.size())
      refuse("a token to fill in lies outside the step, or its row outside last_tokens");
    const int32_t token = ((const int32_t*)last_tokens.data)[s.fill_row[i]];
    if (token < 0 || token >= w.all_tokens) refuse("a last token lies outside the vocabulary");
  }
  typed(w, [&](auto e) { embed<decltype(e)>(s, w, (const int32_t*)last_tokens.data, (float*)x.data); });
}

// What a layer reads and writes besides its weights.
inline void check_project(const Step& s, const Weights& w, int64_t layers, const View& ropes, const View& x, const View& k,
                          const View& v) {
  check_pages(w, layers, k, v);
  expect("ropes", ropes, "float32", {ANY, ANY, w.head_dim});
  if (w.rope < 0 || w.rope >= ropes.dims[0]) refuse("ropes: expected the table that the layer turns by, got fewer");
  check_x(s, w, x);
}

// Where its tokens are, in pages and tables that all layers have alike.
inline void check_tokens(const Step& s, const View& ropes, const View& k) {
  for (int t = 0; t < s.tokens; ++t) {
    if (s.slots[t] < 0 || s.slots[t] >= k.dims[1] * k.dims[3]) refuse("a slot lies outside the pages");
    if (s.positions[t] < 0 || s.positions[t] >= ropes.dims[1]) refuse("a position lies outside the rotary table");
  }
}

inline void check_attend(const Step& s, const Weights& w, int64_t layers, const View& k, const View& v) {
  check_pages(w, layers, k, v);
  // No branch in the loop, so that it is a few hundred instructions.
  uint32_t most = 0;
  for (int i = 0; i < s.seqs * s.pages; ++i) most = uint32_t(s.page_table[i]) > most ? uint32_t(s.page_table[i]) : most;
  if (int64_t(most) >= k.dims[1]) refuse("a page of the table lies outside the pool");
  for (int i = 0; i < s.seqs; ++i)
    if (s.kv_lengths[i] > int64_t(s.pages) * k.dims[3]) refuse("a sequence is longer than its row of the page table");
}

inline const Weights& check_layers(const Step& s, const View& weights, const View& ropes, const View& k, const View& v,
                                   const View& x) {
  const Weights& first = read_layer(weights, 0);
  const int64_t L = weights.dims[0];
  for (int64_t i = 0; i < L; ++i) {
    const Weights& w = read_layer(weights, i);
    if (w.itemsize != first.itemsize) refuse("weights: expected all layers in one type, got two");
    check_project(s, w, L, ropes, x, k, v);
  }
  check_tokens(s, ropes, k);
  check_attend(s, first, L, k, v);
  return first;
}

inline void layers(const View& step, const View& weights, const View& ropes, const View& k, const View& v, const View& x) {
  const Step s = read_step(step);
  const int64_t L = weights.dims[0];
  typed(check_layers(s, weights, ropes, k, v, x), [&](auto e) {
    using E = decltype(e);
    for (int64_t i = 0; i < L; ++i) {
      const Weights& w = read_layer(weights, i);
      const Weights* next = i + 1 < L ? &read_layer(weights, i + 1) : nullptr;
      layer<E>(s, w, rope_of(w, ropes), pages_of<E>(w, k, v, i), (float*)x.data, next);
    }
  });
}

// `layers` of a model that ranks share out, each of which calls this: what attention gives and what the MLP gives are sums of
// every rank's terms, which are added to the stream once they are whole. `memory` is what the ranks meet in. x is undefined unless
// all were told.
inline Told layers_in_terms(const View& step, const View& weights, const View& ropes, const View& k, const View& v, const View& x,
                            const View& memory, int64_t rank, int64_t ranks) {
  const Step s = read_step(step);
  const int64_t L = weights.dims[0];
  const Weights& first = check_layers(s, weights, ropes, k, v, x);
  if (ranks < 1 || ranks > Meeting::MOST || rank < 0 || rank >= ranks)
    refuse("rank: expected one of " + std::to_string(ranks) + ", got " + std::to_string(rank));
  if (ranks > 1) expect("memory", memory, "uint8", {int64_t(Meeting::size(int(ranks)))});
  const Exchange exchange(memory.data, int(rank), int(ranks));
  const size_t size = size_t(s.tokens) * first.inputs;
  float* stream = (float*)x.data;
  Buffer<float> whole;  // a term or a sum that may not lie where other ranks read
  auto own = [&] { return whole.resize(size), whole.data(); };

  auto branch = [&](const Weights& w, int64_t norm, const void* next, auto&& compute) {
    float* term = (float*)exchange.room(size * sizeof(float));
    if (!term) term = own();
    compute(term);
    const FloatMode mode;
    if (!norm) {
      auto use = [&](size_t i, int n, V sum) { store(stream + i, load(stream + i, n) + sum, n); };
      return exchange.sum<F32>(term, size, use, next, Pool::FETCH);
    }
    float* sums = own();
    const Told told = exchange.sum<F32>(term, size, [&](size_t i, int n, V sum) { store(sums + i, sum, n); }, next, Pool::FETCH);
    if (told == Told::ALL) add(s, w, sums, norm, stream);
    return told;
  };

  Told told = Told::ALL;
  typed(first, [&](auto e) {
    using E = decltype(e);
    for (int64_t i = 0; i < L && told == Told::ALL; ++i) {
      const Weights& w = read_layer(weights, i);
      const Weights* next = i + 1 < L ? &read_layer(weights, i + 1) : nullptr;
      told = branch(w, w.post_attention_norm, w.matrix<char>(w.gate_up), [&](float* term) {
        attention_term<E>(s, w, rope_of(w, ropes), pages_of<E>(w, k, v, i), stream, term);
      });
      if (told != Told::ALL) return;
      told = branch(w, w.post_mlp_norm, next ? next->template matrix<char>(next->qkv) : nullptr,
                    [&](float* term) { mlp_term<E>(s, w, stream, term); });
    }
  });
  return told;
}

inline void project(const View& step, const View& weights, const View& ropes, const View& x, const View& k, const View& v,
                    const View& q, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_project(s, w, weights.dims[0], ropes, x, k, v);
  check_tokens(s, ropes, k);
  check_q(s, w, q);
  typed(w, [&](auto e) {
    using E = decltype(e);
    project<E>(s, w, rope_of(w, ropes), pages_of<E>(w, k, v, layer), (const float*)x.data, (typename E::T*)q.data);
  });
}

inline void attend(const View& step, const View& weights, const View& k, const View& v, const View& q, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_attend(s, w, weights.dims[0], k, v);
  check_q(s, w, q);
  typed(w, [&](auto e) {
    using E = decltype(e);
    attend<E>(s, w, pages_of<E>(w, k, v, layer), (typename E::T*)q.data);
  });
}

inline void combine(const View& step, const View& weights, const View& attended, const View& x, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_x(s, w, x);
  expect("attended", attended, element(w), int64_t(s.tokens) * w.heads * w.head_dim);
  typed(w, [&](auto e) {
    using E = decltype(e);
    combine<E>(s, w, (const typename E::T*)attended.data, (float*)x.data);
  });
}

inline void attention_term(const View& step, const View& weights, const View& ropes, const View& x, const View& k, const View& v,
                           const View& term, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_project(s, w, weights.dims[0], ropes, x, k, v);
  check_tokens(s, ropes, k);
  check_attend(s, w, weights.dims[0], k, v);
  check_x(s, w, term);
  typed(w, [&](auto e) {
    using E = decltype(e);
    attention_term<E>(s, w, rope_of(w, ropes), pages_of<E>(w, k, v, layer), (const float*)x.data, (float*)term.data);
  });
}

inline void mlp_term(const View& step, const View& weights, const View& x, const View& term, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_x(s, w, x);
  check_x(s, w, term);
  typed(w, [&](auto e) { mlp_term<decltype(e)>(s, w, (float*)x.data, (float*)term.data); });
}

// To x, the sum over ranks of the terms of a layer's branch.
inline void add_attention(const View& step, const View& weights, const View& sum, const View& x, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_x(s, w, sum);
  check_x(s, w, x);
  add(s, w, (const float*)sum.data, w.post_attention_norm, (float*)x.data);
}

inline void add_mlp(const View& step, const View& weights, const View& sum, const View& x, int64_t layer) {
  const Step s = read_step(step);
  const Weights& w = read_layer(weights, layer);
  check_x(s, w, sum);
  check_x(s, w, x);
  add(s, w, (const float*)sum.data, w.post_mlp_norm, (float*)x.data);
}

inline void head(const View& step, const View& weights, const View& x, const View& logits) {
  const Step s = read_step(step);
  const Weights& w = read_head(weights);
  check_x(s, w, x);
  expect("logits", logits, "float32", {ANY, w.vocab});
  expect("logits", logits, "float32", int64_t(s.rows) * w.vocab);
  typed(w, [&](auto e) { head<decltype(e)>(s, w, (const float*)x.data, (float*)logits.data); });
}

inline Changes read_changes(const View& changes, const Step& s, int64_t vocab) {
  expect("changes", changes, "int32", Changes::HEADER);
  const auto* p = (const int32_t*)changes.data;
  const int64_t E = p[0], M = p[1], W = p[2];
  if (E < 0 || M < 0 || W != (M ? (vocab + 31) / 32 : 0)) refuse("changes: expected the counts that step.py packs, got others");
  expect("changes", changes, "int32", Changes::HEADER + 5 * E + M * (1 + W));
  const Changes c(p);
  for (int i = 0; i < c.edits; ++i) {
    if (c.edit_rows[i] < (i ? c.edit_rows[i - 1] : 0) || c.edit_rows[i] >= s.rows)
      refuse("a row to edit lies outside the step or its order");
    if (c.edit_ids[i] < 0 || c.edit_ids[i] >= vocab) refuse("a token to edit lies outside the vocabulary");
  }
  for (int i = 0; i < c.masks; ++i)
    if (c.mask_rows[i] < 0 || c.mask_rows[i] >= s.rows) refuse("a row to mask lies outside the step");
  return c;
}

// changed[R, V]: logits, first with -inf where a mask of their row has no bit, then edited.
inline void adjust(const View& step, const View& changes, const View& logits, const View& changed) {
  const Step s = read_step(step);
  expect("logits", logits, "float32", {ANY, ANY});
  expect("changed", changed, "float32", {logits.dims[0], logits.dims[1]});
  if (logits.dims[0] < s.rows) refuse("logits: expected a row for each of the step, got fewer");
  const int64_t vocab = logits.dims[1];
  const Changes c = read_changes(changes, s, vocab);
  Pool::get().run([&](Member& team) {
    team.share(s.rows, [&](int r) {
      float* x = (float*)changed.data + r * vocab;
      std::memcpy(x, (const float*)logits.data + r * vocab, vocab * sizeof(float));
      for (int i = 0; i < c.masks; ++i)
        if (c.mask_rows[i] == r) sampling::mask_row(x, int(vocab), c.bits + size_t(i) * c.words);
      const int first = int(std::lower_bound(c.edit_rows, c.edit_rows + c.edits, r) - c.edit_rows);
      for (int i = first; i < c.edits && c.edit_rows[i] == r; ++i)
        x[c.edit_ids[i]] = sampling::edited(x[c.edit_ids[i]], c.values + 3 * i);
    });
  });
}

// sampled[R] of struct Sampled, as int32 words; each row's token also becomes the last one of its permanent row.
inline void sample(const View& step, const View& logits, const View& changed, const View& last_tokens, const View& sampled) {
  const Step s = read_step(step);
  expect("logits", logits, "float32", {ANY, ANY});
  if (logits.dims[0] < s.rows || logits.dims[1] < 1)
    refuse("logits: expected " + std::to_string(s.rows) + " rows or more, got " + describe(logits.type, logits.dims, 2));
  expect("changed", changed, "float32", {logits.dims[0], logits.dims[1]});
  expect("last_tokens", last_tokens, "int32", {ANY});
  expect("sampled", sampled, "int32", int64_t(s.rows) * int64_t(sizeof(Sampled) / 4));
  for (int r = 0; r < s.rows; ++r)
    if (s.row[r] < 0 || s.row[r] >= last_tokens.size()) refuse("a permanent row lies outside last_tokens");
  const int vocab = int(logits.dims[1]);
  for (int r = 0; s.score_ids && r < s.rows; ++r)
    if (s.score_ids[r] >= vocab) refuse("a token to score lies outside the vocabulary");
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  const int size = padded(vocab);
  float* scratch = Scratch::get().take<float>(1, s.sampled ? size_t(Pool::get().wanted()) * size : 0);
  Pool::get().run([&](Member& team) {
    team.share(s.rows, [&](int r) {
      SampleParams p{};
      p.position = s.positions[s.logit_rows[r]] + 1;
      p.score = s.score_ids ? s.score_ids[r] : -1;
      p.sampled = s.sampled && s.temperature[r] > 0 && p.score < 0, p.filtered = p.sampled && s.filtered, p.logprobs = s.logprobs;
      if (p.sampled) p.seed[0] = s.seeds[2 * r], p.seed[1] = s.seeds[2 * r + 1], p.temperature = s.temperature[r];
      p.top_p = p.filtered ? s.top_p[r] : 1.0f, p.min_p = p.filtered ? s.min_p[r] : 0.0f, p.top_k = p.filtered ? s.top_k[r] : 0;
      Sampled& out = ((Sampled*)sampled.data)[r];
      const size_t at = size_t(r) * vocab;
      sample_row((const float*)logits.data + at, (const float*)changed.data + at, vocab, p,
                 p.sampled ? scratch + size_t(team.id) * size : nullptr, out);
      if (p.score < 0) ((int32_t*)last_tokens.data)[s.row[r]] = out.token;
    });
  });
}

// best[R, 3]: of the first `real` of each row of logits the highest, as its bits, the lowest id that has it, and whether all are
// finite.
inline void best(const View& logits, int64_t real, const View& best) {
  expect("logits", logits, "float32", {ANY, ANY});
  expect("best", best, "int32", {logits.dims[0], 3});
  if (real < 0 || real > logits.dims[1])
    refuse("real: expected at most " + std::to_string(logits.dims[1]) + " columns, got " + std::to_string(real));
  Pool::get().run([&](Member& team) {
    team.share(int(logits.dims[0]), [&](int r) {
      const sampling::Scan scan = sampling::scan((const float*)logits.data + r * logits.dims[1], int(real), nullptr);
      int32_t* to = (int32_t*)best.data + 3 * r;
      std::memcpy(to, &scan.peak, sizeof scan.peak);
      to[1] = scan.token, to[2] = scan.finite;
    });
  });
}

}  // namespace tandem
