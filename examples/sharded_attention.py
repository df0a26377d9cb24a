"""Attention weights of scores that are sharded over processes, as a DTensor.

Sharding over batches needs no communication. Sharding over keys gives each process a part of every
row; of each part two numbers are exchanged, its maximum and its logsumexp, and the scores stay
where they are. Runs on the CPU in two processes.

    pip install numpy
    python examples/sharded_attention.py

Exits with 1 if the weights differ from those of one process.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from masked_softmax_ext import masked_softmax

try:
    from torch.distributed.tensor.debug import CommDebugMode
except ModuleNotFoundError as error:  # this part of torch needs numpy
    sys.exit(f"torch.distributed.tensor.debug needs {error.name}; type: pip install {error.name}")

PROCESSES = 2


def attend(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))

    torch.manual_seed(0)  # the same scores in every process
    batch, heads, queries, keys = 4, 2, 16, 64
    scores = torch.randn(batch, heads, queries, keys)
    lengths = torch.tensor([64, 10, 33, 0])
    expected = masked_softmax(scores, lengths)

    for name, dim in (("batches", 0), ("keys", 3)):
        sharded = distribute_tensor(scores, mesh, [Shard(dim)])
        with CommDebugMode() as communication:
            weights = masked_softmax(sharded, lengths)
        torch.testing.assert_close(weights.full_tensor(), expected)
        if rank == 0:
            counts = {str(name): count for name, count in communication.get_comm_counts().items()}
            print(f"sharded over {name}: equal to one process; communication: {counts or 'none'}")
    dist.barrier()  # no process exits while another still communicates
    sys.stdout.flush()
    os._exit(0)  # skips interpreter shutdown, during which torch's threads may abort


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Computes attention weights of scores that two processes share."
    )
    parser.parse_args(arguments)
    multiprocessing.spawn(attend, (free_port(),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
