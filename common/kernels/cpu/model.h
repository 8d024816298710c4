// The operators of a step: embed, then the layers, then head. A layer is project, attend, combine: all layers are one operator, or
// each is three for those who want to change what is between. Activations between them are the residual stream x[T, D] in
// float32 and q[T, N, H] in the element type; everything else stays inside.
#pragma once

#include <cstdlib>
#include <memory>

#include "attention.h"
#include "matmul.h"

namespace tandem {

constexpr int even(int n) { return n + n % 2; }

// What an operator needs besides its arguments, grown once and kept. Operators run one after another: `lock` makes sure.
class Scratch {
 public:
  static Scratch& get() { return shared<Scratch>(); }

  template <class T>
  T* take(int which, size_t n) {
    Buffer& buffer = buffers_[which];
    if (buffer.size < n * sizeof(T)) {
      std::free(buffer.data);
      buffer = {};
      const size_t size = (n * sizeof(T) + 63) / 64 * 64;
      buffer.data = std::aligned_alloc(64, size);
      if (!buffer.data) throw std::bad_alloc();
      buffer.size = size;
    }
    return (T*)buffer.data;
  }

  std::mutex lock;

 private:
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
  };
  Buffer buffers_[5];  // normed rows, heads, activations, a branch, queries
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

// The normed rows in the element type: the operand of the matmul with w that follows. So few rows as
// REPEAT every thread norms for itself, each to a place of its own, which is quicker than waiting for another.
constexpr int REPEAT = 2;

template <class E>
const typename E::T* norm_rows(Member& team, const float* x, const int32_t* which, int rows, const Weights& w, int64_t norm,
                               typename E::T* out, const Matrix<E>& next) {
  const int size = w.inputs;
  auto one = [&](int r, typename E::T* to) {
    rms_norm(x + size_t(which ? which[r] : r) * size, w.floats(norm), size, w.eps, [&](int i, int n, V v) { put<E>(to + i, v, n); });
    if (size % 2) to[size] = 0;
  };
  if (rows <= REPEAT) {
    out += size_t(team.id) * REPEAT * even(size);
    for (int r = 0; r < rows; ++r) one(r, out + size_t(r) * even(size));
    return out;
  }
  team.share(rows, [&](int r) { one(r, out + size_t(r) * even(size)); });
  barrier(team, next);
  return out;
}

// Elements that `norm_rows` needs.
inline size_t normed_size(const Weights& w, int rows) {
  const int repeated = REPEAT * Pool::get().wanted();
  return size_t(rows > repeated ? rows : repeated) * even(w.inputs);
}

template <class E>
Matrix<E> qkv_of(const Weights& w) {
  return {w.matrix<typename E::T>(w.qkv), even(w.inputs), (w.heads + 2 * w.kv_heads) * w.head_dim};
}

template <class E>
Matrix<E> o_of(const Weights& w) {
  return {w.matrix<typename E::T>(w.o), w.heads * w.head_dim, w.inputs};
}

// x[T, D]: the rows of the embedding table, scaled and rounded as the model's dtype would. Those of tokens that other ranks have
// are 0.
template <class E>
void embed(const Step& step, const Weights& w, const int32_t* last_tokens, float* x) {
  using T = typename E::T;
  constexpr int G = E::PAIR;
  const int D = w.inputs;
  const Matrix<E> head{w.matrix<T>(w.head), even(D), w.vocab};
  auto row = [&](int t, int token) {
    float* to = x + size_t(t) * D;
    token -= w.first_token;
    if (token < 0 || token >= w.vocab) return void(std::memset(to, 0, D * sizeof(float)));
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
template <class E>
TANDEM_INLINE void rotate(const float* x, const float* rope, int head_dim, typename E::T* out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += LANES) {
    const int n = half - i;
    const V a = load(x + i, n), b = load(x + half + i, n), cos = load(rope + i, n), sin = load(rope + half + i, n);
    put<E>(out + i, a * cos - b * sin, n);
    put<E>(out + half + i, b * cos + a * sin, n);
  }
}

// q[T, N, H] of norm(x), rotated; keys and values go into their pages. rope[positions, H].
template <class E>
class Project {
 public:
  using T = typename E::T;

  Project(const Step& step, const Weights& w, const float* rope, const Pages<E>& pages, const float* x, T* q)
      : step_(step), w_(w), rope_(rope), pages_(pages), x_(x), q_(q),
        qkv(qkv_of<E>(w)),
        normed_(Scratch::get().take<T>(0, normed_size(w, step.tokens))),
        heads_(Scratch::get().take<float>(1, size_t(step.tokens) * qkv.panels() * COLUMNS)) {}

  void operator()(Member& team) const {
    const int N = w_.heads, K = w_.kv_heads, H = w_.head_dim, width = qkv.panels() * COLUMNS;
    const float *bias = w_.floats(w_.qkv_bias), *q_norm = w_.floats(w_.q_norm), *k_norm = w_.floats(w_.k_norm);
    const T* normed = norm_rows<E>(team, x_, nullptr, step_.tokens, w_, w_.input_norm, normed_, qkv);
    matmul<E>(team, normed, even(w_.inputs), step_.tokens, qkv, [&](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < COLUMNS; i += LANES) {
          V y = load(c + r * COLUMNS + i);
          if (bias) y = y + load(bias + panel * COLUMNS + i);
          store(heads_ + size_t(row + r) * width + panel * COLUMNS + i, y);
        }
    });
    team.barrier();
    auto turn = [&](int t, int n) {
      float* head = heads_ + size_t(t) * width + size_t(n) * H;
      alignas(64) T key[MAX_HEAD_DIM], value[MAX_HEAD_DIM];
      if (const float* norm = n < N ? q_norm : k_norm)
        rms_norm(head, norm, H, w_.eps, [&](int i, int left, V v) { store(head + i, v, left); });
      rotate<E>(head, rope_ + size_t(step_.positions[t]) * H, H, n < N ? q_ + (size_t(t) * N + n) * H : key);
      if (n < N) return;
      for (int h = 0; h < H; h += LANES) put<E>(value + h, load(head + size_t(K) * H + h, H - h), H - h);
      pages_.put(n - N, step_.slots[t], key, value);
    };
    if (step_.tokens < 4 * team.size()) {
      team.share(step_.tokens * (N + K), [&](int i) { turn(i / (N + K), i % (N + K)); });
      return;
    }
    team.share(step_.tokens, [&](int t) {
      // Every token of a decoding batch writes to a page of its own, and none of them is in a cache.
      if (const int soon = t + 3; soon < step_.tokens)
        for (int k = 0; k < K; ++k) pages_.fetch(k, step_.slots[soon]);
      for (int n = 0; n < N + K; ++n) turn(t, n);
    });
  }

 private:
  const Step& step_;
  const Weights& w_;
  const float* rope_;
  const Pages<E>& pages_;
  const float* x_;
  T* q_;
  const Matrix<E> qkv;
  T* normed_;
  float* heads_;
};

// SiLU, or GELU in its tanh form: x / (1 + e^-y), y = x or 2 sqrt(2 / pi) (x + 0.044715 x^3).
template <class E>
TANDEM_INLINE V activate(V x, bool gelu) {
  const V y = gelu ? x * fma(x * x, set1(0.0713548162726f), set1(1.59576912161f)) : x;
  if constexpr (std::is_same_v<typename E::T, bf16>) return x * rough_reciprocal(rough_exp2(y * -LOG2E) + 1.0f);
  else return x / (exp(-y) + 1.0f);
}

// What a branch of a layer gave, to the residual stream x[T, D], through a norm if the layer has one for it.
inline void add_branch(Member& team, const Step& step, const Weights& w, const float* branch, int64_t norm, float* x) {
  const int D = w.inputs;
  team.share(step.tokens, [&](int t) {
    const float* from = branch + size_t(t) * D;
    float* to = x + size_t(t) * D;
    if (norm)
      rms_norm(from, w.floats(norm), D, w.eps, [&](int i, int n, V v) { store(to + i, load(to + i, n) + v, n); });
    else
      for (int i = 0; i < D; i += LANES) store(to + i, load(to + i, D - i) + load(from + i, D - i), D - i);
  });
}

// x[T, D] behind the layer: attention's output projection and the gated MLP, each added to the residual stream; or, with a
// `branch`[T, D], what each of them gives, in its place.
template <class E>
class Combine {
 public:
  using T = typename E::T;

