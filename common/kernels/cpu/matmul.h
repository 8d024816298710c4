// y = x W with W packed once: panels of 32 outputs; in a panel, for each group of PAIR inputs, 32 outputs side by side.
//
// Every output element is one chain of fused multiply-adds over the inputs in order, whatever the number of rows, the tile it
// falls into and the thread that computes it. So a row's result does not depend on its neighbours.
#pragma once

#include <vector>

#include "pool.h"

namespace tandem {

#ifndef TANDEM_FEW_ROWS
#define TANDEM_FEW_ROWS 4
#endif

constexpr int COLUMNS = 32, MAX_ROWS = 12, FEW_ROWS = TANDEM_FEW_ROWS;
constexpr size_t AHEAD_BYTES = 8192;

template <class E>
struct Matrix {
  const typename E::T* data;
  int inputs, outputs;  // inputs as stored, a multiple of PAIR
  int panels() const { return (outputs + COLUMNS - 1) / COLUMNS; }
  size_t panel_size() const { return size_t(inputs) * COLUMNS; }
  const typename E::T* panel(int p) const { return data + p * panel_size(); }

  // What a thread of the team begins with.
  const void* begin(const Member& team) const { return panel(int(int64_t(panels()) * team.id / team.size())); }
  size_t bytes(const Member& team) const { return panel_size() * sizeof(typename E::T) * panels() / team.size(); }
};

// Wait for all, and fetch what this thread will read of w.
template <class E>
inline void barrier(Member& team, const Matrix<E>& w) { team.barrier(w.begin(team), w.bytes(team)); }

// R rows times one panel, in registers: c[r][32]. On the way it fetches what comes next: `lines` cache lines of `next` for each
// group of inputs, or, where the panels are read only once, what lies AHEAD_BYTES ahead: multiplying and reading take about as
// long then, and neither may wait for the other. With FEW_ROWS or less AMD's own prefetcher does better alone, as long as it sees
// a single stream: so never two panels side by side, though that would hide the latency of the chains.
template <class E, int R>
inline void tile(const typename E::A* a, size_t lda, const typename E::T* b, int groups, float* c, const char* next, int lines) {
  constexpr int G = E::PAIR;
  V acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V{};
  for (int k = 0; k < groups; ++k, b += COLUMNS * G) {
    for (int line = 0; line < lines; ++line) prefetch(next + (size_t(k) * lines + line) * 64);
    if (R > FEW_ROWS && !next) {
      const char* ahead = (const char*)b + AHEAD_BYTES;
      prefetch(ahead), prefetch(ahead + 64);
    }
    const auto b0 = E::vec(b), b1 = E::vec(b + LANES * G);
#pragma GCC unroll 2
    for (int step = 0; step < E::STEPS; ++step) {
      const auto w0 = E::part(b0, step), w1 = E::part(b1, step);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[r][0] = E::madd(acc[r][0], a + r * lda + k * G + step, w0);
        acc[r][1] = E::madd(acc[r][1], a + r * lda + k * G + step, w1);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * COLUMNS, acc[r][0]);
    store(c + r * COLUMNS + LANES, acc[r][1]);
  }
}

// The rows of one block as operands: where they are, or widened by each thread for itself, which costs little beside the products
// with its panels and needs no waiting.
template <class E, bool same = std::is_same_v<typename E::T, typename E::A>>
class Operands {
 public:
  Operands(const typename E::T* a, size_t lda, int) : a_(a), lda_(lda) {}
  void fit(int, int) {}
  const typename E::A* row(int r) const { return a_ + r * lda_; }
  size_t stride() const { return lda_; }

 private:
  const typename E::T* a_;
  const size_t lda_;
};

template <class E>
class Operands<E, false> {
 public:
  Operands(const typename E::T* a, size_t lda, int inputs) : a_(a), lda_(lda), inputs_(inputs) {}
  void fit(int begin, int end) {
    if (begin == begin_) return;
    begin_ = begin;
    if (wide().size() < size_t(end - begin) * inputs_) wide().resize(size_t(end - begin) * inputs_);
    for (int r = begin; r < end; ++r) operands<E>(a_ + r * lda_, inputs_, wide().data() + size_t(r - begin) * inputs_);
  }
  const typename E::A* row(int r) const { return wide().data() + size_t(r - begin_) * inputs_; }
  size_t stride() const { return inputs_; }

 private:
  static std::vector<typename E::A>& wide() {
    static thread_local std::vector<typename E::A> of_thread;
    return of_thread;
  }
  const typename E::T* a_;
  const size_t lda_;
  const int inputs_;
  int begin_ = -1;
};

// done(row, rows, panel, c): the finished products c[rows][32] of rows row.. with one panel.
template <class E, class Done>
inline void matmul(Member& team, const typename E::T* a, size_t lda, int rows, const Matrix<E>& w, Done&& done) {
  if (rows == 0) return;
  // A block of rows stays in the second-level cache while the panels pass by.
  const int most = int((size_t(384) << 10) / (size_t(w.inputs) * sizeof(typename E::A)));
  const int block = rows <= most ? rows : (most < MAX_ROWS ? MAX_ROWS : most / MAX_ROWS * MAX_ROWS);
  const int blocks = (rows + block - 1) / block, groups = w.inputs / E::PAIR;
  Operands<E> operands(a, lda, w.inputs);
  team.share(w.panels(), blocks, [&](int panel, int round) {
    const int begin = round * block, end = begin + block < rows ? begin + block : rows;
    operands.fit(begin, end);
    const int tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS;
    alignas(64) float c[MAX_ROWS * COLUMNS];
    // The first two tiles fetch half of the thread's next panel each, while this one serves them all.
    const char* next = tiles > 1 ? (const char*)w.panel(panel + 1 < w.panels() ? panel + 1 : panel) : nullptr;
    for (int t = 0; t < tiles; ++t) {
      const int row = begin + int(int64_t(end - begin) * t / tiles);
      const int stop = begin + int(int64_t(end - begin) * (t + 1) / tiles);
      const auto* x = operands.row(row);
      const int lines = tiles > 1 && t < 2 ? 1 : 0;
      const char* from = t == 1 ? next + size_t(groups) * 64 : next;
      switch (stop - row) {
#define TANDEM_ROWS(R) \
  case R: tile<E, R>(x, operands.stride(), w.panel(panel), groups, c, from, lines); break;
        TANDEM_ROWS(1) TANDEM_ROWS(2) TANDEM_ROWS(3) TANDEM_ROWS(4) TANDEM_ROWS(5) TANDEM_ROWS(6)
        TANDEM_ROWS(7) TANDEM_ROWS(8) TANDEM_ROWS(9) TANDEM_ROWS(10) TANDEM_ROWS(11) TANDEM_ROWS(12)
#undef TANDEM_ROWS
      }
      done(row, stop - row, panel, c);
    }
  });
}

}  // namespace tandem
