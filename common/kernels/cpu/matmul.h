// y = x W with W packed once: panels of 32 outputs; in a panel, for each group of PAIR inputs, 32 outputs side by side.
//
// Every output element is one chain of additions over the inputs in order, whatever the number of rows, the tile it
// falls into and the thread that computes it. So a row's result does not depend on its neighbours.
#pragma once

#include <algorithm>

#include "amx.h"
#include "pool.h"

namespace tandem {

#ifndef TANDEM_FEW_ROWS
#define TANDEM_FEW_ROWS 4
#endif
#ifndef TANDEM_NEAR
#define TANDEM_NEAR 0
#endif

constexpr int COLUMNS = 32, FEW_ROWS = TANDEM_FEW_ROWS;
// Rows of a tile.
template <class E>
constexpr int MAX_ROWS = E::TILES ? 2 * TILE_ROWS : 12;
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

// Where the `part`-th of `parts` like parts of n begins.
inline int part_of(int n, int part, int parts) { return int(int64_t(n) * part / parts); }

// Rows of a matmul, in tiles of at most MAX_ROWS that differ by one at most.
template <class E>
struct Tiles {
  const int begin, end;  // of the rows
  int size() const { return (end - begin + MAX_ROWS<E> - 1) / MAX_ROWS<E>; }
  int first(int tile) const { return begin + part_of(end - begin, tile, size()); }
};

// In how many parts rows meet the panels, so that the operands of a part, of at most `kilobytes`, stay in the second-level cache
// meanwhile.
template <class E>
inline int parts_of(int rows, size_t operands, size_t kilobytes) {
  const int most = std::max(int((kilobytes << 10) / (operands * sizeof(typename E::A))), MAX_ROWS<E>);
  return (rows + most - 1) / most;
}

// y[rows, 32] of all tiles of rows with one panel; done(row, rows, c) gets it tile by tile. x: the tiles' operands, `filled` a row.
template <class E, class Done>
inline void multiply(const Tiles<E>& tiles, const typename E::A* x, size_t filled, const Matrix<E>& w, int panel, Done&& done) {
  const auto* b = w.panel(panel);
  const int groups = w.inputs / E::PAIR;
  alignas(64) float c[MAX_ROWS<E> * COLUMNS];
  for (int t = 0; t < tiles.size(); ++t) {
    const int row = tiles.first(t), n = tiles.first(t + 1) - row;
    const char* ahead = (const char*)b;
    size_t stride = 0;
    if (tiles.size() > 1) {
      // The first two tiles fetch half of the thread's next panel each, while this one serves them all.
      if (t < 2 && panel + 1 < w.panels()) ahead = (const char*)w.panel(panel + 1) + t * size_t(groups) * 64, stride = 64;
    } else if (n > FEW_ROWS) {
      // A panel that is read once: multiplying and reading take about as long, and neither may wait for the other. With fewer
      // rows AMD's own prefetcher does better alone, as long as it sees a single stream: so never two panels side by side,
      // though that would hide the latency of the chains.
      ahead += AHEAD_BYTES, stride = 2 * 64;
    }
    switch (const auto* a = x + (row - tiles.begin) * filled; n) {
#define TANDEM_ROWS(R) \
  case R: tile<E, R>(a, b, groups, c, ahead, stride); break;
      TANDEM_ROWS(1) TANDEM_ROWS(2) TANDEM_ROWS(3) TANDEM_ROWS(4) TANDEM_ROWS(5) TANDEM_ROWS(6)
      TANDEM_ROWS(7) TANDEM_ROWS(8) TANDEM_ROWS(9) TANDEM_ROWS(10) TANDEM_ROWS(11) TANDEM_ROWS(12)
#undef TANDEM_ROWS
    }
    done(row, n, c);
  }
}

template <class E, class Done>
inline void matmul_by(Member& team, const typename E::T* a, size_t lda, int rows, const Matrix<E>& w, Done&& done) {
  // Each thread fills its operands for itself: it costs little beside the products, and needs no waiting.
  const size_t filled = size_t(w.inputs + LINE<E> - 1) / LINE<E> * LINE<E>;  // of a row
  const int rounds = parts_of<E>(rows, filled, 384);
  static thread_local Buffer<typename E::A> operands;
  const size_t most = size_t(rows + rounds - 1) / rounds * filled;
  if (operands.size() < most) operands.resize(most);
  auto* const x = operands.data();
  int last = -1;
  team.share(w.panels(), rounds, [&](int panel, int round) {
    const Tiles<E> tiles{part_of(rows, round, rounds), part_of(rows, round + 1, rounds)};
    if (round != last)
      for (int t = 0; t < tiles.size(); ++t) {
        const int row = tiles.first(t);
        fill<E>(a + row * lda, lda, w.inputs, tiles.first(t + 1) - row, x + (row - tiles.begin) * filled);
      }
    last = round;
    multiply(tiles, x, filled, w, panel, [&](int row, int n, const float* c) { done(row, n, panel, c); });
  });
}

#if TANDEM_TILES
// By the matrix unit. It takes rows as they lie, for beside its products a copy would cost a third; only a single tile, which meets
// every panel, is laid out first.
template <class Done>
inline void matmul_by(Member& team, const bf16* a, size_t lda, int rows, const Matrix<BF16Tiles>& w, Done&& done) {
  using E = BF16Tiles;
  // Where a panel meets several tiles, PART blocks of its inputs stay in the first-level cache while FEW tiles pass by; the tiles'
  // sums wait there for the next part.
  constexpr int PART = 12, FEW = 4, AHEAD = 8192, LINES = TILE_INPUTS * COLUMNS * sizeof(bf16) / 64;  // the last in a block
  // From so many rows on each thread has rows of its own: what it made of them lies in its cache when it reads them again, and the
  // other's would have to come from there.
  constexpr int OWN_ROWS = 128;
  const bool single = rows <= MAX_ROWS<E>;
  const int rounds = std::max({1, parts_of<E>(rows, w.inputs, 1536), std::min(team.size(), rows / OWN_ROWS)});
  const int blocks = w.inputs / TILE_INPUTS, parts = single ? 1 : (blocks + PART - 1) / PART;
  static thread_local Buffer<bf16> copy;
  if (single) {
    if (copy.size() < size_t(rows) * w.inputs) copy.resize(size_t(rows) * w.inputs);
    fill<E>(a, lda, w.inputs, rows, copy.data());
  }
  Registers registers;
  team.share(rounds * w.panels(), [&](int item) {
    const int round = item / w.panels(), panel = item % w.panels();
    const Tiles<E> tiles{part_of(rows, round, rounds), part_of(rows, round + 1, rounds)};
    const int count = tiles.size();
    const bf16* const b = w.panel(panel);
    // What is fetched from memory meanwhile: of this panel what comes next, or of the next panel a share with each tile.
    const int lines = (LINES + count - 1) / count;
    const char* const next = single ? (const char*)b + AHEAD : (const char*)w.panel(panel + 1 < w.panels() ? panel + 1 : panel);
    alignas(64) float c[FEW][MAX_ROWS<E> * COLUMNS];
    for (int from = 0; from < count; from += FEW) {
      const int to = std::min(from + FEW, count);
      for (int part = 0; part < parts; ++part) {
        const int begin = part_of(blocks, part, parts), n = part_of(blocks, part + 1, parts) - begin;
        for (int t = from; t < to; ++t) {
          const int row = tiles.first(t), height = tiles.first(t + 1) - row, at = t * blocks + begin;
          const Rows x = single ? Rows{copy.data(), TILE_INPUTS, size_t(rows) * TILE_INPUTS}
                                : Rows{a + row * lda + begin * TILE_INPUTS, lda, TILE_INPUTS};
          registers.for_rows(height);
          if (single) multiply_tile<true>(x, height, b, n, false, c[0], next, LINES);
          else
            multiply_tile<false>(x, height, b + size_t(begin) * TILE_INPUTS * COLUMNS, n, part > 0, c[t - from],
                                 next + size_t(at) * lines * 64, at * lines < blocks * LINES ? lines : 0);
        }
      }
      for (int t = from; t < to; ++t) done(tiles.first(t), tiles.first(t + 1) - tiles.first(t), panel, c[t - from]);
    }
  });
}
#endif

// done(row, rows, panel, c): the finished products c[rows][32] of rows row.. with one panel.
template <class E, class Done>
inline void matmul(Member& team, const typename E::T* a, size_t lda, int rows, const Matrix<E>& w, Done&& done) {
  if (rows == 0) return;
  by_tiles<E>(w.inputs, [&](auto e) { matmul_by(team, a, lda, rows, Matrix<decltype(e)>{w.data, w.inputs, w.outputs}, done); });
}

}  // namespace tandem