  Combine(const Step& step, const Weights& w, const T* attended, float* x, float* branch)
      : step_(step), w_(w), attended_(attended), x_(x), branch_(branch), F(padded(w.hidden)),
        o(o_of<E>(w)),
        gate_up{w.matrix<T>(w.gate_up), even(w.inputs), 2 * F},
        down{w.matrix<T>(w.down), F, w.inputs},
        normed_(Scratch::get().take<T>(0, normed_size(w, step.tokens))),
        active_(Scratch::get().take<T>(2, size_t(step.tokens) * F)) {}

  void output(Member& team) const { matmul<E>(team, attended_, o.inputs, step_.tokens, o, put(w_.floats(w_.o_bias))); }

  void mlp(Member& team) const {
    const int tokens = step_.tokens;
    const T* normed = norm_rows<E>(team, x_, nullptr, tokens, w_, w_.pre_mlp_norm, normed_, gate_up);
    const float* bias = w_.floats(w_.gate_up_bias);
    matmul<E>(team, normed, even(w_.inputs), tokens, gate_up, [&](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r) {
        V gate = load(c + r * COLUMNS), up = load(c + r * COLUMNS + LANES);
        if (bias) gate = gate + load(bias + panel * COLUMNS), up = up + load(bias + panel * COLUMNS + LANES);
        E::put(active_ + size_t(row + r) * F + panel * LANES, activate<E>(gate, w_.gelu) * up);
      }
    });
    barrier(team, down);
    matmul<E>(team, active_, F, tokens, down, put(w_.floats(w_.down_bias)));
  }

