"""Promise: the package is complete: names, documentation, types, modules, build information."""

from __future__ import annotations

import copy
import doctest
import importlib
import importlib.metadata
import inspect
import io
import math
import pickle
import pydoc
import re
from pathlib import Path
from typing import Any

import child
import pytest
import torch
from cases import assert_same_bits, random_input
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import masked_softmax_ext
from masked_softmax_ext import (
    AttentionPooling,
    MaskedLogSoftmax,
    MaskedSoftmax,
    masked_log_softmax,
    masked_logsumexp,
    masked_softmax,
    masked_softmax_,
    reference,
)

ROOT = Path(__file__).parents[2]
MODULES = (MaskedSoftmax, MaskedLogSoftmax)

NAMES = {
    "MaskedLogSoftmax",
    "MaskedSoftmax",
    "build_info",
    "cpu_capability",
    "masked_log_softmax",
    "masked_logsumexp",
    "masked_softmax",
    "masked_softmax_",
    "reference",
}


def test_all_names_exist() -> None:
    assert set(masked_softmax_ext.__all__) >= NAMES
    for name in masked_softmax_ext.__all__:
        assert getattr(masked_softmax_ext, name) is not None


def test_completion_shows_no_helper() -> None:
    """Typing ``masked_softmax_ext.`` lists the public names and modules."""
    listed = {name for name in dir(masked_softmax_ext) if not name.startswith("_")}
    modules = {name for name in listed if inspect.ismodule(getattr(masked_softmax_ext, name))}
    assert listed - modules == set(masked_softmax_ext.__all__) - {"reference"}


def test_help_explains_the_types_of_the_signature() -> None:
    """Its annotations are names, which mean nothing to a reader of help()."""
    shown = pydoc.render_doc(masked_softmax)
    for name in ("Index", "Lengths", "Scale", "Sink"):
        assert name in str(inspect.signature(masked_softmax))
        assert f"``{name}``" in shown
    assert "``int | Tensor``" in shown


def test_everything_public_is_documented() -> None:
    assert (masked_softmax_ext.__doc__ or "").strip()
    for name in masked_softmax_ext.__all__:
        assert len((getattr(masked_softmax_ext, name).__doc__ or "").strip()) > 20, name


@pytest.mark.parametrize("module", [MaskedSoftmax, MaskedLogSoftmax, AttentionPooling])
def test_help_of_forward(module: type[torch.nn.Module]) -> None:
    """It explains every argument, and which errors there are."""
    text = module.forward.__doc__ or ""
    arguments, returns, errors = re.split(r"\n *(?:Returns|Raises):\n", text)
    for name in list(inspect.signature(module.forward).parameters)[1:]:
        assert re.search(rf"^ *{name}: \w", arguments, re.M), name
    assert "type" in returns
    assert "ValueError" in errors


def test_functions_are_typed() -> None:
    """py.typed exists, and every argument and result has a type."""
    assert (Path(masked_softmax_ext.__file__).parent / "py.typed").exists()
    for function in (masked_softmax, masked_log_softmax, masked_softmax_, masked_logsumexp):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (
                f"{function.__name__}: {parameter.name}"
            )


