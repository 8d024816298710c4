// The operators registered with PyTorch's dispatcher. Outputs are given and written in place, so that a graph compiler sees
// what changes and no operator allocates.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "operators.h"

using at::Tensor;
using tandem::View;

namespace {

std::string_view name(at::ScalarType type) {
  switch (type) {
    case at::kByte: return "uint8";
    case at::kInt: return "int32";
    case at::kFloat: return "float32";
    case at::kBFloat16: return "bfloat16";
    default: return c10::toString(type);
  }
}

View view(const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous() && t.device().is_cpu(), "expected a contiguous tensor on the CPU, got one on ", t.device(),
                    " of sizes ", t.sizes(), " and strides ", t.strides());
  return {t.data_ptr(), name(t.scalar_type()), int(t.dim()), t.sizes().data()};
}

void embed(const Tensor& step, const Tensor& weights, const Tensor& last_tokens, const Tensor& x) {
  tandem::embed(view(step), view(weights), view(last_tokens), view(x));
}

void layers(const Tensor& step, const Tensor& weights, const Tensor& ropes, const Tensor& k, const Tensor& v, const Tensor& x) {
  tandem::layers(view(step), view(weights), view(ropes), view(k), view(v), view(x));
}

void project(const Tensor& step, const Tensor& weights, const Tensor& ropes, const Tensor& x, const Tensor& k, const Tensor& v,
             const Tensor& q, int64_t layer) {
  tandem::project(view(step), view(weights), view(ropes), view(x), view(k), view(v), view(q), layer);
}

void attend(const Tensor& step, const Tensor& weights, const Tensor& k, const Tensor& v, const Tensor& q, int64_t layer) {
  tandem::attend(view(step), view(weights), view(k), view(v), view(q), layer);
}

void combine(const Tensor& step, const Tensor& weights, const Tensor& attended, const Tensor& x, int64_t layer) {
  tandem::combine(view(step), view(weights), view(attended), view(x), layer);
}

int64_t layers_in_terms(const Tensor& step, const Tensor& weights, const Tensor& ropes, const Tensor& k, const Tensor& v,
                        const Tensor& x, const Tensor& memory, int64_t rank, int64_t ranks) {
  return int64_t(tandem::layers_in_terms(view(step), view(weights), view(ropes), view(k), view(v), view(x), view(memory), rank, ranks));
}

void head(const Tensor& step, const Tensor& weights, const Tensor& x, const Tensor& logits) {
  tandem::head(view(step), view(weights), view(x), view(logits));
}

void adjust(const Tensor& step, const Tensor& changes, const Tensor& logits, const Tensor& changed) {
  tandem::adjust(view(step), view(changes), view(logits), view(changed));
}

void sample(const Tensor& step, const Tensor& logits, const Tensor& changed, const Tensor& last_tokens, const Tensor& sampled) {
  tandem::sample(view(step), view(logits), view(changed), view(last_tokens), view(sampled));
}

void best(const Tensor& logits, int64_t real, const Tensor& best) { tandem::best(view(logits), real, view(best)); }

void huge(const Tensor& t) { tandem::huge(t.data_ptr(), t.nbytes()); }

void threads(int64_t count) { tandem::threads(int(count)); }

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* tandem_arithmetic(bool bfloat16) {
  return tandem::arithmetic(bfloat16);
}

TORCH_LIBRARY(tandem, m) {
  m.def("embed(Tensor step, Tensor weights, Tensor last_tokens, Tensor(a!) x) -> ()");
  m.def("layers(Tensor step, Tensor weights, Tensor ropes, Tensor(a!) k, Tensor(b!) v, Tensor(c!) x) -> ()");
  m.def(
      "project(Tensor step, Tensor weights, Tensor ropes, Tensor x, Tensor(a!) k, Tensor(b!) v, Tensor(c!) q, int layer) -> ()");
  m.def("attend(Tensor step, Tensor weights, Tensor k, Tensor v, Tensor(a!) q, int layer) -> ()");
  m.def("combine(Tensor step, Tensor weights, Tensor attended, Tensor(a!) x, int layer) -> ()");
  m.def(
      "layers_in_terms(Tensor step, Tensor weights, Tensor ropes, Tensor(a!) k, Tensor(b!) v, Tensor(c!) x, Tensor(d!) memory, "
      "int rank, int ranks) -> int");
  m.def("head(Tensor step, Tensor weights, Tensor x, Tensor(a!) logits) -> ()");
  m.def("adjust(Tensor step, Tensor changes, Tensor logits, Tensor(a!) changed) -> ()");
  m.def("sample(Tensor step, Tensor logits, Tensor changed, Tensor(a!) last_tokens, Tensor(b!) sampled) -> ()");
  m.def("best(Tensor logits, int real, Tensor(a!) best) -> ()");
  m.def("huge(Tensor data) -> ()");
  m.def("threads(int count) -> ()", &threads);
}

TORCH_LIBRARY_IMPL(tandem, CPU, m) {
  m.impl("huge", &huge);
  m.impl("embed", &embed);
  m.impl("layers", &layers);
  m.impl("project", &project);
  m.impl("attend", &attend);
  m.impl("combine", &combine);
  m.impl("layers_in_terms", &layers_in_terms);
  m.impl("head", &head);
  m.impl("adjust", &adjust);
  m.impl("sample", &sample);
  m.impl("best", &best);
}
