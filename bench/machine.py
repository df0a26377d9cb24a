"""The hardware and software that figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from masked_softmax_ext import _C, build_info, cpu_capability

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_LLC_BYTES = 32 << 20

# (family, first model, last model, core): virtual machines often report only "AMD EPYC".
AMD_CORES = (
    (23, 0x00, 0x2F, "zen1"),
    (23, 0x30, 0xFF, "zen2"),
    (25, 0x00, 0x0F, "zen3"),
    (25, 0x10, 0x1F, "zen4"),
    (25, 0x20, 0x5F, "zen3"),
    (25, 0x60, 0xAF, "zen4"),
    (26, 0x00, 0xFF, "zen5"),
)
FLAGS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_bf16")


def cpu_fields() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = text.split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cache_bytes() -> dict[str, int]:
    """Size of each cache of the first processor: L1d, L1i, L2, L3."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="utf-8").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
        sizes[f"L{level}{letter}"] = int(size.rstrip("KM")) * unit
    return sizes


def llc_bytes() -> int:
    """Size of the last-level cache."""
    return max(cache_bytes().values(), default=DEFAULT_LLC_BYTES)


def core_name(vendor: str, family: int, model: int) -> str:
    """AMD's name for the core, or an empty string."""
    if vendor != "AuthenticAMD":
        return ""
    for core_family, first, last, name in AMD_CORES:
        if family == core_family and first <= model <= last:
            return name
    return ""


def processor_slug(fields: dict[str, str], capability: str) -> str:
    """A name for files, such as ``amd-epyc-zen4-avx512``."""
    name = fields.get("model name", platform.machine())
    name = re.sub(r"\((R|TM|tm)\)|@.*|\b\d+-Core\b|\bProcessor\b|\bCPU\b", " ", name)
    core = ""
    if fields.get("cpu family", "").isdigit() and fields.get("model", "").isdigit():
        core = core_name(
            fields.get("vendor_id", ""), int(fields["cpu family"]), int(fields["model"])
        )
    words = re.sub(r"[^a-z0-9]+", "-", f"{name} {core} {capability}".lower())
    return words.strip("-")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The checkout's commit; ``changed`` lists modified and untracked files."""

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return ""
        return run.stdout.rstrip()

    changed = [line[3:] for line in git("status", "--porcelain").splitlines()]
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "changed": [path for path in changed if not path.startswith("bench/results/")],
    }


def describe() -> dict[str, Any]:
    """The JSON's description of the machine."""
    fields = cpu_fields()
    present = fields.get("flags", "").split()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_slug(fields, cpu_capability()),
        "model": fields.get("model name", platform.processor()),
        "core": " ".join(
            f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields
        ),
        "processors": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(),
        "flags": [flag for flag in FLAGS if flag in present],
        "system": platform.platform(),
        "capability": cpu_capability(),
        "capabilities": list(_C.cpu_capabilities()),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "build": build_info(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": installed_version("numpy"),
            "matplotlib": installed_version("matplotlib"),
        },
        **commit(),
    }
