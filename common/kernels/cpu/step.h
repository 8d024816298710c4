// What a kernel reads of a step and of a layer: views over two packed buffers that step.py and pack.py write.
#pragma once

#include "vec.h"

namespace tandem {

// One step, int32 words: a header, then the arrays in the order of the fields. Mirrors `step.py`.
struct Step {
  static constexpr int HEADER = 8;
  int tokens, seqs, rows, pages, fills, sampled, filtered, logprobs;
  const int32_t *token_ids, *positions, *slots;    // [T]
  const int32_t *query_starts;                     // [S + 1]
  const int32_t *kv_lengths;                       // [S]
  const int32_t *page_table;                       // [S, P]
  const int32_t *fill_at, *fill_row;               // [F]
  const int32_t *logit_rows, *row;                 // [R]
  const int32_t *seeds;                            // [R, 2], like the following only if `sampled`
  const float *temperature, *top_p, *min_p;        // [R]
  const int32_t *top_k;                            // [R]
  const int32_t *score_ids;                        // [R], null unless `logprobs` is 2; -1 is the sampled token

  explicit Step(const int32_t* p) {
    tokens = p[0], seqs = p[1], rows = p[2], pages = p[3], fills = p[4], sampled = p[5], filtered = p[6], logprobs = p[7];
    p += HEADER;
    auto take = [&p](size_t n) { return (p += n) - n; };
    token_ids = take(tokens), positions = take(tokens), slots = take(tokens);
    query_starts = take(seqs + 1), kv_lengths = take(seqs), page_table = take(size_t(seqs) * pages);
    fill_at = take(fills), fill_row = take(fills);
    logit_rows = take(rows), row = take(rows);
    seeds = take(sampled ? 2 * rows : 0);
    temperature = (const float*)take(sampled ? rows : 0);
    top_p = (const float*)take(filtered ? rows : 0);
    min_p = (const float*)take(filtered ? rows : 0);
    top_k = take(filtered ? rows : 0);
    score_ids = logprobs > 1 ? take(rows) : nullptr;
  }
};

// What is done to a step's logits before a token is chosen: int32 words, a header, then the arrays. Mirrors `step.py`.
struct Changes {
  static constexpr int HEADER = 4;
  int edits, masks, words;
  const int32_t *edit_rows, *edit_ids;  // [E], rows rising
  const float* values;                  // [E, 3]: bias, repetition factor, penalty
  const int32_t* mask_rows;             // [M]
  const uint32_t* bits;                 // [M, W]

  explicit Changes(const int32_t* p) {
    edits = p[0], masks = p[1], words = p[2];
    p += HEADER;
    auto take = [&p](size_t n) { return (p += n) - n; };
    edit_rows = take(edits), edit_ids = take(edits), values = (const float*)take(size_t(3) * edits);
    mask_rows = take(masks), bits = (const uint32_t*)take(size_t(masks) * words);
  }
};

// Header of a packed buffer of weights; offsets in bytes from its start, 0 where a part is absent. Mirrors `pack.py`.
struct Weights {
  static constexpr int32_t MAGIC = 0x31'57'44'54;  // "TDW1", little-endian
  int32_t inputs;      // D
  int32_t heads;       // N
  int32_t kv_heads;    // K
  int32_t head_dim;    // H
  int32_t hidden;      // F
  int32_t vocab;       // V
  int32_t window;      // keys a query sees; 0 is all
  int32_t gelu;        // 1: GELU in its tanh form, 0: SiLU
  float eps, attention_scale, embedding_scale;
  int32_t magic;       // MAGIC: the bytes are what pack.py wrote
  int32_t itemsize;    // of the matrices' elements: 4 is float32, 2 is bfloat16
  int32_t rope;        // which rotary table a layer turns by
  int32_t first_token;  // of the V here, in the whole model's vocabulary,
  int32_t all_tokens;   // which has so many
  int64_t bytes;       // of the whole buffer
  int64_t qkv, qkv_bias, o, o_bias, gate_up, gate_up_bias, down, down_bias;
  int64_t input_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm, q_norm, k_norm;
  int64_t head, final_norm, embedding;  // embedding 0: the rows are read out of the head

  const char* base() const { return (const char*)this; }
  const float* floats(int64_t at) const { return at ? (const float*)(base() + at) : nullptr; }
  template <class T>
  const T* matrix(int64_t at) const { return (const T*)(base() + at); }
};

}  // namespace tandem
