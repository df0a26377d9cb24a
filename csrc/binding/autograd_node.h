// The node of the autograd graph for every operator that has a derivative.
//
// Written by hand, as the nodes of torch's own operators are: torch::autograd::Function does not run inside
// torch.func's transforms, and costs a microsecond more per call.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <string>
#include <vector>

#include "binding/operators.h"

namespace masked_softmax {

// What the node keeps of a call, besides tensors.
struct CallOptions {
  int64_t dim;
  OptionalScale scale;
  OptionalSymInt packed;
  at::ScalarType input_dtype;
};

// One call's arguments, while they are alive.
struct CallView : CallOptions {
  const OptionalTensor& lengths;
  const OptionalTensor& starts;

  RowArguments rows() const { return {lengths, dim, starts, scale}; }
};

// How an operator is differentiated.
struct GradientFormula {
  const char* node_name;
  size_t inputs;  // number of tensors that the operator is differentiated with respect to
  // Returns the gradients of the inputs, where is_needed, from the gradients of the results, of which at least one is
  // defined. `saved` holds the tensors that save() got, in order.
  torch::autograd::variable_list (*gradients)(const CallView& call, const torch::autograd::variable_list& grads,
                                              const torch::autograd::variable_list& saved,
                                              const std::vector<bool>& is_needed);
};

inline CallView view_of(const RowArguments& rows, OptionalSymInt packed, at::ScalarType input_dtype) {
  return {{rows.dim, rows.scale, packed, input_dtype}, rows.lengths, rows.starts};
}

// Tangents of forward-mode differentiation.
inline at::Tensor tangent_of(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0); }

inline bool has_tangent(const at::Tensor& tensor) { return tangent_of(tensor).defined(); }

inline at::Tensor primal_of(const at::Tensor& tensor) {
  return has_tangent(tensor) ? tensor._fw_primal(/*level=*/0) : tensor;
}

inline void set_tangent(const at::Tensor& tensor, const at::Tensor& tangent, bool is_in_place) {
  tensor._set_fw_grad(tangent, /*level=*/0, is_in_place);
}

class OperatorNode : public torch::autograd::Node {
 public:
  // std::shared_ptr in torch 2.11, c10::intrusive_ptr in 2.13 and 2.14.
  using Pointer = decltype(torch::autograd::Edge::function);

  OperatorNode(const GradientFormula& formula, const CallView& call);

  // Returns a node whose edges lead to the inputs' own nodes, or null if no input requires grad.
  static OperatorNode* create(const GradientFormula& formula, const CallView& call,
                              std::initializer_list<const at::Tensor*> inputs, Pointer& owner);

  void save(const at::Tensor& tensor);
  void save_output(const at::Tensor& output, bool is_in_place);

  std::string name() const override { return formula_.node_name; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void release_variables() override;

  // compiled_autograd.cpp
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  torch::dynamo::autograd::SwapSavedVariables& swap) override;

 private:
  struct Saved {
    torch::autograd::SavedVariable tensor;
    bool is_output;
  };

  // tensors: lengths, starts, and those of the formula.
  static torch::autograd::variable_list gradients_of(const GradientFormula& formula, const CallOptions& options,
                                                     const torch::autograd::variable_list& grads,
                                                     const torch::autograd::variable_list& tensors,
                                                     const std::vector<bool>& is_needed);

  std::vector<bool> needed() const;
  torch::autograd::variable_list unpack();

  const GradientFormula& formula_;
  const CallOptions options_;
  std::vector<Saved> saved_;  // lengths, starts, and what save() got
};

}  // namespace masked_softmax
