// The sampler alone, for tests and notebooks: rows of logits in, their tokens out.

#include <cstddef>

#include "sample.h"

static_assert(sizeof(tandem::SampleParams) == 36 && sizeof(tandem::Sampled) == 180, "the layouts that callers rely on");

// logits[rows][vocab], params[rows], scratch[threads][vocab], out[rows]; vocab and threads at least 1.
extern "C" __attribute__((visibility("default"))) void tandem_sample_rows(const float* logits, int rows, int vocab,
                                                                          const tandem::SampleParams* params, int threads,
                                                                          float* scratch, tandem::Sampled* out) {
  tandem::Pool& pool = tandem::Pool::get();
  pool.resize(threads);
  pool.run([&](tandem::Member& member) {
    member.share(rows, [&](int row) {
      const float* x = logits + size_t(row) * vocab;
      tandem::sample_row(x, x, vocab, params[row], scratch + size_t(member.id) * vocab, out[row]);
    });
  });
}