def arguments_of(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_signatures() -> None:
    """Names, order and defaults, also of the reference; arguments after dim are keyword-only."""
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    required = inspect.Parameter.empty
    expected = [
        ("input", positional, required),
        ("lengths", positional, None),
        ("dim", positional, -1),
        ("starts", keyword, None),
        ("scale", keyword, None),
        ("sink", keyword, None),
        ("dtype", keyword, None),
        ("validate", keyword, False),
        ("out", keyword, None),
    ]
    of_log = [*expected[:6], ("padding_value", keyword, -math.inf), *expected[6:]]
    of_sum = [*expected[:6], ("keepdim", keyword, False), *expected[6:-1]]
    assert arguments_of(masked_softmax) == expected
    assert arguments_of(masked_log_softmax) == of_log
    assert arguments_of(masked_logsumexp) == of_sum
    assert arguments_of(reference.masked_softmax) == expected
    assert arguments_of(reference.masked_log_softmax) == of_log
    assert arguments_of(reference.masked_logsumexp) == of_sum
    in_place = [argument for argument in expected if argument[0] not in ("dtype", "out")]
    assert arguments_of(masked_softmax_) == in_place


@pytest.mark.parametrize(
    "module",
    ["", ".bounds", ".compile_pass", ".functional", ".modules", ".packed", ".reference"],
    ids=lambda name: name or "package",
)
def test_docstring_examples(module: str) -> None:
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(
        importlib.import_module("masked_softmax_ext" + module)
    ):
        # Dynamo removes its entries from the globals when it is reset, or else when Python exits.
        runner.run(example, clear_globs=False)
        torch._dynamo.reset()
    assert runner.failures == 0
    if module != ".reference":
        assert runner.tries > 0


@pytest.mark.skipif(
    not (ROOT / "masked_softmax_ext").is_dir(), reason="the source of the package is not here"
)
def test_every_folder_with_modules_is_packaged() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = \[(.*)\]$", pyproject, re.M)
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("masked_softmax_ext/**/*.py")}
    assert set(re.findall(r'"(.*?)"', listed)) == {".".join(folder.parts) for folder in folders}


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # import raises ImportError
import masked_softmax_ext
assert not any(name.startswith("masked_softmax_ext.integrations") for name in sys.modules)
import masked_softmax_ext.integrations.transformers
"""


def test_transformers_is_imported_by_its_integration_only() -> None:
    """Which says what to install if it is missing."""
    ran = child.run_python(WITHOUT_TRANSFORMERS)
    assert ran.returncode != 0
    assert (
        'needs transformers 5.10 or newer; type: pip install "transformers>=5.10,<6"' in ran.stdout
    )


def test_build_info() -> None:
    info = masked_softmax_ext.build_info()
    assert isinstance(info, dict)
    assert {"torch", "cuda", "compiler"} <= set(info)
    assert str(info["torch"]).split("+")[0] == torch.__version__.split("+")[0]
    assert info["cuda"] is None or str(info["cuda"])[0].isdigit()
    assert any(name in str(info["compiler"]).lower() for name in ("gcc", "g++", "clang", "msvc"))


def test_build_info_returns_a_copy() -> None:
    masked_softmax_ext.build_info().clear()
    assert "torch" in masked_softmax_ext.build_info()


def test_one_version_everywhere() -> None:
    """``__version__`` is that of the installed package, the citation and the documentation."""
    version = masked_softmax_ext.__version__
    for installed in importlib.metadata.distributions(name="masked_softmax_ext"):
        assert installed.version.partition("+")[0] == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert re.findall(r'name = "masked-softmax-ext"\nversion = "(.+)"', page) == [version]


def test_one_range_of_torch_everywhere() -> None:
    """Of pyproject.toml and of the metadata that the page about installation gives to uv."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    (expected,) = re.findall(r'^dependencies = (\["torch.*?"\])', pyproject, re.MULTILINE)
    assert re.findall(r'^requires-dist = (\["torch.*?"\])', page, re.MULTILINE) == [expected]


