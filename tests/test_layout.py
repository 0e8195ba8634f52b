"""The house: imports run one way, folders say what is in them, files and functions stay short, siblings agree."""

import ast
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import alignloss
from alignloss.backends import _torch

ROOT = Path(alignloss.__file__).parent
KERNELS = ROOT.parent / "kernels"
# each file at the top may import what stands before it; each folder, of that, what its docstring says
FLOORS = [
    "checks", "losses", "kernels", "backends", "ops", "planning", "logprob", "recipes", "modules", "hf", "trl",
    "commands",
]  # fmt: skip
# primitives for which the torch backend has a formula of its own elsewhere, `losses`; and of a GEMM of our own
TRITON_ALONE = {"preference", "preference_backward", "exponentials"}
# the halves of `finish`, between which processes add up, on whatever device
TORCH_ALONE = {"derivatives", "results"}
FILES = {
    ".".join(("alignloss", *(["kernels"] * (folder == KERNELS)), *path.relative_to(folder).with_suffix("").parts)): path
    for folder in (ROOT, KERNELS)
    for path in sorted(folder.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports, inside its functions too, by full name without __init__."""
    package, found = name.split(".")[:-1], set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    known = {name.removesuffix(".__init__") for name in FILES}
    ours = {n if n in known else n.rpartition(".")[0] for n in found if n.split(".")[0] == "alignloss"}
    return ours & known


def allowed(folder: str) -> set[str]:
    """What the docstring of a folder says that it imports: one sentence, `Imports a, b and c.`, or nothing of ours."""
    below = set(FLOORS[: FLOORS.index(folder)])
    if f"alignloss.{folder}.__init__" not in FILES:
        return below
    text = ast.get_docstring(ast.parse(FILES[f"alignloss.{folder}.__init__"].read_text())) or ""
    (said,) = re.findall(r"^Imports ([^.;]+)", text, re.MULTILINE)
    named = set(re.findall(r"\w+", said))
    assert named & {*FLOORS, "else", "nothing"}, f"{folder} says {said!r}"
    return below if "else" in named else named & below


@pytest.mark.skipif(not KERNELS.exists(), reason="an installed package, not the source tree")
def test_imports_run_one_way():
    graph = {name.removesuffix(".__init__"): imports(name) for name in FILES if name != "alignloss.__init__"}
    assert graph["alignloss.ops.walk"] >= {"alignloss.backends", "alignloss.kernels.state"}  # the search finds them
    for name, found in graph.items():
        floor = name.split(".")[1]
        for other in found - {"alignloss"}:
            assert other.split(".")[1] in {floor, *allowed(floor)}, f"{name} imports {other}"
        assert "alignloss" not in found or name.startswith("alignloss.commands."), name
    del graph["alignloss.commands.demo"]  # a user of the public package
    for name, found in graph.items():
        found -= {"alignloss", name.rpartition(".")[0]}  # a folder's own __init__
    list(TopologicalSorter(graph).static_order())  # raises for a circle


def test_a_newcomer_finds_a_place():
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 14
    folders = {path.parent for path in FILES.values()}
    for folder in folders - {KERNELS}:
        if folder.name != "data":
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_files_and_functions_are_short():
    for path in FILES.values():
        text = path.read_text()
        assert text.count("\n") <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


def test_the_backends_agree():
    _triton = pytest.importorskip("alignloss.backends._triton")
    theirs, ours = (
        {
            name: list(inspect.signature(value).parameters)
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
        for module in (_torch, _triton)
    )
    assert {name: ours.pop(name) for name in TRITON_ALONE} and {name: theirs.pop(name) for name in TORCH_ALONE}
    assert ours == theirs
