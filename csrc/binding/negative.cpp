// Views with the negative bit (the imaginary part of a conjugate). The operators get copies without it. What they write
// to is computed into such a copy, then copied back.
//
// torch's fallback does the same, but it copies from a storage that was freed, and it knows only operators that return
// what they write to.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>

#include "binding/checks.h"
#include "binding/writes.h"

namespace masked_softmax {
namespace {

constexpr c10::DispatchKeySet kNegative{c10::DispatchKey::Negative};

at::Tensor resolve(const at::Tensor& tensor, const char* name) {
  if (!tensor.is_neg()) {
    return tensor;
  }
  check_storage(tensor, name);
  return tensor.resolve_neg();
}

struct ResolveNegative {
  template <class Call, class... Arguments>
  static void write(const char* name, at::Tensor& written, const Call& call, Arguments&... arguments) {
    write_resolved(name, written, call, arguments...);
  }

  // masked_softmax_with_sink_: the weights are passed on as they are. The operator writes them with copy_(), which
  // takes the bit into account.
  template <class Call, class... Rows>
  static void write(const char* name, at::Tensor& written, const Call& call, at::Tensor& input, const at::Tensor& sink,
                    const OptionalTensor& sink_weight, Rows&... rows) {
    const auto call_with_weight = [&](at::Tensor& plain, const at::Tensor& plain_sink, const auto&... plain_rows) {
      call(plain, plain_sink, sink_weight, plain_rows...);
    };
    write_resolved(name, written, call_with_weight, input, sink, rows...);
  }

 private:
  template <class Call, class... Arguments>
  static void write_resolved(const char* name, at::Tensor& written, const Call& call, Arguments&... arguments) {
    if (written.is_neg() && !written.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      check_no_internal_overlap(written_argument(name), written, name);  // a tensor without the bit would hide it
    }
    const c10::impl::ExcludeDispatchKeyGuard below(kNegative);
    at::Tensor plain = resolve(written, name);
    call(resolved(arguments, plain, name)...);
    if (written.is_neg()) {
      written.copy_(plain);
    }
  }

  // Tensors without the negative bit; `plain` in place of the one that is written to.
  static at::Tensor& resolved(at::Tensor& /*written*/, at::Tensor& plain, const char* /*name*/) { return plain; }
  static at::Tensor resolved(const at::Tensor& tensor, at::Tensor& /*plain*/, const char* name) {
    return resolve(tensor, name);
  }
  static OptionalTensor resolved(const OptionalTensor& tensor, at::Tensor& /*plain*/, const char* name) {
    return tensor.has_value() ? OptionalTensor(resolve(*tensor, name)) : std::nullopt;
  }
  template <class Other>
  static const Other& resolved(const Other& argument, at::Tensor& /*plain*/, const char* /*name*/) {
    return argument;
  }
};

// For the operators that return new tensors.
template <class Operator>
void resolve_arguments(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = torch::jit::peek(*stack, i, count);
    if (value.isTensor()) {
      value = resolve(value.toTensor(), Operator::kName);
    }
  }
  const c10::impl::ExcludeDispatchKeyGuard below(kNegative);
  op.callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(masked_softmax_ext, Negative, m) {
  register_write_kernels<ResolveNegative>(m);
  for_each_functional_operator([&](auto op) {
    m.impl(full_name(op).c_str(), torch::CppFunction::makeFromBoxedFunction<&resolve_arguments<decltype(op)>>());
  });
}

}  // namespace masked_softmax