def test_one_version_of_each_style_tool() -> None:
    """Those of make lint, which pyproject.toml lists, and of pre-commit are the same."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    repository = r"repo: .*/(?:mirrors-)?([\w-]+?)(?:-pre-commit)?\n +rev: v([\d.]+)"
    versions = dict(re.findall(repository, hooks))
    assert set(versions) == {"ruff", "clang-format"}  # mypy is that of make lint
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert dict(re.findall(r"\b(ruff|clang-format)==([\d.]+)", pyproject)) == versions


def test_operators_are_registered() -> None:
    for name in ("masked_softmax", "masked_log_softmax"):
        operator = getattr(torch.ops.masked_softmax_ext, name)
        assert set(operator.overloads()) == {"default", "out"}
    assert torch.ops.masked_softmax_ext.masked_softmax_.overloads() == ["default"]


def test_operator_schemas() -> None:
    arguments = (
        "(Tensor input, Tensor? lengths=None, int dim=-1, Tensor? starts=None, *, "
        "float? scale=None, float? padding_value=None, ScalarType? dtype=None, "
        "bool validate=False, SymInt? packed=None) -> Tensor"
    )
    for name in ("masked_softmax", "masked_log_softmax"):
        schema = str(getattr(torch.ops.masked_softmax_ext, name).default._schema)
        assert schema == f"masked_softmax_ext::{name}{arguments}"


# The modules


@pytest.mark.parametrize("module", MODULES)
def test_module_gives_the_results_of_the_function(module: Any) -> None:
    function = masked_softmax if module is MaskedSoftmax else masked_log_softmax
    x = random_input((3, 4, 5), torch.float32, seed=1)
    lengths, starts = torch.tensor([1, 0, 3]), torch.tensor([0, 1, 1])
    assert_same_bits(module()(x, lengths), function(x, lengths))
    assert_same_bits(module()(x, lengths, starts), function(x, lengths, starts=starts))
    assert_same_bits(module(1, scale=0.5)(x, 2, starts=1), function(x, 2, 1, starts=1, scale=0.5))
    assert_same_bits(module(dim=0)(x, lengths=3), function(x, 3, 0))


@pytest.mark.parametrize("module", MODULES)
def test_module_is_a_drop_in_replacement(module: Any) -> None:
    """Like nn.Softmax, an nn.Module without parameters, buffers or state."""
    instance = module()
    assert isinstance(instance, nn.Module)
    assert list(instance.parameters()) == []
    assert list(instance.buffers()) == []
    assert instance.state_dict() == {}
    instance.load_state_dict({})
    assert instance.train() is instance
    assert instance.to(torch.float64) is instance
    with pytest.raises(TypeError):
        module(-1, 0.5)  # scale is keyword-only


@pytest.mark.parametrize("module", MODULES)
def test_module_repr(module: Any) -> None:
    assert repr(module()) == f"{module.__name__}(dim=-1)"
    assert repr(module(1, scale=0.5)) == f"{module.__name__}(dim=1, scale=0.5)"


@pytest.mark.parametrize("module", MODULES)
def test_module_copies_and_pickles(module: Any) -> None:
    x = random_input((3, 5), torch.float32, seed=2)
    original = module(0, scale=0.25)
    expected = original(x, 2)
    saved = io.BytesIO()
    torch.save(original, saved)
    saved.seek(0)
    copies = [copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    copies.append(torch.load(saved, weights_only=False))
    for other in copies:
        assert type(other) is module
        assert repr(other) == repr(original)
        assert_same_bits(other(x, 2), expected)


def test_module_has_gradients() -> None:
    x = random_input((3, 5), torch.float32, seed=3).requires_grad_()
    MaskedSoftmax(scale=2.0)(x, 3)[:, 0].sum().backward()
    (expected,) = torch.autograd.grad(masked_softmax(x, 3, scale=2.0)[:, 0].sum(), x)
    assert x.grad is not None
    assert_same_bits(x.grad, expected)
    assert float(expected.abs().max()) > 0


def test_modules_print_numbers_without_values() -> None:
    """As those of a model that is built on the meta device."""
    unknown = torch.tensor(0.5, device="meta")
    printed = "tensor(..., device='meta', size=())"
    assert repr(MaskedSoftmax(scale=unknown)) == f"MaskedSoftmax(dim=-1, scale={printed})"
    module = MaskedLogSoftmax(padding_value=unknown)
    assert repr(module) == f"MaskedLogSoftmax(dim=-1, padding_value={printed})"
    with FakeTensorMode():
        assert "FakeTensor" in repr(MaskedLogSoftmax(padding_value=torch.ones(())))
    assert repr(MaskedLogSoftmax(padding_value=-math.inf)) == "MaskedLogSoftmax(dim=-1)"
    assert repr(MaskedLogSoftmax(0, scale=2, padding_value=torch.tensor(0.5))) == (
        "MaskedLogSoftmax(dim=0, scale=2.0, padding_value=0.5)"
    )


# Attention pooling


@pytest.mark.parametrize("hidden", [None, 7], ids=["linear", "hidden"])
def test_attention_pooling(hidden: int | None) -> None:
    """The mean of the valid steps, weighted by softmax; zeros for an empty sequence."""
    pool = AttentionPooling(4, hidden, dtype=torch.float64)
    x, lengths = random_input((3, 5, 4), torch.float64, seed=4), torch.tensor([3, 0, 5])
    pooled, weights = pool(x, lengths, return_weights=True)
    assert_same_bits(pool(x, lengths), pooled)
    for row, length in enumerate(lengths.tolist()):
        steps = x[row, :length]
        if hidden is None:
            scores = steps @ pool.score.weight[0]
        else:
            first, _, last = pool.score
            scores = torch.tanh(steps @ first.weight.T + first.bias) @ last.weight[0]
        expected = scores.softmax(0)
        torch.testing.assert_close(weights[row, :length], expected)
        torch.testing.assert_close(pooled[row], expected @ steps)
    assert bool((pooled[1] == 0).all())
    assert bool((weights[0, 3:] == 0).all())


def test_attention_pooling_of_any_batch_shape() -> None:
    pool = AttentionPooling(4, 3)
    x = random_input((2, 3, 5, 4), torch.float32, seed=5)
    lengths = torch.tensor([[1, 2, 3], [0, 5, 4]])
    pooled = pool(x, lengths)
    assert pooled.shape == (2, 3, 4)
    for index, length in enumerate(lengths.flatten().tolist()):
        torch.testing.assert_close(
            pool(x.flatten(0, 1)[index], length), pooled.flatten(0, 1)[index]
        )
    left_padded = pool(x.flip(2), lengths, 5 - lengths)
    torch.testing.assert_close(left_padded, pooled)
    torch.testing.assert_close(
        pool(x, torch.tensor([5, 2]))[1], pool(x[1], torch.tensor([2, 2, 2]))
    )
    assert pool(torch.zeros(2, 0, 4), 0).tolist() == [[0.0] * 4] * 2


def test_attention_pooling_gradients() -> None:
    """gradcheck of input and parameters; padding and empty sequences have gradient 0."""
    pool = AttentionPooling(3, 2, dtype=torch.float64)
    x = random_input((2, 4, 3), torch.float64, seed=6).requires_grad_()
    lengths = torch.tensor([3, 0])
    assert torch.autograd.gradcheck(lambda x, *_: pool(x, lengths), (x, *pool.parameters()))
    pool(x, lengths).pow(2).sum().backward()
    assert x.grad is not None
    assert bool((x.grad[0, :3].abs() > 1e-9).any(-1).all())
    assert bool((x.grad[0, 3:] == 0).all() and (x.grad[1] == 0).all())
    for parameter in pool.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 1e-6


def test_attention_pooling_errors() -> None:
    pool = AttentionPooling(4)
    for wrong in (torch.zeros(4), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"\(\.\.\., steps, 4\), but got \("):
            pool(wrong, 1)
    with pytest.raises(ValueError, match="row 1 has length 6"):
        pool(torch.zeros(2, 5, 4), torch.tensor([5, 6]))


def test_attention_pooling_copies_and_pickles() -> None:
    pool = AttentionPooling(4, 3)
    assert repr(pool).startswith("AttentionPooling(\n  features=4, hidden=3\n")
    assert repr(AttentionPooling(4)).startswith("AttentionPooling(\n  features=4\n")
    x = random_input((2, 5, 4), torch.float32, seed=7)
    loaded = AttentionPooling(4, 3)
    loaded.load_state_dict(pool.state_dict())
    assert set(pool.state_dict()) == {"score.0.weight", "score.0.bias", "score.2.weight"}
    for other in (loaded, copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert_same_bits(other(x, 3), pool(x, 3))
    assert {parameter.dtype for parameter in pool.to(torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
    assert pool(x.bfloat16(), 3).dtype == torch.bfloat16
    assert {p.device.type for p in AttentionPooling(4, 3, device="meta").parameters()} == {"meta"}


def test_attention_pooling_composes() -> None:
    """With torch.compile, torch.export, vmap and autocast."""
    pool = AttentionPooling(4, 3)
    x, lengths = random_input((3, 5, 4), torch.float32, seed=8), torch.tensor([3, 0, 5])
    expected = pool(x, lengths)
    program = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(program(x, lengths), expected)
    exported = torch.export.export(pool, (x, lengths)).module()
    torch.testing.assert_close(exported(x, lengths), expected)
    torch.testing.assert_close(torch.vmap(pool)(x, lengths), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pool(x, lengths).float(), expected, rtol=0.05, atol=0.05)


WITHOUT_NETWORK = """
import sys
import torch

def refuse(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http"):
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(refuse)
import masked_softmax_ext as m
x, lengths = torch.randn(300, 400, requires_grad=True), torch.arange(300)
m.masked_softmax(x, lengths).sum().backward()
m.AttentionPooling(400)(x[None], 200)
m.packed_log_softmax(x, torch.tensor([0, 100, 300]), dim=0)
print("no network access")
# The hook notices a socket:
import socket
socket.socket()
"""


def test_no_network_at_import_or_in_calls() -> None:
    """The script's last line opens a socket, which its hook must refuse."""
    ran = child.run_python(WITHOUT_NETWORK)
    assert "no network access" in ran.stdout, ran.stdout
    assert ran.returncode != 0
    assert "socket.__new__" in ran.stdout
