"""A model's files are told by content: changed ones are another model, damaged copies heal."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from src.errors import InputError
from src.models import embedded
from src.models.fingerprint import read_files
from src.models.load import load_model
from src.models.settings import model_settings
from src.models.weights import load_weights
from src.records.metrics_file import write_metrics
from src.report.__main__ import main as report
from src.session import session
from tests.support.cli import call, folders, predictions
from tests.support.tiny import tiny, tiny_tokenizer


def save(folder: Path, seed: int = 0, **how: Any) -> Path:
    tiny("llama", seed=seed).save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "final")


def flip(path: Path, place: float = 0.6, bit: int = 6) -> None:
    """One bit, in a byte at this share of the file; size and time of change stay."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    after = change(before)
    assert after != before
    path.write_text(after, encoding="utf-8")


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: save(folder, seed=7),
    "one bit": lambda folder: flip(folder / "model.safetensors"),
    "last bit": lambda folder: flip(folder / "model.safetensors", 0.999999, 0),
    "tokenizer": lambda folder: edit(folder / "tokenizer.json", lambda t: t.replace('"a": 97', '"a": 98', 1)),
    "template": lambda folder: edit(folder / "chat_template.jinja", lambda t: t.replace("<assistant>", "<a>")),
    "stop ids": lambda folder: edit(
        folder / "generation_config.json", lambda t: json.dumps(json.loads(t) | {"eos_token_id": [1, 90]})
    ),
    "config": lambda folder: edit(folder / "config.json", lambda t: t.replace("1e-06", "1e-03")),
    "new template": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x"),
    ),
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_in_a_folder_is_another_model(folder: Path, change: str) -> None:
    before = read_files(folder)
    assert read_files(folder).fingerprint == before.fingerprint and before.changed() is None
    CHANGES[change](folder)
    assert read_files(folder).fingerprint != before.fingerprint


def test_what_loading_does_not_read_changes_nothing(folder: Path, tmp_path: Path) -> None:
    before = read_files(folder).fingerprint
    (folder / "README.md").write_text("notes")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "modeling_own.py").write_text("pass")
    assert read_files(folder).fingerprint == before
    assert read_files(folder, with_code=True).fingerprint != before
    shutil.copytree(folder, tmp_path / "copy")
    assert read_files(tmp_path / "copy").fingerprint == before, "the same files elsewhere are the same model"


def test_each_shard_counts(tmp_path: Path) -> None:
    sharded = save(tmp_path / "m", max_shard_size="60KB")
    parts = sorted(sharded.glob("*.safetensors"))
    assert len(parts) > 2
    found = {read_files(sharded).fingerprint}
    for part in parts:
        flip(part)
        found.add(read_files(sharded).fingerprint)
    assert len(found) == len(parts) + 1


def test_the_hubs_own_digest_is_checked(folder: Path, tmp_path: Path) -> None:
    """In the hub's cache a file is a link to its digest."""
    digest = read_files(folder).digests["model.safetensors"].split()[1]
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    shutil.move(folder / "model.safetensors", blobs / digest)
    shutil.move(folder, snapshot)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    read_files(snapshot)
    flip(blobs / digest)
    with pytest.raises(InputError, match=f"model.safetensors: damaged.*delete {blobs / digest}"):
        read_files(snapshot)


def run(folder: Path, root: Path, *more: str) -> Any:
    return call(
        "run", "model=local", f"model.path={folder}", "model.max_prompt_tokens=200", "tasks=needle", "limit=2",
        "max_new_tokens=8", "wandb.mode=disabled", f"output_root={root}", *(more or ("policy=full",)),
    )  # fmt: skip


