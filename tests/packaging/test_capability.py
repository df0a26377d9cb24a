"""Promise: the best instruction set is used; an environment variable can select another one."""

from __future__ import annotations

import platform

import pytest
from cases import ARCHITECTURES, CAPABILITIES
from child import run_python

import masked_softmax_ext
from masked_softmax_ext import _C

VARIABLE = "MASKED_SOFTMAX_EXT_CPU_CAPABILITY"

REPORT = """
import torch, masked_softmax_ext
y = masked_softmax_ext.masked_softmax(torch.zeros(2, 4), torch.tensor([2, 4]))
assert y.tolist() == [[0.5, 0.5, 0.0, 0.0], [0.25] * 4], y
print("in use:", masked_softmax_ext.cpu_capability())
"""

IMPORT = """
try:
    import masked_softmax_ext
except RuntimeError as error:
    assert type(error) is RuntimeError
    print("RuntimeError:", error)
else:
    print("imported")
"""


def test_the_best_instruction_set_is_used() -> None:
    result = run_python(REPORT, env={VARIABLE: ""})
    assert result.stdout.splitlines()[-1] == f"in use: {_C.cpu_capabilities()[-1]}", result.stdout
    assert masked_softmax_ext.cpu_capability() in CAPABILITIES


def test_instruction_sets_are_listed_from_scalar_to_best() -> None:
    available = _C.cpu_capabilities()
    assert available == [name for name in CAPABILITIES if name in available]
    assert available[0] == "scalar"


def test_every_compiled_instruction_set_is_tested() -> None:
    """The tests' list is that of the extension and those of other architectures."""
    here = platform.machine()
    others = [name for name, machines in ARCHITECTURES.items() if here not in machines]
    compiled = masked_softmax_ext.build_info()["cpu_capabilities"]
    assert sorted(CAPABILITIES) == sorted([*compiled, *others])


def test_processor_features_are_detected() -> None:
    """The instruction sets follow from the flags in /proc/cpuinfo."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("reads /proc/cpuinfo of an x86-64 processor")
    with open("/proc/cpuinfo") as lines:
        flags = next(set(line.split()) for line in lines if line.startswith("flags"))
    expected = ["scalar"]
    if {"avx2", "fma", "f16c"} <= flags:
        expected.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
            expected.append("avx512")
    assert _C.cpu_capabilities() == expected


def test_each_instruction_set_can_be_selected_at_import(capability: str) -> None:
    result = run_python(REPORT, env={VARIABLE: capability})
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == f"in use: {capability}", result.stdout


def assert_import_fails(name: str) -> None:
    """With a RuntimeError that names the selected instruction set and the available ones."""
    result = run_python(IMPORT, env={VARIABLE: name})
    message = result.stdout
    assert result.returncode == 0, message
    assert "RuntimeError:" in message
    assert name in message
    for available in _C.cpu_capabilities():
        assert available in message


@pytest.mark.parametrize("name", ["sse9", "0"])
def test_an_unknown_instruction_set_is_an_error_at_import(name: str) -> None:
    assert_import_fails(name)


def unavailable() -> str:
    """An instruction set of another architecture, or one that this processor lacks."""
    return next(name for name in reversed(CAPABILITIES) if name not in _C.cpu_capabilities())


def test_an_unavailable_instruction_set_is_an_error_at_import() -> None:
    """Not an illegal instruction later."""
    assert_import_fails(unavailable())


def test_switching_in_process(capability: str) -> None:
    assert masked_softmax_ext.cpu_capability() == capability
    with pytest.raises(ValueError, match="sse9"):
        _C.set_cpu_capability("sse9")
    with pytest.raises(RuntimeError, match=unavailable()):
        _C.set_cpu_capability(unavailable())
    assert masked_softmax_ext.cpu_capability() == capability, "a failed switch changes nothing"
