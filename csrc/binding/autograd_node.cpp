#include "binding/autograd_node.h"

#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

namespace masked_softmax {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

template <class T, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<OperatorNode::Pointer, std::shared_ptr<Node>>) {
    // torch's deleter frees long chains of nodes without recursion. Only versions with shared_ptr have it.
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

// The caller's name of the argument. The starts of packed rows are a view of the offsets.
const char* starts_name(const CallOptions& options) { return options.packed.has_value() ? "offsets" : "starts"; }

// torch's own error does not say which tensor it is.
SavedVariable save_bounds(const char* what, const OptionalTensor& bounds, const GradientFormula& formula) {
  TORCH_CHECK(!bounds.has_value() || !bounds->is_inference(), formula.node_name, ": expected ", what,
              " that can be saved for backward, but got an inference tensor, made in torch.inference_mode(); ",
              "outside of it, ", what, ".clone() makes a normal one");
  return SavedVariable(bounds, false);
}

}  // namespace

OperatorNode::OperatorNode(const GradientFormula& formula, const CallView& call) : formula_(formula), options_(call) {
  saved_.reserve(5);
  saved_.push_back({save_bounds("lengths", call.lengths, formula), false});
  saved_.push_back({save_bounds(starts_name(call), call.starts, formula), false});
}

OperatorNode* OperatorNode::create(const GradientFormula& formula, const CallView& call,
                                   std::initializer_list<const at::Tensor*> inputs, Pointer& owner) {
  bool requires_grad = false;
  for (const at::Tensor* input : inputs) {
    requires_grad = requires_grad || torch::autograd::compute_requires_grad(*input);
  }
  if (!requires_grad) {
    return nullptr;
  }
  torch::autograd::edge_list edges;
  for (const at::Tensor* input : inputs) {
    edges.push_back(torch::autograd::impl::gradient_edge(*input));
  }
  auto node = make_node<OperatorNode>(formula, call);
  node->set_next_edges(std::move(edges));
  owner = node;
  return node.get();
}

void OperatorNode::save(const at::Tensor& tensor) { saved_.push_back({SavedVariable(tensor, false), false}); }

void OperatorNode::save_output(const at::Tensor& output, bool is_in_place) {
  saved_.push_back({SavedVariable(output, true, is_in_place && output.is_view()), true});
}

std::vector<bool> OperatorNode::needed() const {
  std::vector<bool> result(formula_.inputs);
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = task_should_compute_output(i);
  }
  return result;
}

variable_list OperatorNode::unpack() {
  variable_list result;
  result.reserve(saved_.size());
  for (size_t i = 0; i < saved_.size(); ++i) {
    try {
      result.push_back(saved_[i].is_output ? saved_[i].tensor.unpack(getptr()) : saved_[i].tensor.unpack());
    } catch (c10::Error& error) {
      // It was changed since: torch's error does not say which tensor it is.
      if (i < 2) {
        const std::string what = i == 0 ? "lengths" : starts_name(options_);
        error.add_context("it is " + what + " of " + name() + "; pass " + what + ".clone() if it changes later");
      }
      throw;
    }
  }
  return result;
}

variable_list OperatorNode::gradients_of(const GradientFormula& formula, const CallOptions& options,
                                         const variable_list& grads, const variable_list& tensors,
                                         const std::vector<bool>& is_needed) {
  if (std::none_of(grads.begin(), grads.end(), [](const at::Tensor& grad) { return grad.defined(); })) {
    return variable_list(formula.inputs);
  }
  const auto bounds = [&](size_t i) { return tensors[i].defined() ? OptionalTensor(tensors[i]) : std::nullopt; };
  const OptionalTensor lengths = bounds(0);
  const OptionalTensor starts = bounds(1);
  return formula.gradients({options, lengths, starts}, grads, {tensors.begin() + 2, tensors.end()}, is_needed);
}

variable_list OperatorNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return gradients_of(formula_, options_, grads, unpack(), needed());
}

void OperatorNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Saved& saved : saved_) {
    saved.tensor.reset_data();
  }
}

}  // namespace masked_softmax
