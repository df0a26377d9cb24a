"""Other libraries, each imported when it is first asked for, and skipped where it is missing."""

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

from bench.baselines import TORCH_PEERS, Peer, Prepared, Work, packing, unpacked
from bench.cases import Case, Data
from bench.mxnet_client import MXNet
from bench.timing import calling
from masked_softmax_ext import _C, cpu_capability


@cache
def module(name: str) -> ModuleType | str:
    """The module, or the reason why there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except (ImportError, OSError, RuntimeError) as error:
        return f"does not load: {str(error).splitlines()[0]}"


def why_not_rows(case: Case) -> str | None:
    """The others take float32 rows, and are measured forward."""
    if case.dtype != "float32":
        return "measured in float32 only"
    if len(case.shape) != 2 or case.dim != -1:
        return "measured on rows of a matrix only"
    if case.direction != "forward" or case.grad:
        return "measured forward only"
    return None


class CTranslate2(Peer):
    """The kernel of its wheel, which exports it as a plain symbol; called through ctypes."""

    name = "CTranslate2"
    # Its template's argument: CpuIsa::AVX2, CpuIsa::AVX512, or CpuIsa::GENERIC.
    isa = {"avx2": 2, "avx512": 3}  # noqa: RUF012
    symbol = "_ZN11ctranslate23cpu7softmaxILNS0_6CpuIsaE{}EEEvPKfPKiPfllb"

    def why_missing(self) -> str | None:
        found = self._library()
        return found if isinstance(found, str) else None

    def why_not(self, case: Case) -> str | None:
        if case.output == "fresh":
            return "its kernel writes to a given output"
        return why_not_rows(case)

    @cache  # noqa: B019
    def _library(self) -> tuple[ctypes.CDLL, ctypes.CDLL | None] | str:
        package = module("ctranslate2")
        if isinstance(package, str):
            return package
        if cpu_capability() not in self.isa:
            return f"no symbol of it is known for {cpu_capability()}"
        folder = Path(str(package.__file__)).parent.parent / "ctranslate2.libs"
        found = sorted(folder.glob("libctranslate2*"))
        if not found:
            return f"no libctranslate2* in {folder}"
        library = ctypes.CDLL(str(found[0]))
        if not hasattr(library, self.symbol.format(self.isa[cpu_capability()])):
            return "this version does not export the kernel"
        # Its own copy of OpenMP, apart from torch's.
        openmp = sorted(folder.glob("libgomp*")) + sorted(folder.glob("lib*omp*"))
        return library, ctypes.CDLL(str(openmp[0])) if openmp else None

    def prepare(self, data: Data, turn: int) -> Prepared:
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
        self._lengths = lengths = data.lengths.int()  # the pointers keep nothing alive
        works: list[Work] = [
            partial(kernel, x.data_ptr(), lengths.data_ptr(), y.data_ptr(), rows, cols, False)
            for x, y in zip(data.inputs, data.outputs, strict=True)
        ]

        def result() -> Tensor:
            works[0]()
            return data.outputs[0]

        return Prepared(calling(works, turn), result, data.case.threads)


class Mlas(Peer):
    """ONNX Runtime's Softmax on full rows, bound to memory that is given."""

    name = "MLAS"
    masked = False

    def why_missing(self) -> str | None:
        for name in ("onnxruntime", "onnx"):
            found = module(name)
            if isinstance(found, str):
                return f"{name} {found}"
        if cpu_capability() != _C.cpu_capabilities()[-1]:
            return f"it cannot be held to {cpu_capability()}, and takes more on this processor"
        return None

    def why_not(self, case: Case) -> str | None:
        return why_not_rows(case)

    def prepare(self, data: Data, turn: int) -> Prepared:
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
        works: list[Work] = [partial(session.run_with_iobinding, b) for b in bindings]

        def result() -> Tensor:
            works[0]()
            return torch.from_numpy(bindings[0].copy_outputs_to_cpu()[0])

        return Prepared(calling(works, turn), result, data.case.threads)

    @staticmethod
    def _session(threads: int) -> Any:
        onnx, runtime = module("onnx"), module("onnxruntime")
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
        # Threads that wait for work would take the processor from the other candidates.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class Jax(Peer):
    """jax.nn.softmax(where=), jitted, its inputs in place before the timing."""

    name = "JAX"

    def why_missing(self) -> str | None:
        found = self._library()
        return found if isinstance(found, str) else None

    def why_not(self, case: Case) -> str | None:
        if case.output == "out=":
            return "has no out="
        if case.threads != 1:
            return "its number of threads is fixed when it starts: one"
        return why_not_rows(case)

    @cache  # noqa: B019
    def _library(self) -> ModuleType | str:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if cpu_capability() == "avx2":
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_max_isa=AVX2".strip()
        jax = module("jax")
        if isinstance(jax, str):
            return jax
        # It starts one thread for every processor that it may use: let that be one.
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(allowed)})
        try:
            jax.block_until_ready(jax.numpy.zeros(1) + 1)
        finally:
            os.sched_setaffinity(0, allowed)
        return jax

    def prepare(self, data: Data, turn: int) -> Prepared:
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

        def work(x: Any) -> None:
            softmax(x, lengths).block_until_ready()

        def result() -> Tensor:
            return torch.from_numpy(np.array(softmax(inputs[0], lengths)))

        works: list[Work] = [partial(work, x) for x in inputs]
        return Prepared(calling(works, turn), result, 1)


class Fbgemm(Peer):
    """jagged_softmax of packed values; packing them is not timed."""

    name = "FBGEMM"

    def why_missing(self) -> str | None:
        found = module("fbgemm_gpu")
        return found if isinstance(found, str) else None

    def why_not(self, case: Case) -> str | None:
        if case.output == "out=":
            return "has no out="
        return why_not_rows(case)

    def prepare(self, data: Data, turn: int) -> Prepared:
        valid, offsets = packing(data)
        jagged_softmax = torch.ops.fbgemm.jagged_softmax.default
        works: list[Work] = [
            partial(jagged_softmax, x[valid].view(-1, 1), offsets, data.case.cols)
            for x in data.inputs
        ]

        def result() -> Tensor:
            value: Any = works[0]()
            return unpacked(value[0], valid)

        return Prepared(calling(works, turn), result, data.case.threads)


def all_peers(mxnet_python: str | None) -> dict[str, Peer]:
    """By name, in the order of the table."""
    optional: tuple[Peer, ...] = (Mlas(), CTranslate2(), Jax(), Fbgemm(), MXNet(mxnet_python))
    return {peer.name: peer for peer in (*TORCH_PEERS, *optional)}
