// The matmul alone, to measure what a machine can do at most: rows and packed weights in, their products out.

#include "matmul.h"

#define TANDEM_EXPORT extern "C" __attribute__((visibility("default")))

namespace tandem {

template <class E>
void product(const typename E::T* a, const typename E::T* w, int rows, int inputs, int outputs, int threads, typename E::T* y) {
  Pool& pool = Pool::get();
  pool.resize(threads);
  pool.run([&](Member& team) {
    matmul<E>(team, a, inputs, rows, Matrix<E>{w, inputs, outputs}, [&](int row, int n, int panel, const float* c) {
      for (int r = 0; r < n; ++r)
        for (int i = 0; i < COLUMNS && panel * COLUMNS + i < outputs; i += LANES) {
          const int at = panel * COLUMNS + i;
          put<E>(y + size_t(row + r) * outputs + at, load(c + r * COLUMNS + i), outputs - at);
        }
    });
  });
}

}  // namespace tandem

using tandem::bf16;

// y[rows, outputs] = a[rows, inputs] times w, which lies in panels of 32 outputs; inputs is a multiple of two.
TANDEM_EXPORT void tandem_multiply_float32(const float* a, const float* w, int rows, int inputs, int outputs, int threads, float* y) {
  tandem::product<tandem::F32>(a, w, rows, inputs, outputs, threads, y);
}

TANDEM_EXPORT void tandem_multiply_bfloat16(const bf16* a, const bf16* w, int rows, int inputs, int outputs, int threads, bf16* y) {
  tandem::product<tandem::BF16>(a, w, rows, inputs, outputs, threads, y);
}
