"""What a user can get wrong: one line on stderr that names setting, value and what is valid; exit code 2; nothing
written, nothing lost, no traceback."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cli import ROOT, Result, call, folders, lines, longbench_folder, metrics, row, unchanged
from tests.support.tiny import tiny, tiny_tokenizer

HOTPOT = ["tasks=hotpotqa", "limit=null"]


def refused(done: Result, *words: str) -> None:
    assert done.code == 2, done.out + done.err
    shown = done.err.splitlines()
    assert len(shown) == 1 and shown[0].startswith("error: ") and not done.out, done.out + done.err
    for word in words:
        assert word in shown[0], f"{word!r} is not in: {shown[0]}"


SETTINGS: dict[str, list[str]] = {
    # overrides: what the line must name
    "policy=foo": ["policy=foo", "valid: a", "ahakv, ", "full, h2o", "snapkv"],
    "policy=null": ["policy=null", "valid: a", "full, h2o"],
    "model=foo": ["model=foo", "llama3-8b", "smollm2-135m"],
    "model=null": ["model=null", "valid: gemma-7b"],
    "tasks=foo": ["tasks=foo", "hotpotqa", "needle", "pocket"],
    "tasks=null": ["tasks=null", "needle", "longbench_en"],
    "tasks.names=[foo]": ["tasks.names=foo", "needle", "kv_lookup"],
    "tasks.names=needle": ["tasks.names=needle", "a list"],
    "tasks.names=[]": ["tasks.names=[]"],
    "tasks.suite=foo": ["tasks.suite=foo", "longbench"],
    "+tasks.reference_rows=true": ["tasks.reference_rows", "pocket"],
    "experiment=demo": ["policies=", "one policy", "src.sweep"],
    "budgett=3": ["budgett", "budget", "lanes"],
    "policy.windw=3": ["policy.windw", "windw", "window", "score_pool"],
    "model.foo=1": ["model.foo", "max_prompt_tokens"],
    "policy.window=abc": ["window=abc", "whole number"],
    "policy.gain_position=foo": ["gain_position=foo", "absolute", "cached"],
    "policy.step_gain=1": ["step_gain=1", "true, false"],
    "budget=0": ["budget=0", "(0, 1]"],
    "budget=-3": ["budget=-3", "(0, 1]"],
    "budget=1.5": ["budget=1.5", "(0, 1]"],
    "budget=-0.5": ["budget=-0.5", "(0, 1]"],
    "budget=nan": ["budget=nan", "(0, 1]"],
    "budget=inf": ["budget=inf", "(0, 1]"],
    "budget=abc": ["budget=abc", "(0, 1]"],
    "budget=null": ["budget=", "(0, 1]"],
    "budget=true": ["budget=", "(0, 1]"],
    "budget=[3]": ["budget=[3]", "(0, 1]"],
    "budget=32": ["budget=32", "33 or more"],  # AhaKV keeps 32 tokens whatever happens
    "policy=snapkv budget=32": ["budget=32", "SnapKV", "33 or more"],
    "policy=streaming_llm budget=4": ["budget=4", "StreamingLLM", "5 or more"],
    "policy=snapkv policy.kernel=4": ["kernel=4", "odd"],
    "limit=abc": ["limit=abc", "whole number, 1 or more", "null"],
    "limit=0": ["limit=0", "1 or more"],
    "limit=2.5": ["limit=2.5", "whole number"],
    "limit=true": ["limit=true", "whole number"],
    "lanes=0": ["lanes=0", "1 or more"],
    "lanes=abc": ["lanes=abc", "whole number"],
    "lanes=null": ["lanes=null", "whole number"],
    "seed=abc": ["seed=abc", "whole number"],
    "seed=null": ["seed=null", "whole number"],
    "min_new_tokens=-1": ["min_new_tokens=-1", "0 or more", "null"],
    "max_new_tokens=0": ["max_new_tokens=0", "1 or more", "null"],
    "prompt_scope=foo": ["prompt_scope=foo", "whole, context"],
    "fidelity=3": ["fidelity=3", "true, false"],
    "overwrite=maybe": ["overwrite=maybe", "true, false"],
    "edit_similarity=foo": ["edit_similarity=foo", "levenshtein, difflib"],
    "broken_rows=skip": ["broken_rows=skip", "refuse, record"],
    "retention=some": ["retention=some", "positions, bins, off"],
    "output_root=null": ["output_root=null"],
    "wandb.mode=foo": ["wandb.mode=foo", "auto, online, offline, disabled"],
    "wandb.init_timeout=abc": ["wandb.init_timeout=abc", "seconds"],
    "wandb.tags=foo": ["wandb.tags=foo", "a list"],
    "model.max_prompt_tokens=abc": ["model.max_prompt_tokens=abc", "whole number"],
    "model.max_prompt_tokens=9999": ["model.max_prompt_tokens=9999", "4096"],
    "model.dtype=int8": ["model.dtype=int8", "float32", "bfloat16"],
    "model.device=foo": ["model.device=foo", "cuda"],
    "model.stop_tokens=[<end>]": ["model.stop_tokens", "<end>"],
    "model.path=/does/not/exist": ["model.path=/does/not/exist", "safetensors"],
    "model.path=null": ["model.path=null", "model.path=FOLDER"],
    "model=random model.like=foo": ["model.like=foo", "llama3-8b"],
    "tasks=longgenbench tasks.data_dir=/does/not/exist": ["tasks.data_dir=/does/not/exist", "Linking-ai/SCOPE"],
    "tasks=longbench tasks.data_dir=/does/not/exist": ["tasks.data_dir=/does/not/exist"],
    "hydra/launcher=submitit_slurm": ["cluster=slurm", "pip install '.[slurm]'"],
    "cluster=slurm": ["cluster=slurm", "pip install '.[slurm]'"],
    "cluster=ray": ["cluster=ray", "pip install '.[ray]'"],
    "policy=h2o=3": ["policy=h2o=3"],
}


@pytest.mark.parametrize("overrides", SETTINGS)
def test_settings(base: list[str], tmp_path: Path, overrides: str) -> None:
    if ("slurm" in overrides and find_spec("submitit")) or ("ray" in overrides and find_spec("ray")):
        pytest.skip("the launcher is installed here")
    done = call("run", *base, "budget=40", *overrides.split())
    refused(done, *SETTINGS[overrides])
    assert not (tmp_path / "results").exists()


GRIDS: dict[str, list[str]] = {
    "policies=[]": ["policies=[]", "empty"],
    "budgets=[]": ["budgets=[]", "empty", "h2o"],
    "policies=h2o": ["policies=h2o", "a list"],
    "policies=null": ["policies=None", "a list"],
    "budgets=40": ["budgets=40", "a list"],
    "policies=[foo]": ["policy=foo", "ahakv, ", "full, h2o"],
    "policies=[5]": ["policies", "5", "name"],
    "policies=[[h2o]]": ["policies", "name"],
    "policies=[{kernel: 1}]": ["policies", "no name"],
    "policies=[{name: snapkv, kernl: 1}]": ["snapkv", "kernl", "group, kernel, pooling, window"],
    "policies=[{name: full, window: 1}]": ["full", "window", "valid: allocate, store"],
    "policies=[{name: snapkv, kernel: 2}]": ["snapkv", "kernel=2", "odd"],
    "policies=[{name: snapkv, pooling: foo}]": ["pooling=foo", "max, avg"],
    "policies=[h2o,full,h2o]": ["h2o", "40", "listed twice"],
    "policies=[full,full]": ["full", "listed twice"],
    "budgets=[40,0.5,40.0]": ["40", "listed twice"],
    "budgets=[40,abc]": ["budget=abc", "(0, 1]"],
    "budgets=[40,null]": ["budget=", "(0, 1]"],
    "policies=[h2o,snapkv] budgets=[40,20]": ["budget=20", "SnapKV", "33 or more"],
    "max_lanes=0": ["max_lanes=0", "1 or more"],
    "lanes=3": ["lanes", "max_lanes"],
}


@pytest.mark.parametrize("overrides", GRIDS)
def test_grids(base: list[str], tmp_path: Path, overrides: str) -> None:
    """Refused before anything runs, also if only the last cell is wrong."""
    given = overrides.replace("] budgets", "]|budgets").split("|")
    done = call("sweep", *base, "policies=[h2o]", "budgets=[40]", *given)
    refused(done, *GRIDS[overrides])
    assert not (tmp_path / "results").exists()


def test_on_the_command_line(base: list[str], tmp_path: Path) -> None:
    """In a process of its own nothing else gets onto stderr either, and the exit code is the shell's."""
    command = [sys.executable, "-m", "src.run", *base, "budget=1.5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    refused(Result(done.returncode, done.stdout, done.stderr), "budget=1.5", "(0, 1]")
    assert not (tmp_path / "results").exists()


# Without network.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGBENCH_DIR", raising=False)


def test_missing_data(base: list[str], tmp_path: Path, offline: None) -> None:
    done = call("run", *base, "tasks=longbench_en", "policy=h2o", "budget=40")
    refused(done, "data.zip", "tasks.data_dir")
    assert not (tmp_path / "results").exists()


def test_missing_weights(base: list[str], tmp_path: Path, offline: None) -> None:
    arguments = [a for a in base if not a.startswith("model")]
    done = call("run", *arguments, "model=llama3-8b", "policy=h2o", "budget=40")
    refused(done, "meta-llama/Meta-Llama-3-8B-Instruct", "model.path=FOLDER", "hf download")
    assert not (tmp_path / "results").exists()


def test_pickled_weights(base: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"not even looked at")
    refused(call("run", *base, f"model.path={folder}", "budget=40"), "pytorch_model.bin", "pickle")


# Rows.

BROKEN: dict[str, tuple[Any, list[str]]] = {
    "missing field": (row(2, answers=None), ["'answers'", "missing"]),
    "wrong type": (row(2, context=["a", "b"]), ["'context'", "a string"]),
    "broken JSON": (json.dumps(row(2))[:-9], ["broken JSON"]),
    "no object": ("[1, 2]", ["JSON object"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_malformed_row_is_refused(base: list[str], tmp_path: Path, kind: str) -> None:
    bad, words = BROKEN[kind]
    data = longbench_folder(tmp_path / "data", [row(0), row(1), bad])
    done = call("run", *base, *HOTPOT, f"tasks.data_dir={data}", "policy=h2o", "budget=40")
    refused(done, "hotpotqa.jsonl, line 3", *words)
    assert not (tmp_path / "results").exists()


def test_malformed_row_is_recorded(base: list[str], tmp_path: Path) -> None:
    """A sweep fails that sample with file and line, finishes the rest, and exits with 1; mended data heals it."""
    torn = json.dumps(row(1, _id=None) | {"_id": "row1"})
    rows = [row(0), '{"_id": "row1", ' + torn[:60], row(2, answers=None), row(3)]
    data = longbench_folder(tmp_path / "data", rows)
    grid = [*base, *HOTPOT, f"tasks.data_dir={data}", "policies=[full,h2o]", "budgets=[40]"]
    done = call("sweep", *grid)
    assert done.code == 1 and "4 samples failed" in done.err and "Traceback" not in done.err, done.err
    for folder in folders(done.folder).values():
        found = {record["id"]: record for record in lines(folder)}
        assert len(found) == 4 and found["row0"]["score"] is not None and found["row3"]["error"] is None
        assert "hotpotqa.jsonl, line 2: broken JSON" in found["row1"]["error"]
        assert "hotpotqa.jsonl, line 3" in found["row2"]["error"] and "'answers'" in found["row2"]["error"]
        assert found["row2"]["score"] is None and found["row2"]["prediction"] == ""
        figures = metrics(folder)
        assert (figures["samples"], figures["failed"]) == (2, 2)
        assert (figures["tasks"]["hotpotqa"]["n"], figures["tasks"]["hotpotqa"]["failed"]) == (2, 2)
    written = {name: (folder / "predictions.jsonl").read_bytes() for name, folder in folders(done.folder).items()}
    again = call("sweep", *grid)
    assert again.code == 1
    assert written == {n: (f / "predictions.jsonl").read_bytes() for n, f in folders(done.folder).items()}

    single = [*grid[:-2], "policy=h2o", "budget=40"]
    refused(call("run", *single), "line 2")
    recorded = call("run", *single, "broken_rows=record")
    assert recorded.code == 1 and recorded.folder in folders(done.folder).values()

    (data / "data" / "hotpotqa.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(4)))
    healed = call("sweep", *grid)
    assert healed.code == 0, healed.err
    for folder in folders(done.folder).values():
        assert (metrics(folder)["samples"], metrics(folder)["failed"]) == (4, 0)


def test_malformed_rows_of_longgenbench(base: list[str], tmp_path: Path) -> None:
    good = {"prompt": "Following Question 1: 1+1?", "questions": ["1+1?"], "answers": ["2"]}
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    text = json.dumps(good) + "\n" + json.dumps({**good, "answers": []}) + "\n"
    (tmp_path / "data" / "gsm8k" / "gsm8k_30.jsonl").write_text(text)
    arguments = [*base, "tasks=gsm8k_30", f"tasks.data_dir={tmp_path / 'data'}", "policy=h2o", "budget=40"]
    refused(call("run", *arguments), "gsm8k_30.jsonl, line 2", "'answers'")
    done = call("run", *arguments, "broken_rows=record")
    assert done.code == 1 and [bool(r["error"]) for r in sorted(lines(done.folder), key=lambda r: r["id"])] == [0, 1]


def test_empty_prompt(base: list[str], tmp_path: Path) -> None:
    data = longbench_folder(tmp_path / "data", [row(0), row(1, context="")], prompt="{context}")
    arguments = [*base, *HOTPOT, f"tasks.data_dir={data}", "model.chat=false"]
    done = call("run", *arguments, "policy=h2o", "budget=40")
    refused(done, "hotpotqa", "row1", "empty")
    assert not (tmp_path / "results").exists()
    done = call("sweep", *arguments, "policies=[h2o]", "budgets=[40]")
    assert done.code == 1
    (folder,) = folders(tmp_path / "results").values()
    assert {r["id"]: bool(r["error"]) for r in lines(folder)} == {"row0": False, "row1": True}


def test_no_reference_answer(base: list[str], tmp_path: Path) -> None:
    data = longbench_folder(tmp_path / "data", [row(0, answers=[""])])
    arguments = [*base, *HOTPOT, f"tasks.data_dir={data}", "policy=h2o", "budget=40"]
    refused(call("run", *arguments, "fidelity=true"), "fidelity=true", "hotpotqa", "row0")
    assert not (tmp_path / "results").exists()


# Models and folders.


def test_weights_that_are_not_numbers(base: list[str], tmp_path: Path) -> None:
    """Stops, names sample and layer, and loses nothing that was done before."""
    folder = tmp_path / "nan" / "tiny-llama"
    model = tiny("llama")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    done = call("run", *base, f"model.path={folder}", "policy=h2o", "budget=40")  # before any sample
    assert done.code == 2 and "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "layer 1" in line and "not numbers" in line


def test_results_of_other_settings(base: list[str]) -> None:
    """Only a hand can bring that about; damage can, too, but the metrics of a finished run know better."""
    arguments = [*base, "policy=h2o", "budget=40"]
    done = call("run", *arguments)
    path, figures = done.folder / "settings.json", done.folder / "metrics.json"
    sound, finished = path.read_text(), figures.read_bytes()
    for damage in (sound.replace('"heavy_share": 0.5', '"heavy_share": 0.7'), "{", ""):
        figures.unlink()
        path.write_text(damage)
        with unchanged(done.folder):
            refused(call("run", *arguments), str(done.folder))
        figures.write_bytes(finished)
        assert call("run", *arguments).code == 0 and path.read_text() == sound
    figures.unlink()
    path.unlink()
    with unchanged(done.folder):
        refused(call("run", *arguments), "settings.json")


def test_broken_line_in_the_middle_of_predictions(base: list[str]) -> None:
    arguments = [*base, "policy=h2o", "budget=40"]
    done = call("run", *arguments)
    path = done.folder / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"{broken\n" + whole)
    assert call("run", *arguments).code == 0 and path.read_bytes() == whole


def test_results_that_cannot_be_written(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = call("run", *base, "policy=h2o", "budget=40", f"output_root={tmp_path / 'file'}")
    refused(done, str(tmp_path / "file"), "cannot write")