def test_new_weights_in_the_same_folder_are_not_answered_for_by_the_old(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "out"
    first = run(folder, root)
    save(folder, seed=7)
    second = run(folder, root)
    assert "full-all" in caplog.text and "begins anew" in caplog.text and "other model files" in caplog.text
    truth = run(folder, tmp_path / "fresh")
    assert predictions(second.folder) == predictions(truth.folder) != predictions(first.folder)
    caplog.clear()
    assert run(folder, root).folder == second.folder and "begins anew" not in caplog.text  # goes on in silence
    run(folder, root, "policy=h2o", "budget=32")
    assert report([str(root / "final")]) == 2
    assert "model_fingerprint: " in capsys.readouterr().err


def test_a_folder_without_fingerprint_is_not_continued_but_read(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "out"

    def as_before(*given: Any) -> dict[str, Any]:
        settings = settings_now(*given)
        del settings["model"]["fingerprint"], settings["edit_similarity"]  # and another setting that came later
        return settings

    settings_now = session.outcome_settings
    with monkeypatch.context() as patch:
        patch.setattr(session, "outcome_settings", as_before)
        old = run(folder, root, "policy=h2o", "budget=32").folder
    figures = json.loads((old / "metrics.json").read_text())
    del figures["comparability"]["model_fingerprint"]
    write_metrics(old / "metrics.json", figures)
    new = run(folder, root, "policy=h2o", "budget=32").folder
    assert new != old and len(folders(root)) == 2
    run(folder, root)
    assert f"begins anew; of {old.name} it is not known which model files" in caplog.text
    assert report([str(old), "--out", str(tmp_path / "one")]) == 0
    assert report([str(root / "final"), "--out", str(tmp_path / "all")]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "1 of 3 runs" in shown and "do not say which model files they were made with" in shown


def test_weights_written_over_in_a_run_end_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they are mapped: what is written into the file is in the model at once."""
    to_record = session.to_record

    def overwrite(prepared: Any, *rest: Any) -> Any:
        file = folder / "model.safetensors"
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            opened.write(bytes(4096))
        return to_record(prepared, *rest)

    monkeypatch.setattr(session, "to_record", overwrite)
    result = run(folder, tmp_path / "out", "limit=3", "lanes=1")
    assert result.code == 2 and "model.safetensors changed while the model was in use" in result.err
    (cell,) = folders(tmp_path / "out").values()
    assert len((cell / "predictions.jsonl").read_text().splitlines()) == 1, "what came after the write is not kept"


def test_files_written_while_loading_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from src.models import load as models

    load = load_weights
    monkeypatch.setattr(models, "load_weights", lambda *rest: (load(*rest), save(folder, seed=3))[0])
    with pytest.raises(InputError, match="changed while the model was in use"):
        load_model(model_settings("local", path=str(folder), device="cpu"))


def test_random_models_of_other_shapes_are_other_models(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from src.models import load as models

    monkeypatch.setattr(models, "unpacked", lambda _: read_files(folder))
    monkeypatch.setattr(models, "package_file", Path)
    shape = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    found = [
        load_model(model_settings("random", like="llama2-7b", shape=each, device="cpu")).fingerprint
        for each in (shape, shape, shape | {"intermediate_size": 8})
    ]
    assert found[0] == found[1] != found[2]


# ---- the unpacked copy ---------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "unpack", lambda _: (tiny("llama"), tiny_tokenizer()))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda copy: flip(copy / "model.safetensors"),
    "cut": lambda copy: cut(copy / "model.safetensors"),
    "empty": lambda copy: (copy / "config.json").write_text(""),
    "no weights": lambda copy: (copy / "model.safetensors").unlink(),
    "no stop ids": lambda copy: (copy / "generation_config.json").unlink(),
    "other template": lambda copy: (copy / "chat_template.jinja").write_text("{{ bad"),
    "one file more": lambda copy: (copy / "adapter_config.json").write_text("{}"),
    "digests": lambda copy: flip(copy / embedded.DIGESTS),
    "digests of another type": lambda copy: (copy / embedded.DIGESTS).write_text("[1]"),
    "no digests": lambda copy: (copy / embedded.DIGESTS).unlink(),
    "all gone": lambda copy: [path.unlink() for path in copy.iterdir()],
    "a file in its place": lambda copy: (shutil.rmtree(copy), copy.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_unpacked_again(gguf: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    before = embedded.unpacked(gguf)
    caplog.clear()
    assert embedded.unpacked(gguf) == before and not caplog.text, "a sound copy is taken as it is"
    DAMAGES[damage](before.folder)
    after = embedded.unpacked(gguf)
    assert len(caplog.records) == 1 and "unpacking" in caplog.text
    assert (after.digests, after.fingerprint) == (before.digests, before.fingerprint)
    assert list(after.folder.parent.iterdir()) == [after.folder], "nothing of the damaged one is left"
    with safe_open(after.folder / "model.safetensors", "pt") as weights:
        assert (weights.get_tensor("model.norm.weight") == tiny("llama").model.norm.weight).all()


def test_a_copys_fingerprint_is_the_packed_files(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = embedded.unpacked(gguf)
    monkeypatch.setattr(
        embedded, "transformers", SimpleNamespace(__version__="0.0.1")
    )  # may write another configuration
    other = embedded.unpacked(gguf)
    assert other.folder != before.folder and other.fingerprint == before.fingerprint
    gguf.write_bytes(b"weighty")
    assert embedded.unpacked(gguf).fingerprint != before.fingerprint


def test_leftovers_of_killed_unpackings_go_once_old_and_free(gguf: Path) -> None:
    cache = embedded.cache_folder()
    old, young, held = (cache / f".{gguf.stem}-0123456789abcdef-{name}" for name in ("old", "young", "held"))
    for work in (old, young, held):
        work.mkdir(parents=True)
        (work / "model.safetensors").write_bytes(b"half")
    with embedded.hold(held) as free:
        assert free
        for work in (old, held):
            os.utime(work, (time.time() - 2 * embedded.OLD_SECONDS,) * 2)
        copy = embedded.unpacked(gguf).folder
        assert sorted(cache.iterdir()) == sorted([young, held, copy])
    embedded.unpacked(gguf)
    assert sorted(cache.iterdir()) == sorted([young, copy])


def test_a_relative_cache_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVBENCH_CACHE", raising=False)
    for given in ("cache", "./cache", "../x", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert embedded.cache_folder() == tmp_path / ".cache" / "kv-eviction-bench"
