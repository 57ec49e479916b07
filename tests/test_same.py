"""`make same`: what one side alone has, or has otherwise, is a difference; equal results are none."""

import json
from pathlib import Path

import pytest

from tests.support import same


@pytest.mark.parametrize(("here", "code"), [({"average": 1.5}, 0), ({"average": 1.25}, 1), (None, 1)])
def test_a_revision_is_compared(
    here: dict[str, float] | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees: list[Path] = []

    def run(tree: Path, out: Path, command: list[str]) -> None:
        assert (tree / "src" / "run.py").exists()
        trees.append(tree)
        figures = {"average": 1.5} if tree != same.ROOT else here
        if figures is not None:
            (out / "cell").mkdir(parents=True)
            (out / "cell" / "metrics.json").write_text(json.dumps(figures))

    monkeypatch.setattr(same, "make_inputs", lambda folder: {})
    monkeypatch.setattr(same, "commands", lambda *_: [["src.run"]])
    monkeypatch.setattr(same, "run", run)
    assert same.main(["HEAD"]) == code
    assert len(trees) == 2 and trees[1] == same.ROOT and not trees[0].exists()
    assert ("the same" in capsys.readouterr().out) == (code == 0)
