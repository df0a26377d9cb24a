// A node of the autograd graph, for every operator that has one. Written by hand, as torch's own are: it runs inside of
// torch.func's transforms, where torch::autograd::Function does not, and costs a call a microsecond less.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <string>
#include <vector>

#include "binding/operators.h"

namespace masked_softmax {

// What an operator takes beside its tensors.
struct Options {
  bool is_log;
  int64_t dim;
  OptionalScale scale;
  OptionalInt packed;
};

// What it takes beside its tensors of scores.
struct Rows : Options {
  const at::Tensor& lengths;
  const OptionalTensor& starts;
};

// How an operator is differentiated.
struct Formula {
  const char* name;  // of its node
  size_t inputs;     // how many tensors it is differentiated with respect to
  // The gradients of its inputs, those that are needed, from that of its result. saved: what save() was given, in
  // order.
  torch::autograd::variable_list (*gradients)(const Rows& rows, at::ScalarType input_dtype, const at::Tensor& grad,
                                              const torch::autograd::variable_list& saved,
                                              const std::vector<bool>& is_needed);
};

class RowsNode : public torch::autograd::Node {
 public:
  // A std::shared_ptr in older versions of torch, a c10::intrusive_ptr in newer ones.
  using Pointer = decltype(torch::autograd::Edge::function);

  RowsNode(const Formula& formula, const Rows& rows, at::ScalarType input_dtype);

  void save(const at::Tensor& tensor);
  void save_output(const at::Tensor& output, bool is_in_place);

  std::string name() const override { return formula_.name; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void release_variables() override;

  // For compiled autograd: what tells this node from others, and a call of its formula in the program.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  torch::dynamo::autograd::SwapSavedVariables& swap) override;

 private:
  struct Saved {
    torch::autograd::SavedVariable tensor;
    bool is_output;
  };

  std::vector<bool> needed() const;
  torch::autograd::variable_list unpack();

  const Formula& formula_;
  const Options options_;
  const at::ScalarType input_dtype_;
  std::vector<Saved> saved_;  // lengths, starts, and what save() was given
};

// A node whose edges lead to where the inputs came from, or null where none of them requires grad.
RowsNode* node_for(const Formula& formula, const Rows& rows, at::ScalarType input_dtype,
                   std::initializer_list<const at::Tensor*> inputs, RowsNode::Pointer& owner);

}  // namespace masked_softmax
