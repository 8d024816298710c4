// The operators as XLA custom calls. What an operator changes in place comes out as a result that aliases its argument.
#include "operators.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using tandem::View;

namespace {

using Buffer = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
constexpr char LAYER[] = "layer";
using Layer = ffi::Attr<int64_t, LAYER>;

std::string_view name(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::U8: return "uint8";
    case ffi::DataType::S32: return "int32";
    case ffi::DataType::F32: return "float32";
    case ffi::DataType::BF16:
    case ffi::DataType::U16: return "bfloat16";  // pools are kept as bits
    case ffi::DataType::PRED: return "bool";
    case ffi::DataType::U32: return "uint32";
    case ffi::DataType::S64: return "int64";
    case ffi::DataType::F16: return "float16";
    case ffi::DataType::F64: return "float64";
    default: return "another type";
  }
}

View view(Buffer b) { return {b.untyped_data(), name(b.element_type()), int(b.dimensions().size()), b.dimensions().begin()}; }
View view(Out b) { return view(*b); }

// XLA knows no exceptions.
template <class F>
ffi::Error status(F&& operate) {
  try {
    operate();
  } catch (const std::invalid_argument& wrong) {
    return ffi::Error::InvalidArgument(wrong.what());
  } catch (const std::exception& failed) {
    return ffi::Error::Internal(failed.what());
  }
  return ffi::Error::Success();
}

ffi::Error embed(Buffer step, Buffer weights, Buffer last_tokens, Out x) {
  return status([&] { tandem::embed(view(step), view(weights), view(last_tokens), view(x)); });
}

ffi::Error layers(Buffer step, Buffer weights, Buffer ropes, Buffer, Buffer, Buffer, Out k, Out v, Out x) {
  return status([&] { tandem::layers(view(step), view(weights), view(ropes), view(k), view(v), view(x)); });
}

ffi::Error project(Buffer step, Buffer weights, Buffer ropes, Buffer x, Buffer, Buffer, Out q, Out k, Out v, Layer layer) {
  return status([&] { tandem::project(view(step), view(weights), view(ropes), view(x), view(k), view(v), view(q), *layer); });
}

ffi::Error attend(Buffer step, Buffer weights, Buffer k, Buffer v, Buffer, Out q, Layer layer) {
  return status([&] { tandem::attend(view(step), view(weights), view(k), view(v), view(q), *layer); });
}

ffi::Error combine(Buffer step, Buffer weights, Buffer attended, Buffer, Out x, Layer layer) {
  return status([&] { tandem::combine(view(step), view(weights), view(attended), view(x), *layer); });
}

ffi::Error attention_term(Buffer step, Buffer weights, Buffer ropes, Buffer x, Buffer, Buffer, Out term, Out k, Out v,
                          Layer layer) {
  return status([&] {
    tandem::attention_term(view(step), view(weights), view(ropes), view(x), view(k), view(v), view(term), *layer);
  });
}

ffi::Error mlp_term(Buffer step, Buffer weights, Buffer x, Out term, Layer layer) {
  return status([&] { tandem::mlp_term(view(step), view(weights), view(x), view(term), *layer); });
}

ffi::Error add_attention(Buffer step, Buffer weights, Buffer sum, Buffer, Out x, Layer layer) {
  return status([&] { tandem::add_attention(view(step), view(weights), view(sum), view(x), *layer); });
}

ffi::Error add_mlp(Buffer step, Buffer weights, Buffer sum, Buffer, Out x, Layer layer) {
  return status([&] { tandem::add_mlp(view(step), view(weights), view(sum), view(x), *layer); });
}

ffi::Error head(Buffer step, Buffer weights, Buffer x, Buffer, Out logits) {
  return status([&] { tandem::head(view(step), view(weights), view(x), view(logits)); });
}

ffi::Error adjust(Buffer step, Buffer changes, Buffer logits, Out changed) {
  return status([&] { tandem::adjust(view(step), view(changes), view(logits), view(changed)); });
}

ffi::Error sample(Buffer step, Buffer logits, Buffer changed, Buffer, Out sampled, Out last_tokens) {
  return status([&] { tandem::sample(view(step), view(logits), view(changed), view(last_tokens), view(sampled)); });
}

}  // namespace

#define TANDEM_EXPORT extern "C" __attribute__((visibility("default")))
#define TANDEM_HANDLER(name)                                        \
  TANDEM_EXPORT XLA_FFI_Error* tandem_##name(XLA_FFI_CallFrame* f) { \
    static auto* handler = ffi::Ffi::BindTo(name).release();        \
    return handler->Call(f);                                        \
  }

TANDEM_HANDLER(embed)
TANDEM_HANDLER(layers)
TANDEM_HANDLER(project)
TANDEM_HANDLER(attend)
TANDEM_HANDLER(combine)
TANDEM_HANDLER(attention_term)
TANDEM_HANDLER(mlp_term)
TANDEM_HANDLER(add_attention)
TANDEM_HANDLER(add_mlp)
TANDEM_HANDLER(head)
TANDEM_HANDLER(adjust)
TANDEM_HANDLER(sample)

TANDEM_EXPORT const char* tandem_arithmetic(bool bfloat16) { return tandem::arithmetic(bfloat16); }
TANDEM_EXPORT void tandem_threads(int threads) { tandem::threads(threads); }
TANDEM_EXPORT void tandem_huge(void* data, size_t size) { tandem::huge(data, size); }
