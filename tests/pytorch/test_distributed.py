"""Promise: DTensor, DDP and FSDP2 compute what one process does, in 2 and in 4 of them.

The checks are in distributed_checks.py; each runs in every process of one group.
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

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import distributed_checks

Errors = list[dict[str, str]]  # of each process, by check


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def errors(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Errors:
    world: int = request.param
    folder = tmp_path_factory.mktemp(f"{world}")
    arguments = (world, free_port(), str(folder))
    multiprocessing.spawn(distributed_checks.run, arguments, nprocs=world)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", list(distributed_checks.CHECKS))
def test_distributed(name: str, errors: Errors) -> None:
    for rank, found in enumerate(errors):
        assert found[name] == "", f"process {rank}: {found[name]}"


def test_nobody_pays_who_does_not_use_it() -> None:
    """torch.distributed.tensor takes half a second to load: the package does not load it."""
    code = "import sys, masked_softmax_ext; print('torch.distributed.tensor' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
    assert torch.distributed.is_available()


def test_the_example() -> None:
    example = Path(__file__).parents[2] / "examples" / "sharded_attention.py"
    ran = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    batches, keys = ran.stdout.splitlines()
    assert batches.endswith("communication: none")
    assert "allreduce" in keys
    assert "gather" not in keys
