#include "binding/rows_node.h"

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

namespace masked_softmax {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::PackedArgs;

template <class T, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<RowsNode::Pointer, std::shared_ptr<Node>>) {
    // torch's own deleter takes long chains of nodes apart without recursion. Only versions with shared_ptr have it.
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

// tensors: lengths, starts, and the formula's.
variable_list gradients_of(const Formula& formula, const Options& options, at::ScalarType input_dtype,
                           const at::Tensor& grad, const variable_list& tensors, const std::vector<bool>& is_needed) {
  if (!grad.defined()) {
    return variable_list(formula.inputs);
  }
  const OptionalTensor starts = tensors[1].defined() ? OptionalTensor(tensors[1]) : std::nullopt;
  const Rows rows{options, tensors[0], starts};
  return formula.gradients(rows, input_dtype, grad, {tensors.begin() + 2, tensors.end()}, is_needed);
}

}  // namespace

RowsNode::RowsNode(const Formula& formula, const Rows& rows, at::ScalarType input_dtype)
    : formula_(formula), options_(rows), input_dtype_(input_dtype) {
  saved_.reserve(5);
  saved_.push_back({SavedVariable(rows.lengths, false), false});
  saved_.push_back({SavedVariable(rows.starts, false), false});
}

void RowsNode::save(const at::Tensor& tensor) { saved_.push_back({SavedVariable(tensor, false), false}); }

void RowsNode::save_output(const at::Tensor& output, bool is_in_place) {
  saved_.push_back({SavedVariable(output, true, is_in_place && output.is_view()), true});
}

std::vector<bool> RowsNode::needed() const {
  std::vector<bool> result;
  for (size_t i = 0; i < formula_.inputs; ++i) {
    result.push_back(task_should_compute_output(i));
  }
  return result;
}

variable_list RowsNode::unpack() {
  variable_list result;
  for (const Saved& saved : saved_) {
    result.push_back(saved.is_output ? saved.tensor.unpack(getptr()) : saved.tensor.unpack());
  }
  return result;
}

variable_list RowsNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return gradients_of(formula_, options_, input_dtype_, grads[0], unpack(), needed());
}

void RowsNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Saved& saved : saved_) {
    saved.tensor.reset_data();
  }
}

void RowsNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  args.collect(std::string(formula_.name));
  args.collect(options_.dim);
  args.collect(options_.scale);
  args.collect(options_.packed);
  args.collect(input_dtype_);
  for (const Saved& saved : saved_) {
    args.collect(saved.tensor, saved.is_output);
  }
}

variable_list RowsNode::apply_with_saved(const variable_list& grads,
                                         torch::dynamo::autograd::SwapSavedVariables& swap) {
  for (Saved& saved : saved_) {
    swap.before(saved.tensor);
  }
  // The program calls this with tensors of its own; whatever else the call depends on is part of the program.
  const auto apply_in_program = [formula = &formula_, options = options_, input_dtype = input_dtype_](
                                    const variable_list& inputs, const std::vector<c10::IValue>& values) {
    PackedArgs args(values);
    const auto tensors = args.unpack<variable_list>();
    const auto is_needed = args.unpack<std::vector<bool>>();
    return gradients_of(*formula, options, input_dtype, inputs[0], tensors, is_needed);
  };
  PackedArgs args;
  args.pack(unpack());
  args.pack(needed());
  std::vector<at::TypePtr> types;
  for (const c10::IValue& value : args.vec()) {
    types.push_back(value.type());
  }
  const auto& interface = torch::dynamo::autograd::getPyCompilerInterface();
  // A custom function's name need not be new: each node binds one.
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

RowsNode* node_for(const Formula& formula, const Rows& rows, at::ScalarType input_dtype,
                   std::initializer_list<const at::Tensor*> inputs, RowsNode::Pointer& owner) {
  bool requires_grad = false;
  torch::autograd::edge_list edges;
  for (const at::Tensor* input : inputs) {
    requires_grad = requires_grad || torch::autograd::compute_requires_grad(*input);
  }
  if (!requires_grad) {
    return nullptr;
  }
  for (const at::Tensor* input : inputs) {
    edges.push_back(torch::autograd::impl::gradient_edge(*input));
  }
  auto node = make_node<RowsNode>(formula, rows, input_dtype);
  node->set_next_edges(std::move(edges));
  owner = node;
  return node.get();
}

}  // namespace masked_softmax
