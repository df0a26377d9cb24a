// Kernels of dispatch keys that wrap the operators which write to an argument.
#pragma once

#include <torch/library.h>

#include <string>
#include <tuple>

#include "binding/operators.h"

namespace masked_softmax {

// Wrapper::write(name, written, call, arguments...) wraps one operator: `written` is the tensor that it writes to, and
// call(arguments...) calls it.
template <class Wrapper, class Operator, class Function = typename Operator::Signature::Function>
struct WriteKernel;

template <class Wrapper, class Operator, class... Arguments>
struct WriteKernel<Wrapper, Operator, void(Arguments...)> {
  static void run(Arguments... arguments) {
    at::Tensor& written = std::get<at::Tensor&>(std::tuple<Arguments...>(arguments...));
    const auto call = [](auto&&... passed) { handle_of<Operator>().call(passed...); };
    Wrapper::write(Operator::kName, written, call, arguments...);
  }
};

template <class Wrapper>
void register_write_kernels(torch::Library& library) {
  for_each_writing_operator(
      [&](auto op) { library.impl(full_name(op).c_str(), WriteKernel<Wrapper, decltype(op)>::run); });
}

}  // namespace masked_softmax