  // Both, each added.
  void operator()(Member& team) const {
    output(team);
    barrier(team, gate_up);
    if (branch_) {
      add_branch(team, step_, w_, branch_, w_.post_attention_norm, x_);
      barrier(team, gate_up);
    }
    mlp(team);
    if (!branch_) return;
    team.barrier();
    add_branch(team, step_, w_, branch_, w_.post_mlp_norm, x_);
  }

 private:
  auto put(const float* bias) const {
    return [this, bias](int row, int rows, int panel, const float* c) {
      const int D = w_.inputs;
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < COLUMNS && panel * COLUMNS + i < D; i += LANES) {
          const int at = panel * COLUMNS + i, n = D - at;
          V y = load(c + r * COLUMNS + i);
          if (bias) y = y + load(bias + at);
          float* to = (branch_ ? branch_ : x_) + size_t(row + r) * D + at;
          store(to, branch_ ? y : load(to, n) + y, n);
        }
    };
  }

  const Step& step_;
  const Weights& w_;
  const T* attended_;
  float *x_, *branch_;
  const int F;
  const Matrix<E> o, gate_up, down;
  T *normed_, *active_;
};

// Where what a branch gives waits for its norm; null in a layer that adds it as it is.
inline float* branch_of(const Step& step, const Weights& w) {
  return w.post_mlp_norm ? Scratch::get().take<float>(3, size_t(step.tokens) * w.inputs) : nullptr;
}

