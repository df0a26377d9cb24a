"""Promise: the Python examples of README and docs run as written and give the results they show.

Files that the pages name exist, docs/performance.md lists every missed target, docs/api.rst has
every public name, and CONTRIBUTING.md every source file and every check of a pull request.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import masked_softmax_ext

ROOT = Path(__file__).parents[2]
PLACEHOLDERS = ("FILE.md", "STEM.md")  # in descriptions of what a program writes
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REQUIRED_PACKAGES = {
    "examples.md": ["transformers"],
    "migration.md": ["transformers"],
    "recipes.md": ["transformers"],
    "tutorial.md": ["matplotlib"],
}

sys.path.insert(0, str(ROOT / "docs"))
import page_code  # noqa: E402


def run_page(page: str, text: str) -> None:
    """Runs the page's blocks in order, in one namespace.

    Interactive sessions must give the results they show; other blocks need only run.
    """
    names = page_code.new_namespace()
    for block in page_code.python_blocks(text):
        page_code.run_block(page, block, names)


def test_readme_has_examples() -> None:
    assert page_code.python_blocks(PAGES[0].read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples(page: Path) -> None:
    for package in REQUIRED_PACKAGES.get(page.name, ()):
        pytest.importorskip(package, reason=f"{package}, which this page uses, is missing")
    run_page(page.name, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "block",
    [">>> 1 + 1\n3\n", ">>> 1 / 0\n", "assert 1 + 1 == 3\n"],
    ids=["value", "error", "code"],
)
def test_a_wrong_example_fails(block: str) -> None:
    with pytest.raises(AssertionError):
        run_page("page.md", f"text\n\n```python\n{block}```\n")


def test_blocks_share_a_namespace() -> None:
    run_page(
        "page.md",
        "```python\n>>> a = 1\n```\n\n```python\nb = a + 1\n```\n\n```python\n>>> b\n2\n```\n",
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:bench|csrc|docs|examples|masked_softmax_ext|tests)/[\w./-]*)`",
        page.read_text(encoding="utf-8"),
    )
    missing = [path for path in named if not (ROOT / path).exists() and "NAME" not in path]
    assert not missing


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / f"{folder}/README.md" for folder in ("bench", "examples", "tests"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_code_blocks_name_their_language(page: Path) -> None:
    """A block without one would be coloured as Python."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(fences[::2])
    assert not any(fences[1::2])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("`", "").strip("|\n ").split("|")]


def test_every_missed_target_is_listed() -> None:
    """The targets that bench/results/*.md mark as not met are those of docs/performance.md."""
    missed = sorted(
        (case, against, bound, ratio)
        for results in (ROOT / "bench" / "results").glob("*.md")
        for line in results.read_text(encoding="utf-8").splitlines()
        if "**not met**" in line
        for case, against, _, bound, ratio, *_ in [cells(line)]
    )
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    listed = sorted(
        (case, against, bound, ratio)
        for line in page.splitlines()
        if re.search(r"at (least|most) [\d.]+ \|", line)
        for *_, case, against, bound, ratio in [cells(line)]
    )
    assert listed == missed


def test_every_public_name_is_in_the_api_page() -> None:
    text = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    for name in masked_softmax_ext.__all__:
        assert re.search(rf"^\.\. auto\w+:: masked_softmax_ext\.{name}$", text, re.MULTILINE), name
        in_table = rf"^   masked_softmax_ext\.{name}$"
        assert name == "reference" or re.search(in_table, text, re.MULTILINE), name


def contributing_table() -> list[tuple[list[str], str]]:
    """The patterns of files, and the commands, of each row of "Where to change what"."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Where to change what") : text.index("## Tests")]
    rows = []
    for line in re.findall(r"^\| (?!to change|-).*\|$", section, re.MULTILINE):
        _, files, commands = line.strip("| ").split(" | ")
        folder, patterns = "", []
        for name in re.findall(r"`([^`]+)`", files):
            if name.endswith("/"):
                folder = name
            else:  # in the folder, unless the name itself begins with one
                in_folder = bool(list(ROOT.glob(folder + name)))
                patterns.append(folder + name if in_folder else name)
        rows.append((patterns, commands))
    return rows


def test_contributing_names_every_file() -> None:
    """And none that does not exist."""
    named: set[Path] = set()
    for patterns, _ in contributing_table():
        for pattern in patterns:
            found = set(ROOT.glob(pattern))
            assert found, pattern
            named |= found
    folders = ("csrc/binding", "csrc/common", "csrc/cpu", "csrc/cuda", "masked_softmax_ext")
    suffixes = (".h", ".cpp", ".inc", ".cu", ".cuh", ".py", ".pyi")
    sources = {
        path
        for folder in folders
        for path in (ROOT / folder).iterdir()
        if path.suffix in suffixes and path.name != "_built_for.py"  # the build writes it
    }
    assert sources - named == set()


def test_the_page_of_the_tests_names_every_test() -> None:
    """In the section of its folder; and no file that does not exist."""
    tests = ROOT / "tests"
    page = (tests / "README.md").read_text(encoding="utf-8")
    named: set[Path] = set()
    for section in re.split(r"^## ", page, flags=re.MULTILINE):
        title = section.partition("\n")[0]
        folders = [tests / folder for folder in re.findall(r"`(\w+)/`", title)]
        for name in re.findall(r"[\w/]+\.(?:py|cpp)\b", section):
            in_section = [folder / name for folder in folders if (folder / name).is_file()]
            elsewhere = (place / name for place in (ROOT, tests, *tests.iterdir()))
            assert in_section or any(map(Path.is_file, elsewhere)), name
            named.update(in_section)
    every_test = {path for path in tests.rglob("test_*") if path.suffix in (".py", ".cpp")}
    assert every_test - named == set()


def test_commands_of_contributing_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets
    for path in re.findall(r"\btests/[\w/]+(?:\.\w+)?", text):
        assert (ROOT / path).exists(), path


def test_make_help_explains_every_target() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (demo .*?[^\\\\])$", makefile, re.MULTILINE | re.DOTALL)
    ran = subprocess.run(["make", "help"], cwd=ROOT, text=True, capture_output=True, check=True)
    explained = re.findall(r"^(\S+) +\w.*[.:\w]$", ran.stdout, re.MULTILINE)
    assert sorted(explained) == sorted(set(phony.split()) - {"\\"})


def test_contributing_lists_the_checks_of_a_pull_request() -> None:
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"target:\n((?: +- [a-z-]+\n)+)", workflow)
    commands = re.findall(r"run: (make [a-z-]+)", workflow)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    checks = text[text.index("A pull request runs") : text.index("## Where to change what")]
    for command in [*commands, *(f"make {target}" for target in re.findall(r"- (.*)", matrix))]:
        assert f"| `{command}" in checks, command


def test_pages_that_sources_cite_exist() -> None:
    """Such as docs/guarantees.md, which the tests cite for what they prove."""
    missing = []
    for folder in ("bench", "csrc", "examples", "masked_softmax_ext", "tests", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".sh"):
                cited = re.findall(r"\b(?:docs/\w+|[A-Z]{4,})\.md\b", path.read_text("utf-8"))
                missing += [
                    f"{path.relative_to(ROOT)}: {page}"
                    for page in cited
                    if page not in PLACEHOLDERS and not (ROOT / page).exists()
                ]
    assert not missing
