// y = x W with W packed once: panels of 32 outputs; in a panel, for each group of PAIR inputs, 32 outputs side by side.
//
// Every output element is one chain of fused multiply-adds over the inputs in order, whatever the number of rows, the tile it
// falls into and the thread that computes it. So a row's result does not depend on its neighbours.
#pragma once

#include "pool.h"

namespace tandem {

constexpr int COLUMNS = 32, MAX_ROWS = 12;
constexpr size_t AHEAD_BYTES = 4096;

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

// R rows times P panels, in registers: c[p][r][32]. On the way it fetches what comes next: `lines` cache lines of `next` for
// each group of inputs, or, where the panels are read only once, what lies a little ahead in them. With one row or two the
// processor's own prefetcher does better alone.
template <class E, int R, int P>
inline void tile(const typename E::T* a, size_t lda, const typename E::T* b, size_t panel, int groups, float* c, const char* next,
                 int lines) {
  constexpr int G = E::PAIR;
  V acc[P][R][2];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[p][r][0] = acc[p][r][1] = V{};
  for (int k = 0; k < groups; ++k) {
    for (int line = 0; line < lines; ++line) prefetch(next + (size_t(k) * lines + line) * 64);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      if (R > 2 && !next) {
        const char* ahead = (const char*)(b + p * panel + size_t(k) * COLUMNS * G) + AHEAD_BYTES;
        prefetch(ahead), prefetch(ahead + 64);
      }
      const auto b0 = E::vec(b + p * panel + size_t(k) * COLUMNS * G);
      const auto b1 = E::vec(b + p * panel + size_t(k) * COLUMNS * G + LANES * G);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[p][r][0] = E::madd(acc[p][r][0], a + r * lda + k * G, b0);
        acc[p][r][1] = E::madd(acc[p][r][1], a + r * lda + k * G, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(c + (p * R + r) * COLUMNS, acc[p][r][0]);
      store(c + (p * R + r) * COLUMNS + LANES, acc[p][r][1]);
    }
}

// How many panels at once keep the multipliers busy with R rows.
constexpr int panels_of(int rows) { return rows <= 3 ? 4 : rows == 4 ? 3 : rows <= 6 ? 2 : 1; }

// As many panels as `panels_of` or fewer, so that the threads' shares come out even.
inline int step_of(int rows, int panels, int threads) {
  int best = 1, least = panels + 1;
  for (int step = panels_of(rows); step >= 1; --step) {
    const int units = (panels + step - 1) / step, share = (units + threads - 1) / threads * step;
    if (share < least) best = step, least = share;
  }
  return best;
}

template <class E, int R, int P = panels_of(R)>
inline void rows_of_tile(int panels, const typename E::T* a, size_t lda, const typename E::T* b, size_t panel, int groups,
                         float* c, const char* next, int lines) {
  if constexpr (P > 1) {
    if (panels < P) return rows_of_tile<E, R, P - 1>(panels, a, lda, b, panel, groups, c, next, lines);
  }
  tile<E, R, P>(a, lda, b, panel, groups, c, next, lines);
}

// done(row, rows, panel, c): the finished products c[rows][32] of rows row.. with one panel.
template <class E, class Done>
inline void matmul(Member& team, const typename E::T* a, size_t lda, int rows, const Matrix<E>& w, Done&& done) {
  if (rows == 0) return;
  // A block of rows stays in the second-level cache while the panels pass by.
  const int most = int((size_t(384) << 10) / (size_t(w.inputs) * sizeof(typename E::T)));
  const int block = rows <= most ? rows : (most < MAX_ROWS ? MAX_ROWS : most / MAX_ROWS * MAX_ROWS);
  const int blocks = (rows + block - 1) / block, groups = w.inputs / E::PAIR;
  const int panels = w.panels(), step = rows < MAX_ROWS ? step_of(rows, panels, team.size()) : 1;
  const int steps = (panels + step - 1) / step;
  team.share(steps, blocks, [&](int unit, int round) {
    const int begin = round * block, end = begin + block < rows ? begin + block : rows;
    const int first = unit * step, count = first + step < panels ? step : panels - first;
    const int tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS;
    alignas(64) float c[MAX_ROWS * 2 * COLUMNS];
    // The first two tiles fetch half of the thread's next panel each, while this one serves them all.
    const char* next = tiles > 1 ? (const char*)w.panel(first + step < panels ? first + step : first) : nullptr;
    for (int t = 0; t < tiles; ++t) {
      const int row = begin + int(int64_t(end - begin) * t / tiles);
      const int stop = begin + int(int64_t(end - begin) * (t + 1) / tiles);
      const auto* x = a + size_t(row) * lda;
      const int lines = tiles > 1 && t < 2 ? 1 : 0;
      const char* from = t == 1 ? next + size_t(groups) * 64 : next;
      switch (stop - row) {
#define TANDEM_ROWS(R) \
  case R: rows_of_tile<E, R>(count, x, lda, w.panel(first), w.panel_size(), groups, c, from, lines); break;
        TANDEM_ROWS(1) TANDEM_ROWS(2) TANDEM_ROWS(3) TANDEM_ROWS(4) TANDEM_ROWS(5) TANDEM_ROWS(6)
        TANDEM_ROWS(7) TANDEM_ROWS(8) TANDEM_ROWS(9) TANDEM_ROWS(10) TANDEM_ROWS(11) TANDEM_ROWS(12)
#undef TANDEM_ROWS
      }
      for (int p = 0; p < count; ++p) done(row, stop - row, first + p, c + p * (stop - row) * COLUMNS);
    }
  });
}

}  // namespace tandem