// The three one after another, without leaving the team. Who is done first fetches what it will read of the layer that comes
// next, if one does.
template <class E>
void layer(const Step& step, const Weights& w, const float* rope, const Pages<E>& pages, float* x, const Weights* next) {
  using T = typename E::T;
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  T* q = Scratch::get().take<T>(4, size_t(step.tokens) * w.heads * w.head_dim);
  const Project<E> project(step, w, rope, pages, x, q);
  const Combine<E> combine(step, w, q, x, branch_of(step, w));
  by_tiles<E>(w.head_dim, [&](auto e) {
    Attention<decltype(e)> attention(step, w, pages, q, Pool::get().wanted());
    Pool::get().run([&](Member& team) {
      project(team);
      team.barrier();
      attention(team);
      barrier(team, o_of<E>(w));
      combine(team);
      if (next) barrier(team, qkv_of<E>(*next));
    });
  });
}

// Each of them alone.
template <class E>
void project(const Step& step, const Weights& w, const float* rope, const Pages<E>& pages, const float* x, typename E::T* q) {
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  const Project<E> project(step, w, rope, pages, x, q);
  Pool::get().run(project);
}

template <class E>
void attend(const Step& step, const Weights& w, const Pages<E>& pages, typename E::T* q) {
  by_tiles<E>(w.head_dim, [&](auto e) {
    Attention<decltype(e)> attention(step, w, pages, q, Pool::get().wanted());
    Pool::get().run(attention);
  });
}

template <class E>
void combine(const Step& step, const Weights& w, const typename E::T* attended, float* x) {
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  const Combine<E> combine(step, w, attended, x, branch_of(step, w));
  Pool::get().run(combine);
}

// Where ranks share out a layer, each of its branches is a sum over them, of which each gives a term[T, D]: of attention what its
// heads give, of the MLP what its features do. x[T, D] has the sum of the first when the second is asked for.
template <class E>
void attention_term(const Step& step, const Weights& w, const float* rope, const Pages<E>& pages, const float* x, float* term) {
  using T = typename E::T;
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  T* q = Scratch::get().take<T>(4, size_t(step.tokens) * w.heads * w.head_dim);
  const Project<E> project(step, w, rope, pages, x, q);
  const Combine<E> combine(step, w, q, nullptr, term);
  by_tiles<E>(w.head_dim, [&](auto e) {
    Attention<decltype(e)> attention(step, w, pages, q, Pool::get().wanted());
    Pool::get().run([&](Member& team) {
      project(team);
      team.barrier();
      attention(team);
      barrier(team, o_of<E>(w));
      combine.output(team);
    });
  });
}

template <class E>
void mlp_term(const Step& step, const Weights& w, float* x, float* term) {
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  const Combine<E> combine(step, w, nullptr, x, term);
  Pool::get().run([&](Member& team) { combine.mlp(team); });
}

inline void add(const Step& step, const Weights& w, const float* sum, int64_t norm, float* x) {
  Pool::get().run([&](Member& team) { add_branch(team, step, w, sum, norm, x); });
}

// logits[R, V] of the rows of x that want them, after the final norm.
template <class E>
void head(const Step& step, const Weights& w, const float* x, float* logits) {
  using T = typename E::T;
  const Matrix<E> head{w.matrix<T>(w.head), even(w.inputs), w.vocab};
  std::lock_guard<std::mutex> lock(Scratch::get().lock);
  T* scratch = Scratch::get().take<T>(0, normed_size(w, step.rows));
  Pool::get().run([&](Member& team) {
    const T* normed = norm_rows<E>(team, x, step.logit_rows, step.rows, w, w.final_norm, scratch, head);
    matmul<E>(team, normed, even(w.inputs), step.rows, head, [&](int row, int rows, int panel, const float* c) {
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < COLUMNS && panel * COLUMNS + i < w.vocab; i += LANES) {
          const int at = panel * COLUMNS + i;
          store(logits + size_t(row + r) * w.vocab + at, load(c + r * COLUMNS + i), w.vocab - at);
        }
    });
  });
}

}  // namespace tandem
