// Products of bfloat16 by Intel's matrix unit, AMX (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
// chapter 18). It has eight registers of up to sixteen lines of 64 bytes, and one instruction:
//
//   C[r][16] += A[r][32] B[32][16]
//
// A and B in bfloat16, B as pairs of its first dimension, which is how weights, keys and values lie. What is added to an element of C
// depends on its row of A and its column of B alone, so r may be any number of rows up to sixteen. The unit rounds to nearest and
// takes subnormals as zero, whatever MXCSR says. A process has to ask the system for it: `build.py` does, and defines TANDEM_AMX
// where it is granted.
#pragma once

#include "vec.h"

#if defined(TANDEM_AMX) && defined(__AMX_BF16__) && defined(TANDEM_AVX512BF16)
#define TANDEM_TILES 1
#else
#define TANDEM_TILES 0
#endif

namespace tandem {

// What this build multiplies with, by its name: products of bfloat16 or of float32.
constexpr const char* arithmetic(bool bfloat16) {
  return bfloat16 && TANDEM_TILES ? "AMX" : bfloat16 && TANDEM_DOT ? "AVX-512 BF16" : TANDEM_VECTORS;
}

constexpr int TILE_ROWS = 16, TILE_INPUTS = 32;  // of A; a line of it is 64 bytes

#if TANDEM_TILES

// The shapes of a thread's tile registers, as the processor reads them. Loading them clears the registers. At the end of its scope
// they are given back: other libraries use them too.
class Registers {
 public:
  Registers() = default;
  Registers(const Registers&) = delete;
  ~Registers() {
    if (palette_) _tile_release();
  }

  // Up to 32 rows times two tiles of outputs: in 0 to 3 the sums, in 4 and 5 the rows, in 6 and 7 the outputs.
  void for_rows(int rows) {
    if (rows == loaded_) return;
    const int upper = rows < TILE_ROWS ? rows : TILE_ROWS, lower = rows - upper;
    for (int sum = 0; sum < 2; ++sum) shape(sum, upper, 64), shape(2 + sum, lower, 64);
    shape(4, upper, 64), shape(5, lower, 64), shape(6, 16, 64), shape(7, 16, 64);
    load(rows);
  }

  // Or attention of up to sixteen rows: in 0 to 3 the sums, in 4 queries, in 5 the probabilities of sixteen keys, in 6 sixteen
  // keys, of each sixteen pairs of dimensions, in 7 sixteen dimensions of the values of eight pairs of keys.
  void for_queries(int rows) {
    if (-rows == loaded_) return;
    for (int i = 0; i < 5; ++i) shape(i, rows, 64);
    shape(5, rows, 32), shape(6, 16, 64), shape(7, 8, 64);
    load(-rows);
  }

 private:
  void shape(int which, int rows, int bytes) {
    rows_[which] = uint8_t(rows);
    bytes_[which] = uint16_t(rows ? bytes : 0);
  }

  void load(int which) {
    palette_ = 1, loaded_ = which;
    asm volatile("" ::: "memory");
    _tile_loadconfig(this);
  }

  alignas(64) uint8_t palette_ = 0;
  uint8_t start_ = 0, reserved_[14] = {};
  uint16_t bytes_[16] = {};
  uint8_t rows_[16] = {};
  int loaded_ = 0;  // rows of a matmul, or less the rows of attention
};

// Where a tile of rows lies: elements from one row to the next, and from 32 inputs of a row to the next 32.
struct Rows {
  const bf16* data;
  size_t row, block;
};

// c[rows][32] (+)= a tile of up to 32 rows times `blocks` of 32 inputs of a panel. `more`: c holds the sums of the inputs before.
// With each block `lines` cache lines at `ahead` are fetched. The registers must be `for_rows(rows)`. ONCE: the panel comes from
// memory and is not read again. Then vectors bring each block into the first-level cache, a line for each that they ask for, and
// memory answers them faster than the loads of a tile.
template <bool ONCE>
inline void multiply_tile(Rows a, int rows, const bf16* b, int blocks, bool more, float* c, const char* ahead, int lines) {
  constexpr int WIDTH = 2 * 16 * sizeof(float), HALF = TILE_ROWS * 32;  // bytes of a row of c, as of pairs in a panel; elements
  constexpr int SIZE = 2 * 16 * TILE_INPUTS, LINE = 64 / sizeof(bf16);  // of a block; elements
  const bool both = rows > TILE_ROWS;
  alignas(64) bf16 near[2][ONCE ? SIZE : 1];
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler what they read
  if (more) {
    _tile_loadd(0, c, WIDTH);
    _tile_loadd(1, c + 16, WIDTH);
    if (both) {
      _tile_loadd(2, c + HALF, WIDTH);
      _tile_loadd(3, c + HALF + 16, WIDTH);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int k = 0; k < blocks; ++k, a.data += a.block, b += SIZE) {
    const bf16* outputs = b;
    if (ONCE) {
      bf16* const to = near[k % 2];
      for (int i = 0; i < SIZE; i += LINE, ahead += 64) {
        prefetch(ahead);
        _mm512_store_si512(to + i, _mm512_loadu_si512(b + i));
      }
      asm volatile("" ::: "memory");
      outputs = to;
    }
    _tile_loadd(6, outputs, WIDTH);
    _tile_loadd(4, a.data, a.row * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, outputs + 32, WIDTH);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_loadd(5, a.data + TILE_ROWS * a.row, a.row * sizeof(bf16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (!ONCE)
      for (int i = 0; i < lines; ++i, ahead += 64) prefetch(ahead);
  }
  _tile_stored(0, c, WIDTH);
  _tile_stored(1, c + 16, WIDTH);
  if (both) {
    _tile_stored(2, c + HALF, WIDTH);
    _tile_stored(3, c + HALF + 16, WIDTH);
  }
}

// bfloat16 whose products the unit makes: operands stay as they are stored.
struct BF16Tiles : BF16 {
  using A = bf16;
  using Registers = tandem::Registers;
  static constexpr bool TILES = true;
};
#endif

// Calls f with the element type that adds up n products: E, or E by the matrix unit where there is one that n suits. n is a property
// of the model, so the choice does not change from step to step.
template <class E, class F>
TANDEM_INLINE void by_tiles(int n, F&& f) {
#if TANDEM_TILES
  if constexpr (std::is_same_v<E, BF16>) {
    if (n % TILE_INPUTS == 0) return f(BF16Tiles{});
  }
#endif
  f(E{});
}

}  // namespace tandem
