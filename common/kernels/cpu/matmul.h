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
#ifndef TANDEM_NEAR
#define TANDEM_NEAR 0
#endif

constexpr int COLUMNS = 32, MAX_ROWS = 12, FEW_ROWS = TANDEM_FEW_ROWS;
// How far ahead of the products weights are fetched: from memory into the second-level cache, and from there into the first, which
// only some processors need to be told (0: not).
constexpr size_t AHEAD_BYTES = 8192, NEAR_BYTES = TANDEM_NEAR;

// Operands in a cache line.
template <class E>
constexpr int LINE = 64 / sizeof(typename E::A);

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

// R rows times one panel, in registers: c[r][32]. Operands come in lines: the first LINE inputs of the first row, of the second, and
// so on, then the next of each; one register and constants address them all. With each group of inputs two cache lines at `ahead`
// are fetched, which moves on by `stride` bytes.
template <class E, int R>
inline void tile(const typename E::A* a, const typename E::T* b, int groups, float* c, const char* ahead, size_t stride) {
  constexpr int G = E::PAIR;
  const char* near = (const char*)b + NEAR_BYTES;
  V acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = V{};
  for (int k = 0; k < groups; a += R * LINE<E>) {
    const int stop = k + LINE<E> / G < groups ? k + LINE<E> / G : groups;
    for (auto* x = a; k < stop; ++k, x += G, b += COLUMNS * G, ahead += stride) {
      prefetch(ahead), prefetch(ahead + 64);
      if (NEAR_BYTES) prefetch_near(near), prefetch_near(near + 64), near += 128;
      const auto b0 = E::vec(b), b1 = E::vec(b + LANES * G);
#pragma GCC unroll 2
      for (int step = 0; step < E::STEPS; ++step) {
        const auto w0 = E::part(b0, step), w1 = E::part(b1, step);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          acc[r][0] = E::madd(acc[r][0], x + r * LINE<E> + step, w0);
          acc[r][1] = E::madd(acc[r][1], x + r * LINE<E> + step, w1);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(c + r * COLUMNS, acc[r][0]);
    store(c + r * COLUMNS + LANES, acc[r][1]);
  }
}

// n rows as a tile's operands, whole lines of them.
template <class E>
inline void fill(const typename E::T* from, size_t lda, int inputs, int n, typename E::A* to) {
  int i = 0;
  for (; i + LINE<E> <= inputs; i += LINE<E>)
    for (int r = 0; r < n; ++r, to += LINE<E>) operands<E>(from + r * lda + i, LINE<E>, to);
  if (i < inputs)
    for (int r = 0; r < n; ++r, to += LINE<E>) operands<E>(from + r * lda + i, inputs - i, to);
}

// Rows of a matmul, in tiles of at most MAX_ROWS that differ by one at most.
struct Tiles {
  const int begin, end;  // of the rows
  int size() const { return (end - begin + MAX_ROWS - 1) / MAX_ROWS; }
  int first(int tile) const { return begin + int(int64_t(end - begin) * tile / size()); }
};

// done(row, rows, panel, c): the finished products c[rows][32] of rows row.. with one panel.
template <class E, class Done>
inline void matmul(Member& team, const typename E::T* a, size_t lda, int rows, const Matrix<E>& w, Done&& done) {
  if (rows == 0) return;
  // A block of rows stays in the second-level cache while the panels pass by. Each thread fills its operands for itself: it costs
  // little beside the products, and needs no waiting.
  const size_t filled = size_t(w.inputs + LINE<E> - 1) / LINE<E> * LINE<E>;  // of a row
  const int most = int((size_t(384) << 10) / (filled * sizeof(typename E::A)));
  const int block = rows <= most ? rows : (most < MAX_ROWS ? MAX_ROWS : most / MAX_ROWS * MAX_ROWS);
  const int blocks = (rows + block - 1) / block, groups = w.inputs / E::PAIR;
  static thread_local std::vector<typename E::A> operands;
  if (operands.size() < block * filled) operands.resize(block * filled);
  auto* const x = operands.data();
  int last = -1;
  team.share(w.panels(), blocks, [&](int panel, int round) {
    const Tiles tiles{round * block, round + 1 < blocks ? (round + 1) * block : rows};
    if (round != last)
      for (int t = 0; t < tiles.size(); ++t) {
        const int row = tiles.first(t);
        fill<E>(a + row * lda, lda, w.inputs, tiles.first(t + 1) - row, x + (row - tiles.begin) * filled);
      }
    last = round;
    const auto* b = w.panel(panel);
    alignas(64) float c[MAX_ROWS * COLUMNS];
    for (int t = 0; t < tiles.size(); ++t) {
      const int row = tiles.first(t), n = tiles.first(t + 1) - row;
      const char* ahead = (const char*)b;
      size_t stride = 0;
      if (tiles.size() > 1) {
        // The first two tiles fetch half of the thread's next panel each, while this one serves them all.
        if (t < 2 && panel + 1 < w.panels()) ahead = (const char*)w.panel(panel + 1) + t * size_t(groups) * 64, stride = 64;
      } else if (rows > FEW_ROWS) {
        // A panel that is read once: multiplying and reading take about as long, and neither may wait for the other. With fewer
        // rows AMD's own prefetcher does better alone, as long as it sees a single stream: so never two panels side by side,
        // though that would hide the latency of the chains.
        ahead += AHEAD_BYTES, stride = 2 * 64;
      }
      switch (n) {
#define TANDEM_ROWS(R) \
  case R: tile<E, R>(x + (row - tiles.begin) * filled, b, groups, c, ahead, stride); break;
        TANDEM_ROWS(1) TANDEM_ROWS(2) TANDEM_ROWS(3) TANDEM_ROWS(4) TANDEM_ROWS(5) TANDEM_ROWS(6)
        TANDEM_ROWS(7) TANDEM_ROWS(8) TANDEM_ROWS(9) TANDEM_ROWS(10) TANDEM_ROWS(11) TANDEM_ROWS(12)
#undef TANDEM_ROWS
      }
      done(row, n, panel, c);
    }
  });
}

}  // namespace tandem
