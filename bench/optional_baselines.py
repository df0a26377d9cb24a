"""Other libraries, each imported when it is first used and skipped where it is missing."""

from __future__ import annotations

import ctypes
import importlib
import os
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import names
from bench.baselines import (
    TORCH_BASELINES,
    Baseline,
    Prepared,
    RowBaseline,
    packing,
    unpacked,
)
from bench.cases import Case, Data
from bench.mxnet_client import MXNet
from bench.timing import Call, timed_loop
from masked_softmax_ext import _C, cpu_capability


@cache
def import_or_reason(name: str) -> ModuleType | str:
    """The module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load: {str(error).splitlines()[0]}"


class CTranslate2(RowBaseline):
    """The kernel of its wheel, called through ctypes: the library exports the symbol."""

    name = names.CTRANSLATE2
    outputs = ("out=",)
    packages = ("ctranslate2",)
    # Values of CTranslate2's enum CpuIsa, the kernel's template argument.
    isa = {"avx2": 2, "avx512": 3}  # noqa: RUF012
    symbol = "_ZN11ctranslate23cpu7softmaxILNS0_6CpuIsaE{}EEEvPKfPKiPfllb"

    def missing_reason(self) -> str | None:
        found = self._library()
        return found if isinstance(found, str) else None

    @cache  # noqa: B019
    def _library(self) -> tuple[ctypes.CDLL, ctypes.CDLL | None] | str:
        package = import_or_reason("ctranslate2")
        if isinstance(package, str):
            return package
        if cpu_capability() not in self.isa:
            return f"its symbol for {cpu_capability()} is not known"
        folder = Path(str(package.__file__)).parent.parent / "ctranslate2.libs"
        found = sorted(folder.glob("libctranslate2*"))
        if not found:
            return f"no libctranslate2* in {folder}"
        library = ctypes.CDLL(str(found[0]))
        if not hasattr(library, self.symbol.format(self.isa[cpu_capability()])):
            return "this version does not export the kernel"
        # The wheel bundles its own OpenMP runtime, separate from torch's.
        openmp = sorted(folder.glob("libgomp*")) + sorted(folder.glob("lib*omp*"))
        return library, ctypes.CDLL(str(openmp[0])) if openmp else None

    def prepare(self, data: Data, first: int) -> Prepared:
        found = self._library()
        assert not isinstance(found, str)
        library, openmp = found
        if openmp is not None:
            openmp.omp_set_num_threads(data.case.threads)
        kernel = getattr(library, self.symbol.format(self.isa[cpu_capability()]))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        kernel.argtypes = [pointer, pointer, pointer, size, size, ctypes.c_bool]
        kernel.restype = None
        rows, cols = data.case.shape
        self._lengths = lengths = data.lengths.int()  # kept alive for the raw pointer
        calls: list[Call] = [
            partial(kernel, x.data_ptr(), lengths.data_ptr(), y.data_ptr(), rows, cols, False)
            for x, y in zip(data.inputs, data.outputs, strict=True)
        ]

        def result() -> Tensor:
            calls[0]()
            return data.outputs[0]

        return Prepared(timed_loop(calls, first), result, data.case.threads)


class Mlas(RowBaseline):
    """ONNX Runtime's Softmax of all columns, its inputs and outputs bound to torch's memory."""

    name = names.MLAS
    uses_lengths = False
    outputs = ("fresh", "out=")
    packages = ("onnxruntime", "onnx")

    def missing_reason(self) -> str | None:
        for name in self.packages:
            found = import_or_reason(name)
            if isinstance(found, str):
                return f"{name} {found}"
        if cpu_capability() != _C.cpu_capabilities()[-1]:
            return f"cannot be limited to {cpu_capability()}; it uses the best instruction set"
        return None

    def prepare(self, data: Data, first: int) -> Prepared:
        session = self._session(data.case.threads)
        shape = list(data.case.shape)

        def bound(x: Tensor, y: Tensor | None) -> Any:
            binding = session.io_binding()
            binding.bind_input("x", "cpu", 0, np.float32, shape, x.data_ptr())
            if y is None:
                binding.bind_output("y", "cpu")
            else:
                binding.bind_output("y", "cpu", 0, np.float32, shape, y.data_ptr())
            return binding

        given = data.case.output == "out="
        bindings = [
            bound(x, y if given else None) for x, y in zip(data.inputs, data.outputs, strict=True)
        ]
        calls: list[Call] = [partial(session.run_with_iobinding, b) for b in bindings]

        def result() -> Tensor:
            calls[0]()
            return torch.from_numpy(bindings[0].copy_outputs_to_cpu()[0])

        return Prepared(timed_loop(calls, first), result, data.case.threads)

    @staticmethod
    def _session(threads: int) -> Any:
        onnx, runtime = import_or_reason("onnx"), import_or_reason("onnxruntime")
        assert not isinstance(onnx, str)
        assert not isinstance(runtime, str)
        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [helper.make_node("Softmax", ["x"], ["y"], axis=-1)],
            "softmax",
            [helper.make_tensor_value_info("x", float32, ["rows", "cols"])],
            [helper.make_tensor_value_info("y", float32, ["rows", "cols"])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads would take the processor from the other candidates.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class Jax(RowBaseline):
    """jax.nn.softmax(where=), jitted; its inputs are placed before the timing."""

    name = names.JAX
    packages = ("jax", "jaxlib")

    def missing_reason(self) -> str | None:
        found = self._library()
        return found if isinstance(found, str) else None

    def skip_reason(self, case: Case) -> str | None:
        if case.threads != 1:
            return "its number of threads is fixed at start: one"
        return super().skip_reason(case)

    @cache  # noqa: B019
    def _library(self) -> ModuleType | str:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if cpu_capability() == "avx2":
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_max_isa=AVX2".strip()
        jax = import_or_reason("jax")
        if isinstance(jax, str):
            return jax
        # It starts one thread for each processor in the affinity mask.
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(allowed)})
        try:
            jax.block_until_ready(jax.numpy.zeros(1) + 1)
        finally:
            os.sched_setaffinity(0, allowed)
        return jax

    def prepare(self, data: Data, first: int) -> Prepared:
        jax = self._library()
        assert not isinstance(jax, str)
        numpy = jax.numpy

        def eager(x: Any, lengths: Any) -> Any:
            valid = numpy.arange(x.shape[-1]) < lengths[:, None]
            return jax.nn.softmax(x, axis=-1, where=valid)

        softmax = jax.jit(eager)

        def place(tensor: Tensor) -> Any:
            return jax.block_until_ready(numpy.array(tensor.numpy()))

        inputs = [place(x) for x in data.inputs]
        lengths = place(data.lengths.int())

        def call(x: Any) -> None:
            softmax(x, lengths).block_until_ready()

        def result() -> Tensor:
            return torch.from_numpy(np.array(softmax(inputs[0], lengths)))

        calls: list[Call] = [partial(call, x) for x in inputs]
        return Prepared(timed_loop(calls, first), result, 1)


class Fbgemm(RowBaseline):
    """jagged_softmax of packed values; packing is not timed."""

    name = names.FBGEMM
    packages = ("fbgemm-gpu-cpu",)

    def missing_reason(self) -> str | None:
        found = import_or_reason("fbgemm_gpu")
        return found if isinstance(found, str) else None

    def prepare(self, data: Data, first: int) -> Prepared:
        valid, offsets = packing(data)
        jagged_softmax = torch.ops.fbgemm.jagged_softmax.default
        calls: list[Call] = [
            partial(jagged_softmax, x[valid].view(-1, 1), offsets, data.case.cols)
            for x in data.inputs
        ]

        def result() -> Tensor:
            value: Any = calls[0]()
            return unpacked(value[0], valid)

        return Prepared(timed_loop(calls, first), result, data.case.threads)


def all_baselines(mxnet_python: str | None) -> dict[str, Baseline]:
    """By name, in the order of the table."""
    optional: tuple[Baseline, ...] = (Mlas(), CTranslate2(), Jax(), Fbgemm(), MXNet(mxnet_python))
    return {baseline.name: baseline for baseline in (*TORCH_BASELINES, *optional)}
