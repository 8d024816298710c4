// y = x W with W packed once: panels of 32 outputs; in a panel, for each group of PAIR inputs, 32 outputs side by side.
//
// Every output element is one chain of fused multiply-adds over the inputs in order, whatever the number of rows, the tile it
// falls into and the thread that computes it. So a row's result does not depend on its neighbours.
#pragma once

#include "pool.h"

namespace tandem {

constexpr int COLUMNS = 32, MAX_ROWS = 12;

template <class E>
struct Matrix {
  const typename E::T* data;
  int inputs, outputs;  // inputs as stored, a multiple of PAIR
  int panels() const { return (outputs + COLUMNS - 1) / COLUMNS; }
  size_t panel_size() const { return size_t(inputs) * COLUMNS; }
  const typename E::T* panel(int p) const { return data + p * panel_size(); }
};

// R rows times P panels, in registers: c[p][r][32]. Fetches `ahead` bytes of `next` on the way.
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

template <class E, int R>
inline void rows_of_tile(int panels, const typename E::T* a, size_t lda, const typename E::T* b, size_t panel, int groups,
                         float* c, const char* next, int lines) {
  constexpr int P = panels_of(R);
  if (panels == P) return tile<E, R, P>(a, lda, b, panel, groups, c, next, lines);
  for (int p = 0; p < panels; ++p)
    tile<E, R, 1>(a, lda, b + p * panel, panel, groups, c + p * R * COLUMNS, next, p ? 0 : lines);
}

// done(row, rows, panel, c): the finished products c[rows][32] of rows row.. with one panel.
template <class E, class Done>
inline void matmul(Member& team, const typename E::T* a, size_t lda, int rows, const Matrix<E>& w, Done&& done) {
  if (rows == 0) return;
  // A block of rows stays in the second-level cache while the panels pass by.
  const int most = int((size_t(384) << 10) / (size_t(w.inputs) * sizeof(typename E::T)));
  const int block = rows <= most ? rows : (most < MAX_ROWS ? MAX_ROWS : most / MAX_ROWS * MAX_ROWS);
  const int blocks = (rows + block - 1) / block, groups = w.inputs / E::PAIR;
  const int panels = w.panels(), step = rows < MAX_ROWS ? panels_of(rows) : 1;
  const int steps = (panels + step - 1) / step;
  team.share(blocks * steps, [&](int unit) {
    const int begin = unit / steps * block, end = begin + block < rows ? begin + block : rows;
    const int first = unit % steps * step, count = first + step < panels ? step : panels - first;
    const int tiles = (end - begin + MAX_ROWS - 1) / MAX_ROWS;
    alignas(64) float c[MAX_ROWS * 2 * COLUMNS];
    // The next panel of this thread is most likely the one after the other threads': fetch it while this one is in use.
    const char* next = (const char*)w.panel(first + step * team.size() < panels ? first + step * team.size() : first);
    for (int t = 0; t < tiles; ++t) {
      const int row = begin + int(int64_t(end - begin) * t / tiles);
      const int stop = begin + int(int64_t(end - begin) * (t + 1) / tiles);
      const auto* x = a + size_t(row) * lda;
      const int lines = tiles == 1 ? 2 : t < 2 ? 1 : 0;
      const char* from = next + (t == 1 ? size_t(groups) * 64 : 0);
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
