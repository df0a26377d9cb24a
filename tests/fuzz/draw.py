"""Arguments for the Python interface, drawn from a fuzzer's bytes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import atheris
import numpy as np
import torch
from cases import FLOATING, INTEGER
from torch import Tensor
from torch._subclasses import FakeTensorMode  # no public spelling
from torch.fx.experimental.symbolic_shapes import ShapeEnv

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 130)
MAX_ELEMS = 4000

OTHER = (
    torch.bool,
    torch.complex64,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.complex32,
)

SPECIAL = (0.0, -0.0, 1.0, 88.0, -104.0, 65504.0, 3e38, -3e38, 1e-40)
SPECIAL += (float("inf"), float("-inf"), float("nan"))


class Subclass(Tensor):
    """A plain subclass."""


class Indexable:
    """Not an int, but has __index__."""

    def __index__(self) -> int:
        return 1


class Failing(int):
    """An int whose conversion raises."""

    def __index__(self) -> int:
        raise ValueError("this int is not to be converted")


OBJECTS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400),
    *(0.0, 1.0, -0.5, 1e300, 1e-320, float("nan"), float("inf"), 1j, Fraction(1, 3)),
    *("", "1", "float32", "\ud800", b"\xff", (), (1, 2), [1, 2], [[1.0, 2.0]], {}, ..., slice(1)),
    *(np.int64(1), np.int8(-1), np.float32(0.5), np.float64(2.0), np.bool_(True), np.zeros((2, 3))),
    *(Fraction(10**400), Indexable(), Failing(1), object(), print, int, float, Tensor),
    *(torch.float32, torch.int64, torch.Size([2]), torch.device("cpu"), torch.strided),
)


class Draw:
    """Draws arguments from the fuzzer's bytes: most of them fit, some do not."""

    def __init__(self, data: bytes) -> None:
        self.bytes = atheris.FuzzedDataProvider(data)
        self.generator = torch.Generator().manual_seed(self.up_to(255))

    def up_to(self, largest: int) -> int:
        return self.bytes.ConsumeIntInRange(0, largest)

    def one_in(self, count: int) -> bool:
        return self.up_to(count - 1) == count - 1  # never once the bytes are used up

    def one_of(self, options: Any) -> Any:
        return options[self.up_to(len(options) - 1)]

    def anything(self) -> Any:
        if self.one_in(4):
            return self.tensor(self.shape(), self.dtype())
        if self.one_in(8):
            return self.bytes.ConsumeUnicode(8)
        if self.one_in(8):
            return self.bytes.ConsumeInt(self.up_to(16))
        return self.one_of(OBJECTS)

    def shape(self) -> tuple[int, ...]:
        shape: list[int] = []
        room = MAX_ELEMS
        for _ in range(self.one_of((2, 2, 1, 3, 4, 0, 5))):
            size = min(self.one_of(SIZES), room)
            shape.append(size)
            room //= max(size, 1)
        return tuple(shape)

    def dtype(self) -> torch.dtype:
        if self.one_in(6):
            return self.one_of(FLOATING + INTEGER + OTHER)
        return self.one_of(FLOATING)

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * 3
        if self.one_in(6):
            special = torch.tensor(SPECIAL, dtype=torch.float64)
            which = torch.randint(0, 4 * len(SPECIAL), shape, generator=self.generator)
            x = torch.where(which < len(SPECIAL), special[which % len(SPECIAL)], x)
        if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool):
            x = x.abs()
        return x.nan_to_num(0, 0, 0).clamp(-99, 99).to(dtype) if dtype in INTEGER else x.to(dtype)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of that shape, or one of an unusual kind."""
        x = self.values(shape, dtype)
        x = self.laid_out(x)
        if self.one_in(3) and x.is_floating_point():
            x.requires_grad_()
        return self.unusual(x) if self.one_in(5) else x

    def laid_out(self, x: Tensor) -> Tensor:
        """The same shape, with other strides."""
        how = self.up_to(7)
        if how == 1 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if how == 2 and x.dim() > 0:
            return torch.stack((x, x), -1)[..., 1]
        if how == 3 and x.dim() > 0 and x.size(0) > 0:
            return x[:1].expand(x.shape)
        if how == 4 and x.numel() > 0:  # elements overlap
            return x.as_strided(x.shape, [max(step // 2, 1) for step in x.stride()])
        if how == 5:
            memory = x.new_zeros(x.numel() + 1)
            return memory[1:].view(x.shape).copy_(x)
        return x

    def unusual(self, x: Tensor) -> Tensor:
        """A tensor of an unusual kind, if torch has that kind for this type and shape."""
        try:
            return self.of_unusual_kind(x)
        except RuntimeError:
            return x

    def of_unusual_kind(self, x: Tensor) -> Tensor:
        kind = self.up_to(16)
        if kind == 0:
            return x.to_sparse()
        if kind == 1 and x.dim() == 2:
            return x.to_sparse_csr()
        if kind == 2:
            return x.to("meta")
        if kind == 3:
            return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
        if kind == 4:
            return torch.nested.nested_tensor([x, x[:1] if x.dim() else x])
        if kind == 5 and x.dim() > 0:
            layout = torch.jagged
            return torch.nested.nested_tensor([x, x[: x.size(0) // 2]], layout=layout)
        if kind == 6:
            return x.as_subclass(Subclass)
        if kind == 7 and x.is_floating_point():
            return torch.nn.Parameter(x)
        if kind == 8 and x.dim() > 0 and hasattr(x, "refine_names"):  # not in torch 2.13
            return x.refine_names(*(f"d{d}" for d in range(x.dim())))
        if kind == 9:
            with torch.inference_mode():
                return x.clone()
        if kind == 10 and x.dtype in FLOATING:
            return torch._neg_view(x.clone())  # torch fails where a leaf is a view
        if kind == 11:
            return torch._lazy_clone(x)
        if kind == 12 and not x.is_complex():
            return x.float().to_mkldnn()
        if kind == 13:
            return x * 1 if x.requires_grad else x
        if kind == 14:
            return x[..., None]
        if kind == 15 and x.dim() > 0:
            return x[:0]
        if kind == 16:
            return torch.zeros(1).expand(self.up_to(2), 2**8, 2**9)
        return x

    def shrink_storage(self, tensors: list[Any]) -> None:
        """Makes one storage too small, as resize_() can. torch itself reads a lazy clone's."""
        shrinkable = [x for x in tensors if is_plain(x) and not torch._C._is_cow_tensor(x)]
        if shrinkable:
            storage = self.one_of(shrinkable).untyped_storage()
            storage.resize_(self.one_of((0, 1, storage.nbytes() // 2)))

    def dim(self, ndim: int, fits: int = -1) -> Any:
        if self.one_in(12):
            return self.anything()
        return self.one_of((fits, fits, *range(-ndim, ndim))) if not self.one_in(12) else ndim

    def rows(self, input: Any, dim: Any) -> list[int]:
        """A shape that broadcasts to the rows of the input."""
        rows = list(shape_of(input, (2, 3)))
        if rows:
            del rows[dim_of(rows, dim)]
        return [1 if self.one_in(4) else size for size in rows[: len(rows) - self.up_to(len(rows))]]

    def index(self, input: Any, dim: Any, largest: int | None = None) -> Any:
        """Lengths or starts."""
        if self.one_in(12):
            return self.anything()
        shape = shape_of(input, (2, 3))
        cols = shape[dim_of(shape, dim)] if shape else 1
        largest = cols if largest is None else largest
        rows = self.rows(input, dim)
        if self.one_in(8):
            return self.up_to(max(largest, 0))
        dtype = self.one_of(INTEGER)
        largest = max(min(largest, torch.iinfo(dtype).max), 0)
        low, high = (-1, largest + 3) if self.one_in(8) else (0, largest + 1)
        index = torch.randint(low, high, rows, generator=self.generator).to(dtype)
        return self.unusual(self.laid_out(index)) if self.one_in(8) else self.laid_out(index)

    def lengths(self, input: Any, dim: Any) -> Any:
        """Lengths, None, or a pair (lengths, starts)."""
        if self.one_in(12):
            return None
        lengths = self.index(input, dim)
        return (lengths, self.index(input, dim, 1)) if self.one_in(12) else lengths

    def scale(self) -> Any:
        if self.one_in(12):
            return self.anything()
        return self.one_of(
            (None, None, 1.0, 0.125, -1.0, 2, 0.0, 1e30, float("nan"), float("inf"), 1e-320)
        )

    def sink(self, input: Any, dim: Any, batch: int | None = None) -> Any:
        """A number or a tensor for the rows; for packed rows, ``batch`` of them come first."""
        if self.one_in(12):
            return self.anything()
        if self.one_in(3):
            return self.one_of((None, 0.0, -2.5, 1, 1e300, -1e300, *SPECIAL[-3:]))
        rows = self.rows(input, dim)
        if batch is not None:
            rows = [batch, *rows][: self.up_to(len(rows) + 1)]
        return self.tensor(tuple(rows), self.dtype())

    def padding_value(self) -> Any:
        if self.one_in(8):
            return self.anything()
        return self.one_of((0.0, -0.0, 0, 1.5, -1e300, np.float32(2.0), *SPECIAL[-3:]))

    def options(self, input: Any, with_out: bool) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.one_in(2):
            options["scale"] = self.scale()
        if self.one_in(3):
            options["dtype"] = self.anything() if self.one_in(8) else self.dtype()
        if self.one_in(6):
            options["validate"] = self.anything() if self.one_in(4) else self.one_in(2)
        if with_out and self.one_in(4):
            options["out"] = self.out(input)
        if self.one_in(40):
            options[self.one_of(("mask", "out", "dtype", "starts", "\ud800"))] = self.anything()
        return options

    def out(self, input: Any) -> Any:
        if self.one_in(8) or not isinstance(input, Tensor):
            return self.anything()
        how = self.up_to(7)
        if how == 0:
            return input
        if how == 1 and is_plain(input) and input.dim() > 1:  # shares memory with the input
            return input.transpose(0, 1)
        if how == 2 and is_plain(input) and input.dim() > 0 and input.size(0) > 0:
            return input[:1].expand(input.shape)
        shape = self.shape() if self.one_in(8) else shape_of(input, ())
        fits = input.dtype in FLOATING and not self.one_in(3)
        return self.tensor(shape, input.dtype if fits else self.dtype())

    def offsets(self, values: Any, dim: Any) -> Any:
        if self.one_in(10):
            return self.anything()
        shape = shape_of(values, ())
        total = shape[dim] if type(dim) is int and -len(shape) <= dim < len(shape) else 3
        ends = sorted(self.up_to(total) for _ in range(self.up_to(6)))
        offsets = torch.tensor([0, *ends, total + (1 if self.one_in(16) else 0)])
        return self.laid_out(offsets.to(self.one_of(INTEGER)))

    def mode(self) -> Any:
        how = self.up_to(15)
        if how == 1:
            return torch.no_grad()
        if how == 2:
            return torch.inference_mode()
        if how == 3:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        if how == 4:
            # With symbolic shapes, without which torch takes no jagged tensor.
            return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        if how == 5:
            return torch.device("meta")
        return None


def shape_of(x: Any, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a dense tensor, otherwise the given one; nested tensors have no single shape."""
    return tuple(x.shape) if isinstance(x, Tensor) and not x.is_nested else otherwise


def dim_of(shape: Any, dim: Any) -> int:
    """The dimension if the shape has it, otherwise the last."""
    return dim if type(dim) is int and -len(shape) <= dim < len(shape) else -1


def is_plain(x: Any) -> bool:
    """A dense CPU tensor whose elements can be looked at."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout == torch.strided
        and x.device.type == "cpu"
        and not x.is_nested
        and not x.is_quantized
        and x.numel() <= MAX_ELEMS
        and holds_its_elements(x)
    )


def holds_its_elements(x: Tensor) -> bool:
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    needed = (x.storage_offset() + last + 1) * x.element_size()
    return x.numel() == 0 or x.untyped_storage().nbytes() >= needed
