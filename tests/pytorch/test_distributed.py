"""Promise: DTensor, DDP and FSDP2 in 2 and in 4 processes give the results of one process.

The checks are those of helpers/distributed_checks.py; every process runs each of them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from child import run_python

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import distributed_checks

# One dictionary for each process: the traceback of each check, or "" if it passed.
Errors = list[dict[str, str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def errors(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Errors:
    world: int = request.param
    folder = tmp_path_factory.mktemp(f"{world}_processes")
    arguments = (world, free_port(), str(folder))
    multiprocessing.spawn(distributed_checks.run, arguments, nprocs=world)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", list(distributed_checks.CHECKS))
def test_distributed(name: str, errors: Errors) -> None:
    for rank, tracebacks in enumerate(errors):
        assert tracebacks[name] == "", f"process {rank}: {tracebacks[name]}"


def test_import_does_not_load_dtensor() -> None:
    """torch.distributed.tensor takes half a second to load, so only its users load it."""
    code = "import sys, masked_softmax_ext; print('torch.distributed.tensor' in sys.modules)"
    ran = run_python(code)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.splitlines()[-1] == "False"
    assert torch.distributed.is_available()


def test_sharded_attention_example() -> None:
    """Sharded batches need no communication; sharded keys are reduced, not gathered."""
    example = Path(__file__).parents[2] / "examples" / "sharded_attention.py"
    ran = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    batches, keys = ran.stdout.splitlines()
    assert batches.endswith("communication: none")
    assert "allreduce" in keys
    assert "gather" not in keys
