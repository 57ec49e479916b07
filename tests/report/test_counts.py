"""How many entries each layer and head holds, as records say it and as the report draws it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.compare.analysis import analyse
from src.compare.matched import make_study
from src.records.record import Record
from src.report.counts import counts_map, mean_counts
from src.report.write import write_report
from tests.support.cli import call


def record(kept: Any) -> Record:
    return Record(task="t", id="1", prompt_hash="x", kept=kept)


def test_layers_and_heads_are_told_apart() -> None:
    by_head = mean_counts([record({"prompt": [[1, 3], [5, 7]]}), record({"prompt": [[3, 3], [5, 9]]})])
    assert by_head is not None and by_head.tolist() == [[2, 3], [5, 8]]
    by_layer = mean_counts([record({"prompt": [4, 6, 8]})])
    assert by_layer is not None and by_layer.tolist() == [[4], [6], [8]]
    mixed = mean_counts([record({"prompt": [[1, 3], [5, 7]]}), record({"prompt": [3, 5]})])
    assert mixed is not None and mixed.tolist() == [[2, 3], [5, 6]]


@pytest.mark.parametrize("kept", [None, {"prompt": 12}, {"end": 3}, {"prompt": "x"}, {"prompt": [[1, 2], [3]]}])
def test_what_is_alike_or_unknown_has_no_map(kept: Any) -> None:
    assert mean_counts([record(kept)]) is None


def test_the_report_draws_cells_that_differ(base: list[str], tmp_path: Path) -> None:
    """A pyramid and budgets by head are drawn, a uniform cell is not; totals are the budget's."""
    grid = ["policies=[full,h2o,{name: h2o, allocate: pyramid},{name: h2o, allocate: adakv}]", "budgets=[24]"]
    done = call("sweep", *base, *grid, "limit=1", f"output_root={tmp_path}")
    assert done.code == 0, done.err
    runs = next(path for path in tmp_path.iterdir() if path.is_dir())
    study = make_study([runs])
    for run in study.runs:
        counts = mean_counts(run.records.values())
        assert (counts is None) == (run.policy in ("full", "h2o"))
        assert counts is None or np.isclose(counts.mean(), 24)
    figure = counts_map(analyse(study, resamples=100))
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert [title.split(",")[0] for title in titles] == ["h2o+adakv", "h2o+pyramid"]
    page, _, _ = write_report([runs], resamples=100)
    assert "Who holds how much" in page.read_text()
