"""Prints requirements that pyproject.toml lists, one a line.

Usage: python tools/requirements.py NAME...

NAME is "build", for the requirements of the build system, or the name of an extra.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main() -> None:
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    requirements = {
        **pyproject["project"]["optional-dependencies"],
        "build": pyproject["build-system"]["requires"],
    }
    for name in sys.argv[1:]:
        print(*requirements[name], sep="\n")


if __name__ == "__main__":
    main()
