"""MXNet as a baseline.

It needs an old numpy, so it runs in a process of its own (mxnet_server.py) under another
interpreter. It takes its turns in the same rounds as the other candidates.
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

from bench import names
from bench.baselines import Prepared, RowBaseline
from bench.cases import Data

SERVER = Path(__file__).with_name("mxnet_server.py")


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without PYTHONPATH, which is for this interpreter alone."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | settings


class MXNet(RowBaseline):
    """mx.nd.softmax(use_length=True); its inputs are placed before the timing."""

    name = names.MXNET
    outputs = ("fresh", "out=")

    def __init__(self, python: str | None) -> None:
        self.python = python
        self._server: subprocess.Popen[str] | None = None

    def missing_reason(self) -> str | None:
        if self.python is None:
            return "no interpreter given (--mxnet-python)"
        version, reason = self._probe()
        return None if version else reason

    def versions(self) -> dict[str, str | None]:
        return {self.name: self._probe()[0] if self.python is not None else None}

    @cache  # noqa: B019
    def _probe(self) -> tuple[str | None, str]:
        """The interpreter's version of MXNet, or None and the reason why it has none."""
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
            return None, f"{self.python} cannot import it: {lines[-1]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, str(error)
        return run.stdout.strip(), ""

    def prepare(self, data: Data, first: int) -> Prepared:
        threads = str(data.case.threads)
        settings = {"OMP_NUM_THREADS": threads, "MXNET_CPU_WORKER_NTHREADS": threads}
        self._server = subprocess.Popen(
            [str(self.python), str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C must not reach it; it exits when its stdin closes
            env=environment(**settings, OMP_WAIT_POLICY="passive"),
        )
        with tempfile.TemporaryDirectory() as folder:
            for number, x in enumerate(data.inputs):
                np.save(Path(folder, f"input{number}.npy"), x.numpy())
            np.save(Path(folder, "lengths.npy"), data.lengths.int().numpy())
            self._request(
                folder=folder,
                inputs=len(data.inputs),
                first=first % len(data.inputs),
                out=data.case.output == "out=",
            )
            value = np.load(Path(folder, "result.npy"))

        def result() -> Tensor:
            return torch.from_numpy(value)

        def run(calls: int) -> float:
            seconds: float = self._request(calls=calls)["seconds"]
            return seconds

        return Prepared(run, result, data.case.threads)

    def _request(self, **request: object) -> dict[str, Any]:
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
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
