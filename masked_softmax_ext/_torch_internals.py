"""Every access to torch's private interfaces from Python.

They work with torch 2.11 to 2.14. For the next release, check that

- Dynamo still stores a node's result during capture in ``node.meta["example_value"]``, tensors as
  ``FakeTensor``, and still captures ``Tensor.data`` as a call of ``_get_data_attr`` and changes of
  the grad mode under the names in ``_GRAD_MODES``;
- ``torch._C._is_alias_of`` still exists, and a write still adds 1 to ``Tensor._version``;
- ``torch._dynamo.lookup_backend`` and ``torch._inductor.list_mode_options`` still exist, and
  Inductor's backend still takes ``config_patches``;
- ``OpOverload._schema`` still lists the arguments with ``name`` and ``kwarg_only``;
- jagged tensors still have ``_ragged_idx`` and ``_maybe_max_seqlen``;
- ``torch.jit.script`` still calls ``__prepare_scriptable__`` (``_torchscript.py``), and
  ``torch._C._get_tracing_state`` still tells whether ``torch.jit.trace`` runs;
- Dynamo still traces ``statically_known_true``, ``has_static_value``, ``guard_or_false`` and
  ``guard_or_true`` of ``torch.fx.experimental.symbolic_shapes``, and shows a NumPy scalar as a 0-d
  ``ndarray`` (``_numbers.py``).

``test_compile_pass.py``, ``test_packed.py``, ``test_transforms.py``, ``test_traced_numbers.py`` and
``test_unbacked_sizes.py`` fail where one does not.

``_dtensor.py`` calls ``torch.distributed.tensor.experimental.register_sharding`` itself: it is
documented, but experimental.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

_GRAD_MODES = (
    "_set_grad_enabled",
    "_enter_inference_mode",
    "_exit_inference_mode",
)

# Graphs that Dynamo captured


def example_value(argument: Any) -> Any:
    """The value of a node during capture; any other argument is its own value."""
    return argument.meta.get("example_value") if isinstance(argument, Node) else argument


def fake_tensor(argument: Any) -> Tensor | None:
    """The tensor of a node during capture; None for other tensor subclasses and wrapped tensors."""
    value = example_value(argument)
    return value if isinstance(value, FakeTensor) else None


def number_of_writes(tensor: Tensor) -> int:
    """How often the program writes to this tensor or to a view of it, anywhere."""
    return tensor._version


def is_alias(some: Tensor, other: Tensor) -> bool:
    """Whether the tensors share their memory."""
    return bool(torch._C._is_alias_of(some, other))  # type: ignore[attr-defined]


def changes_grad_mode(node: Node) -> bool:
    """Whether the program enters or leaves ``no_grad`` or the like at this node."""
    return getattr(node.target, "__name__", "") in _GRAD_MODES


def uses_tensor_data(graph: Graph) -> bool:
    """Whether the program uses ``Tensor.data``: writes through it change no version counter."""
    return any(getattr(node.target, "__name__", "") == "_get_data_attr" for node in graph.nodes)


def is_statically_true(condition: bool | torch.SymBool | Tensor) -> bool:
    """Whether the condition holds for all sizes the program accepts; adds no guard."""
    if isinstance(condition, Tensor):  # a comparison of sizes in torch.jit.trace
        return False
    if not _may_be_symbolic(condition):
        return bool(condition)
    # Imported here, and in the functions below, because it loads sympy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def has_static_value(number: float) -> bool:
    """Whether no symbol of the program that is being traced stands for the number."""
    if not torch.compiler.is_dynamo_compiling():
        return True
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.has_static_value(number)


def check(condition: bool | torch.SymBool) -> None:
    """Makes the program that is being traced check the condition when it runs."""
    torch._check(condition)  # type: ignore[no-untyped-call]


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace runs."""
    return torch._C._get_tracing_state() is not None


def guard_or_false(condition: bool | torch.SymBool | Tensor) -> bool:
    """The condition, and a guard on it; False where it depends on sizes that only the data know."""
    if isinstance(condition, Tensor):  # a comparison of sizes in torch.jit.trace
        return False
    if not _may_be_symbolic(condition):
        return bool(condition)
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.guard_or_false(condition)


def guard_or_true(condition: bool | torch.SymBool | Tensor) -> bool:
    """The condition, and a guard on it; True where it depends on sizes that only the data know."""
    if isinstance(condition, Tensor):
        return True
    if not _may_be_symbolic(condition):
        return bool(condition)
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.guard_or_true(condition)


def _may_be_symbolic(condition: bool | torch.SymBool) -> bool:
    # Inside of Dynamo, a symbolic condition looks like a bool.
    return isinstance(condition, torch.SymBool) or torch.compiler.is_dynamo_compiling()


# Backends of torch.compile


def lookup_backend(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    compiler: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
    return compiler


def inductor_options(mode: str = "default", options: Any = None, **others: Any) -> dict[str, Any]:
    """``mode`` and ``options`` of ``torch.compile`` under the names that Inductor's backend has."""
    patches = {**torch._inductor.list_mode_options(mode), **(options or {})}
    return {"config_patches": patches, **others}


# Operators


def positional_index(operator: Any, argument: str) -> int | None:
    """The position of an operator's argument; None if it is keyword-only."""
    arguments = operator._schema.arguments
    index = [a.name for a in arguments].index(argument)
    return None if arguments[index].kwarg_only else index


def argument_name(operator: Any, position: int) -> str:
    name: str = operator._schema.arguments[position].name
    return name


# Jagged nested tensors


def ragged_dim(jagged: Any) -> int:
    dim: int = jagged._ragged_idx
    return dim


def cached_max_length(jagged: Any) -> int | None:
    """The length of the longest row if the tensor has it already; computing it synchronises."""
    length = jagged._maybe_max_seqlen
    return length if type(length) is int else None
