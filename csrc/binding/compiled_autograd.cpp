// Support for compiled autograd (torch._dynamo.compiled_autograd), through internals of torch that may change with any
// release. Written against torch 2.11, 2.12, 2.13 and 2.14.
//
// When the next release appears, compare with a generated node in torch/csrc/autograd/generated/Functions.cpp:
//   - Node::compiled_args and Node::apply_with_saved keep their signatures; an Edge's function still is a pointer that
//     autograd_node.cpp can make (std::shared_ptr with deleteNode(), or c10::intrusive_ptr), and Node still has mutex_;
//   - CompiledNodeArgs::collect takes these types, and SwapSavedVariables has before(), after() and get_py_compiler();
//   - PyCompilerInterface::bind_function and call_function take these arguments; PackedArgs and IValuePacker exist.
// tests/pytorch/test_compile.py runs compiled autograd, and fails if a node is not told apart by what it collects.
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <type_traits>

#include "binding/autograd_node.h"

namespace masked_softmax {

using torch::autograd::variable_list;
using torch::dynamo::autograd::PackedArgs;

// The cache key: everything that the traced program depends on.
void OperatorNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  args.collect(std::string(formula_.node_name));
  args.collect(options_.dim);
  args.collect(options_.scale);
  // Its value, not a symbol: apply_with_saved() makes it a constant of the program.
  args.collect(options_.packed.has_value());
  args.collect(options_.packed.has_value() ? options_.packed->guard_int(__FILE__, __LINE__) : 0);
  args.collect(options_.input_dtype);
  for (const Saved& saved : saved_) {
    args.collect(saved.tensor, saved.is_output);
  }
}

variable_list OperatorNode::apply_with_saved(const variable_list& grads,
                                             torch::dynamo::autograd::SwapSavedVariables& swap) {
  for (Saved& saved : saved_) {
    swap.before(saved.tensor);
  }
  // The traced program calls this with its own tensors; the rest is constant in it.
  const auto apply_in_program = [formula = &formula_, options = options_](const variable_list& inputs,
                                                                          const std::vector<c10::IValue>& values) {
    PackedArgs args(values);
    const auto tensors = args.unpack<variable_list>();
    const auto is_needed = args.unpack<std::vector<bool>>();
    return gradients_of(*formula, options, inputs, tensors, is_needed);
  };
  PackedArgs args;
  args.pack(unpack());
  args.pack(needed());
  std::vector<at::TypePtr> types;
  for (const c10::IValue& value : args.vec()) {
    types.push_back(value.type());
  }
  const auto& interface = torch::dynamo::autograd::getPyCompilerInterface();
  // A custom function's name need not be unique: every node binds its own.
  const std::string function =
      interface->bind_function(swap.get_py_compiler(), name(), apply_in_program, types, /*is_custom_function=*/true);
  const auto metadata = torch::dynamo::autograd::get_input_metadata(next_edges());
  variable_list result = interface->call_function(
      swap.get_py_compiler(), "apply_functional", function, grads, args.vec(),
      torch::dynamo::autograd::IValuePacker<std::remove_const_t<decltype(metadata)>>::pack(metadata));
  for (Saved& saved : saved_) {
    swap.after(saved.tensor);
  }
  return result;
}

}  // namespace masked_softmax
