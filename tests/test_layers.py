"""Who may know whom: imports point down the floors of docs/architecture.md; methods' names stay in their rooms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = sorted([*ROOT.glob("src/engine/*.py"), *ROOT.glob("src/kv/*.py"), *ROOT.glob("src/session/*.py")])
WORDS = {"full", "random", "recent"}  # names of policies that are English words too
NAMES = {path.stem for path in (ROOT / "conf/policy").glob("*.yaml")} - WORDS
MODULES = {path.stem for path in (ROOT / "policies").glob("*.py")} - {"__init__", "base", "full"}
CODE = sorted(path for room in ("src", "policies", "evals") for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, also for its types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if (ROOT / f"{name.replace('.', '/')}.py").exists()}
            found |= modules or {str(node.module)}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] in ("policies", "evals") else ".".join(parts[:2])


def floors() -> dict[str, int]:
    """Room -> its floor, 1 at the top: the list in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    lines = re.search(r"<!-- floors -->\n(.*?)<!-- end -->", text, re.S)
    assert lines
    return {
        name: int(number)
        for number, names in re.findall(r"^(\d+)\. (.*)$", lines[1], re.M)
        for name in names.split(", ")
    }


def test_every_room_has_a_floor() -> None:
    assert {room(module_of(path)) for path in CODE} - {"src"} == set(floors())


@pytest.mark.parametrize("path", CODE, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    own, level = room(module_of(path)), floors()
    for name in sorted(imports(path)):
        there = room(name)
        if name.split(".")[0] in ("src", "policies", "evals") and there != own:
            assert level[there] > level[own], f"{module_of(path)} imports {name}: an arrow up"


def test_no_room_has_a_circle() -> None:
    graph = {module_of(path): imports(path) for path in CODE}
    graph = {module: {name for name in found if name in graph} for module, found in graph.items()}

    def circle(module: str, way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        if module in way:
            yield (*way[way.index(module) :], module)
        elif module not in done:
            for name in graph[module]:
                yield from circle(name, (*way, module))
            done.add(module)

    done: set[str] = set()
    assert not [way for module in graph for way in circle(module)]


@pytest.mark.parametrize("path", ENGINE, ids=module_of)
def test_the_engine_knows_no_policy_by_name(path: Path) -> None:
    """Except the full cache, which fidelity compares with."""
    assert not {f"policies.{name}" for name in MODULES} & imports(path)
    code = ast.parse(path.read_text())
    strings = {n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not NAMES & strings
    names = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
    assert not {"H2O", "SnapKV", "AhaKV", "StreamingLLM", "Scope", "HCAttention", "Oracle"} & names


def test_evals_know_nothing_of_caches() -> None:
    for path in (ROOT / "evals").glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("src", "policies", "torch")}, path.name


def test_policies_know_tensors_only() -> None:
    """What they share with the engine are data structures; no engine, no sessions, no results."""
    for path in (ROOT / "policies").glob("*.py"):
        assert {room(name) for name in imports(path) if name.startswith(("src", "evals"))} <= {"src.kv"}, path.name


@pytest.mark.parametrize("path", CODE, ids=module_of)
def test_files_and_functions_are_short_enough_to_read(path: Path) -> None:
    """At most 320 lines a file; in the engine and beside it, at most 60 a function."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 320
    if room(module_of(path)) in ("src.engine", "src.kv"):
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        long = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno and n.end_lineno - n.lineno > 59}
        assert not long
