"""Runs MXNet's softmax for mxnet_client.py, under an interpreter that has mxnet 1.9.1.

Reads one JSON request per line and answers each with one JSON line. The first request names the
folder of the inputs; each later one asks for a number of timed calls. Imports nothing of this
project.
"""

import json
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import mxnet as mx
import numpy as np


def main():
    start = json.loads(sys.stdin.readline())
    folder = Path(start["folder"])
    inputs = [mx.nd.array(np.load(folder / f"input{n}.npy")) for n in range(start["inputs"])]
    lengths = mx.nd.array(np.load(folder / "lengths.npy"), dtype="int32")
    outputs = [mx.nd.zeros(x.shape) for x in inputs]
    mx.nd.waitall()

    def softmax(x, y):
        given = {"out": y} if start["out"] else {}
        result = mx.nd.softmax(x, lengths, use_length=True, axis=-1, **given)
        result.wait_to_read()
        return result

    np.save(folder / "result.npy", softmax(inputs[0], outputs[0]).asnumpy())
    print(json.dumps({"mxnet": mx.__version__}), flush=True)
    pairs = list(zip(inputs, outputs))  # noqa: B905 (older interpreters)
    endless = islice(cycle(pairs), start["first"], None)
    for line in sys.stdin:
        scheduled = list(islice(endless, json.loads(line)["calls"]))
        begin = time.perf_counter()
        for x, y in scheduled:
            softmax(x, y)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
