"""MXNet as a peer.

It needs an older numpy than anybody else, so it lives in a process of its own (mxnet_server.py),
run by another interpreter; its turns come in the same rounds as the others'.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.baselines import Peer, Prepared
from bench.cases import Case, Data

SERVER = Path(__file__).with_name("mxnet_server.py")


def environment(**settings: str) -> dict[str, str]:
    """Ours, without the module search path: that is for another interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | settings


class MXNet(Peer):
    """mx.nd.softmax(use_length=True), its inputs in place before the timing."""

    name = "MXNet"

    def __init__(self, python: str | None) -> None:
        self.python = python
        self._server: subprocess.Popen[str] | None = None

    def why_missing(self) -> str | None:
        if self.python is None:
            return "no interpreter given (--mxnet-python)"
        return self._why_broken()

    @cache  # noqa: B019
    def _why_broken(self) -> str | None:
        try:
            run = subprocess.run(
                [str(self.python), "-c", "import mxnet; print(mxnet.__version__)"],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
                env=environment(),
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            return f"{self.python} cannot import it: {lines[-1]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        self.version = run.stdout.strip()
        return None

    def why_not(self, case: Case) -> str | None:
        if len(case.shape) != 2 or case.dim != -1:
            return "measured on rows of a matrix only"
        if case.dtype != "float32":
            return "measured in float32 only"
        if case.direction != "forward" or case.grad:
            return "measured forward only"
        return None

    def prepare(self, data: Data, turn: int) -> Prepared:
        threads = str(data.case.threads)
        settings = {"OMP_NUM_THREADS": threads, "MXNET_CPU_WORKER_NTHREADS": threads}
        self._server = subprocess.Popen(
            [str(self.python), str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours: it ends when its input does
            env=environment(**settings, OMP_WAIT_POLICY="passive"),
        )
        with tempfile.TemporaryDirectory() as folder:
            for number, x in enumerate(data.inputs):
                np.save(Path(folder, f"input{number}.npy"), x.numpy())
            np.save(Path(folder, "lengths.npy"), data.lengths.int().numpy())
            self._ask(
                folder=folder,
                inputs=len(data.inputs),
                first=turn % len(data.inputs),
                out=data.case.output == "out=",
            )
            value = np.load(Path(folder, "result.npy"))

        def result() -> Tensor:
            return torch.from_numpy(value)

        def run(calls: int) -> float:
            seconds: float = self._ask(calls=calls)["seconds"]
            return seconds

        return Prepared(run, result, data.case.threads)

    def _ask(self, **question: object) -> dict[str, Any]:
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"MXNet's process ended with {self._server.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self) -> None:
        if self._server is not None:
            self._server.stdin.close()  # type: ignore[union-attr]
            self._server.wait(timeout=60)
            self._server = None
