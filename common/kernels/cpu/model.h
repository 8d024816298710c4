// The operators of a step: embed, then for each layer project, attend, combine, then head. Activations between them are the
// residual stream x[T, D] in float32 and q[T, N, H] in the element type; everything else stays inside.
#pragma once

#include <cstdlib>
#include <memory>

#include "attention.h"
#include "matmul.h"

namespace tandem {

constexpr int MAX_HEAD_DIM = 512;

constexpr int even(int n) { return n + n % 2; }

// What an operator needs besides its arguments, grown once and kept. Operators run one after another: `lock` makes sure.
class Scratch {
 public:
  static Scratch& get() {
    static Scratch* scratch = new Scratch;
    return *scratch;
  }

  template <class T>
  T* take(int which, size_t n) {
    Buffer& buffer = buffers_[which];
    if (buffer.size < n * sizeof(T)) {
      std::free(buffer.data);
      buffer.size = (n * sizeof(T) + 63) / 64 * 64;
      buffer.data = std::aligned_alloc(64, buffer.size);
      if (!buffer.data) throw std::bad_alloc();
    }
    return (T*)buffer.data;
  }

  std::mutex lock;

 private:
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
  };
  Buffer buffers_[4];
};

// out[n] = x / rms(x) * w (Zhang & Sennrich 2019, arXiv:1910.07467), given sixteen at a time to put(i, n, value).
template <class Put>
TANDEM_INLINE void rms_norm(const float* x, const float* w, int size, float eps, Put&& put) {
  V squares{};
  for (int i = 0; i < size; i += LANES) {
    const V v = load(x + i, size - i);
    squares = fma(v, v, squares);
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
  for (int i = 0; i < size; i += LANES) put(i, size - i, load(x + i, size - i) * scale * load(w + i, size - i));
}

template <class E>
void norm_rows(Member& team, const float* x, const int32_t* which, int rows, int size, const float* w, float eps,
               typename E::T* out) {
  team.share(rows, [&](int r) {
    auto* to = out + size_t(r) * even(size);
    rms_norm(x + size_t(which ? which[r] : r) * size, w, size, eps, [&](int i, int n, V v) { put<E>(to + i, v, n); });
    if (size % 2) to[size] = 0;
  });
  team.barrier();
}

// x[T, D]: the rows of the embedding table, scaled and rounded as the model's dtype would.
template <class E>
void embed(const Step& step, const Weights& w, const int32_t* last_tokens, float* x) {
  using T = typename E::T;
  constexpr int G = E::PAIR;
  const int D = w.inputs;
  const Matrix<E> head{w.matrix<T>(w.head), even(D), w.vocab};
  auto row = [&](int t, int token) {
    float* to = x + size_t(t) * D;
    const T* rows = w.embedding ? w.matrix<T>(w.embedding) + size_t(token) * D : nullptr;
    const T* packed = head.panel(token / COLUMNS) + size_t(token % COLUMNS) * G;
    for (int i = 0; i < D; i += LANES) {
      T part[LANES] = {};
      const int n = D - i < LANES ? D - i : LANES;
      if (rows) std::memcpy(part, rows + i, n * sizeof(T));
      else
        for (int j = 0; j < n; j += G)
          std::memcpy(part + j, packed + size_t(i + j) * COLUMNS, sizeof(T) * (n - j < G ? n - j : G));
      if (w.embedding_scale != 1.0f) E::put(part, E::get(part) * w.embedding_scale);
      store(to + i, E::get(part), n);
    }
  };
  Pool::get().run([&](Member& team) {
    team.share(step.tokens, [&](int t) { row(t, step.token_ids[t]); });
    team.barrier();
    // Tokens that the host did not know: the last one sampled for their row.
    team.share(step.fills, [&](int i) { row(step.fill_at[i], last_tokens[step.fill_row[i]]); });
  });
}

// Halves (a, b) become (a cos - b sin, b cos + a sin) (Su et al. 2021, arXiv:2104.09864); rope[2, H / 2] is cos, then sin.
TANDEM_INLINE void rotate(float* x, const float* rope, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += LANES) {
    const int n = half - i;
    const V a = load(x + i, n), b = load(x + half + i, n), cos = load(rope + i, n), sin = load(rope + half + i, n);
    const V first = a * cos - b * sin, second = b * cos + a * sin;
    store(x + i, first, n);
    store(x + half + i, second, n);
  }
}

