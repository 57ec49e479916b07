"""Who may know whom: the engine no policy, the evals no cache, policies no engine and no files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = (
    "engine",
    "pool",
    "prefill",
    "decode",
    "members",
    "evictions",
    "contract",
    "cache",
    "attention",
    "prompt_attention",
    "states",
    "jobs",
    "fidelity",
    "session",
    "samples",
)
WORDS = {"full", "random", "recent"}  # names of policies that are English words too
NAMES = {path.stem for path in (ROOT / "conf/policy").glob("*.yaml")} - WORDS
MODULES = {path.stem for path in (ROOT / "policies").glob("*.py")} - {"__init__", "base", "full"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_knows_no_policy_by_name(module: str) -> None:
    """Except the full cache, which fidelity compares with."""
    path = ROOT / "src" / f"{module}.py"
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
    allowed = {
        "src.cache",
        "src.prompt_attention",
        "src.position",
        "src.quantised_cache",
        "src.codebooks",
        "src.contract",
    }
    for path in (ROOT / "policies").glob("*.py"):
        assert {name for name in imports(path) if name.startswith(("src", "evals"))} <= allowed, path.name
