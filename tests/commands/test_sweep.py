"""`python -m src.sweep`: every cell is what `src.run` would have written, and the two finish each other's work."""

from pathlib import Path

import pytest

from tests.support.cli import call, count_lines, folders, lines, predictions, table

GRID = ["policies=[full,streaming_llm,h2o,{name: snapkv, kernel: 1},ahakv]", "budgets=[40,0.3]"]
CELLS = [
    *(["policy=full"],),
    *([f"policy={name}", f"budget={b}"] for name in ("streaming_llm", "h2o", "ahakv") for b in ("40", "0.3")),
    *(["policy=snapkv", "policy.kernel=1", f"budget={b}"] for b in ("40", "0.3")),
]


def test_every_cell_equals_its_run_alone(base: list[str], tmp_path: Path) -> None:
    arguments = [*base, "tasks.names=[needle,kv_lookup]"]
    done = call("sweep", *arguments, *GRID)
    assert done.code == 0, done.err
    assert done.folder == tmp_path / "results" / "tiny-llama" and len(done.out.splitlines()) == 1
    swept = folders(done.folder)
    alone = [call("run", *arguments, *cell, "lanes=1", f"output_root={tmp_path / 'alone'}") for cell in CELLS]
    assert [one.code for one in alone] == [0] * len(CELLS)
    assert sorted(swept) == sorted(one.folder.name for one in alone)
    for one in alone:
        assert predictions(swept[one.folder.name]) == predictions(one.folder)
        assert table(swept[one.folder.name]) == table(one.folder)
    texts = {tuple(p[0] for p in predictions(folder).values()) for folder in swept.values()}
    assert len(texts) >= 5  # the cells do differ, or equality would prove nothing
    names = {name.rpartition("-")[0] for name in swept}
    assert names == {"full-all"} | {f"{p}-{b}" for p in ("streaming_llm", "h2o", "snapkv", "ahakv") for b in (40, 0.3)}


def test_runs_and_sweeps_finish_each_other(base: list[str], tmp_path: Path) -> None:
    first = call("run", *base, "policy=h2o", "budget=40", "limit=1")
    begun = (first.folder / "predictions.jsonl").read_bytes()
    done = call("sweep", *base, "policies=[h2o,streaming_llm]", "budgets=[40]")
    assert done.code == 0, done.err
    grown = (first.folder / "predictions.jsonl").read_bytes()
    assert grown.startswith(begun) and len(predictions(first.folder)) == 2  # one more line, and the old one stayed
    assert len(folders(done.folder)) == 2
    other = next(folder for name, folder in folders(done.folder).items() if name.startswith("streaming"))
    again = call("run", *base, "policy=streaming_llm", "budget=40", "lanes=1")
    assert again.folder == other and count_lines(other / "predictions.jsonl") == 2
    more = call("run", *base, "policy=streaming_llm", "budget=40", "limit=3")
    assert more.folder == other and len(predictions(other)) == 3


def test_options_of_a_policy_are_cells_of_their_own(base: list[str]) -> None:
    done = call("sweep", *base, "policies=[h2o,{name: h2o, heavy_share: 0.25}]", "budgets=[40]", "limit=1")
    assert done.code == 0, done.err
    settings = [(folder / "config.yaml").read_text() for folder in folders(done.folder).values()]
    assert sorted("heavy_share: 0.25" in text for text in settings) == [False, True]


def test_a_default_written_out_is_the_same_cell(base: list[str]) -> None:
    done = call("sweep", *base, "policies=[h2o,{name: h2o, heavy_share: 0.5}]", "budgets=[40]")
    assert done.code == 2 and "listed twice" in done.err


def test_one_is_the_whole_prompt(base: list[str]) -> None:
    """`budget` in (0, 1] is a share of the prompt: 1 and 1.0 mean all of it."""
    done = [call("run", *base, "policy=h2o", f"budget={budget}", "limit=1") for budget in ("1", "1.0")]
    assert [one.code for one in done] == [0, 0] and done[0].folder == done[1].folder
    (record,) = lines(done[0].folder)
    assert record["kept"]["prompt"] == record["prompt_tokens"]


def test_live_table(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: a bar over the whole grid and the scores so far, a row per policy, a column per budget."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    done = call("sweep", *base, "policies=[full,{name: h2o, heavy_share: 0.25}]", "budgets=[40,50]", "limit=1")
    assert done.code == 0, done.err
    for shown in ("mean score", "h2o heavy_share=0.25", "full", "40", "50", "all", "3/3"):
        assert shown in done.err, shown


def test_plain_lines_without_a_terminal(base: list[str]) -> None:
    done = call("sweep", *base, "policies=[full,h2o]", "budgets=[40]", "limit=1")
    assert "2/2 done" in done.err and "h2o-40" in done.err