// q[T, N, H] of norm(x), rotated; keys and values go into their pages. rope[positions, H].
template <class E>
void project(const Step& step, const Weights& w, const float* rope, const Pages<E>& pages, const float* x, typename E::T* q) {
  using T = typename E::T;
  const int D = w.inputs, N = w.heads, K = w.kv_heads, H = w.head_dim, out = (N + 2 * K) * H;
  const Matrix<E> qkv{w.matrix<T>(w.qkv), even(D), out};
  const int width = qkv.panels() * COLUMNS;
  const float *bias = w.floats(w.qkv_bias), *q_norm = w.floats(w.q_norm), *k_norm = w.floats(w.k_norm);
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  T* normed = Scratch::get().take<T>(0, size_t(step.tokens) * even(D));
  float* heads = Scratch::get().take<float>(1, size_t(step.tokens) * width);
  Pool::get().run([&](Member& team) {
    norm_rows<E>(team, x, nullptr, step.tokens, D, w.floats(w.input_norm), w.eps, normed);
    matmul<E>(team, normed, even(D), step.tokens, qkv, [&](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < COLUMNS; i += LANES) {
          V y = load(c + r * COLUMNS + i);
          if (bias) y = y + load(bias + panel * COLUMNS + i);
          store(heads + size_t(row + r) * width + panel * COLUMNS + i, y);
        }
    });
    team.barrier();
    team.share(step.tokens, [&](int t) {
      // Every token of a decoding batch writes to a page of its own, and none of them is in a cache.
      if (const int soon = t + 2 * team.size(); soon < step.tokens)
        for (int k = 0; k < K; ++k) pages.fetch(k, step.slots[soon]);
      float* head = heads + size_t(t) * width;
      const float* turn = rope + size_t(step.positions[t]) * H;
      alignas(64) T key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
      for (int n = 0; n < N + K; ++n, head += H) {
        if (const float* norm = n < N ? q_norm : k_norm)
          rms_norm(head, norm, H, w.eps, [&](int i, int left, V v) { store(head + i, v, left); });
        rotate(head, turn, H);
        T* to = n < N ? q + (size_t(t) * N + n) * H : key;
        for (int h = 0; h < H; h += LANES) put<E>(to + h, load(head + h, H - h), H - h);
        if (n < N) continue;
        for (int h = 0; h < H; h += LANES) put<E>(value + h, load(head + size_t(K) * H + h, H - h), H - h);
        pages.put(n - N, step.slots[t], key, value);
      }
    });
  });
}

// Attention over the pages; q becomes the output.
template <class E>
void attend(const Step& step, const Weights& w, const Pages<E>& pages, typename E::T* q) {
  Attention<E> attention(step, w, pages, q);
  Pool::get().run(attention);
}

// SiLU, or GELU in its tanh form: x / (1 + e^-y), y = x or 2 sqrt(2 / pi) (x + 0.044715 x^3).
TANDEM_INLINE V activate(V x, bool gelu) {
  const V y = gelu ? x * fma(x * x, set1(0.0713548162726f), set1(1.59576912161f)) : x;
  return x / (exp(-y) + 1.0f);
}

// x[T, D] behind the layer: attention's output projection and the gated MLP, each added to the residual stream.
template <class E>
void combine(const Step& step, const Weights& w, const typename E::T* attended, float* x) {
  using T = typename E::T;
  const int D = w.inputs, inner = w.heads * w.head_dim, F = padded(w.hidden), tokens = step.tokens;
  const Matrix<E> o{w.matrix<T>(w.o), inner, D}, gate_up{w.matrix<T>(w.gate_up), even(D), 2 * F}, down{w.matrix<T>(w.down), F, D};
  const bool sandwich = w.post_mlp_norm;
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  T* normed = Scratch::get().take<T>(0, size_t(tokens) * even(D));
  T* active = Scratch::get().take<T>(2, size_t(tokens) * F);
  float* branch = sandwich ? Scratch::get().take<float>(3, size_t(tokens) * D) : nullptr;
  // What a branch gives goes to the residual stream, or through a norm first.
  auto add = [&](const float* bias) {
    return [=](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < COLUMNS && panel * COLUMNS + i < D; i += LANES) {
          const int at = panel * COLUMNS + i, n = D - at;
          V y = load(c + r * COLUMNS + i);
          if (bias) y = y + load(bias + at);
          if (sandwich) store(branch + size_t(row + r) * D + at, y, n);
          else store(x + size_t(row + r) * D + at, load(x + size_t(row + r) * D + at, n) + y, n);
        }
    };
  };
  auto add_normed = [&](Member& team, const float* norm) {
    team.barrier();
    if (!sandwich) return;
    team.share(tokens, [&](int t) {
      float* to = x + size_t(t) * D;
      rms_norm(branch + size_t(t) * D, norm, D, w.eps, [&](int i, int n, V v) { store(to + i, load(to + i, n) + v, n); });
    });
    team.barrier();
  };
  Pool::get().run([&](Member& team) {
    matmul<E>(team, attended, inner, tokens, o, add(w.floats(w.o_bias)));
    add_normed(team, w.floats(w.post_attention_norm));
    norm_rows<E>(team, x, nullptr, tokens, D, w.floats(w.pre_mlp_norm), w.eps, normed);
    const float* bias = w.floats(w.gate_up_bias);
    matmul<E>(team, normed, even(D), tokens, gate_up, [&](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r) {
        V gate = load(c + r * COLUMNS), up = load(c + r * COLUMNS + LANES);
        if (bias) gate = gate + load(bias + panel * COLUMNS), up = up + load(bias + panel * COLUMNS + LANES);
        E::put(active + size_t(row + r) * F + panel * LANES, activate(gate, w.gelu) * up);
      }
    });
    team.barrier();
    matmul<E>(team, active, F, tokens, down, add(w.floats(w.down_bias)));
    add_normed(team, w.floats(w.post_mlp_norm));
  });
}

// logits[R, V] of the rows of x that want them, after the final norm.
template <class E>
void head(const Step& step, const Weights& w, const float* x, float* logits) {
  using T = typename E::T;
  const int D = w.inputs;
  const Matrix<E> head{w.matrix<T>(w.head), even(D), w.vocab};
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  T* normed = Scratch::get().take<T>(0, size_t(step.rows) * even(D));
  Pool::get().run([&](Member& team) {
    norm_rows<E>(team, x, step.logit_rows, step.rows, D, w.floats(w.final_norm), w.eps, normed);
    matmul<E>(team, normed, even(D), step.rows, head, [&](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < COLUMNS && panel * COLUMNS + i < w.vocab; i += LANES) {
          const int at = panel * COLUMNS + i;
          store(logits + size_t(row + r) * w.vocab + at, load(c + r * COLUMNS + i), w.vocab - at);
        }
    });
  });
}

}  // namespace tandem
