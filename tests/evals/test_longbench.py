"""LongBench's rows and prompts: read as the official runner reads them, and bad files."""

import inspect
import io
import json
import os
import re
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals import longbench, longbench_files, longgenbench, mine, pocket
from evals.errors import DataError
from evals.longbench_files import REVISION, unpack
from evals.rows import split_prompt
from evals.suites import load_samples, task_names
from tests.support.file_server import FileServer

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = {"hotpotqa": "Passages:\n{context}\nQ: {input}\nA: ", "lcc": "Code \n{context}Next:\n"}
LENGTHS = {"hotpotqa": 32, "lcc": 64}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "input": "who?",
        "context": "a {brace} text",
        "answers": ["me"],
        "all_classes": None,
        "length": 3,
        "_id": "x1",
    } | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "config" / "dataset2maxlen.json").write_text(json.dumps(LENGTHS))
    rows = [row(_id=f"x{i}", input=f"who {i}?") for i in range(3)]
    (tmp_path / "data" / "hotpotqa.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return tmp_path


def load(folder: Path, name: str = "hotpotqa", limit: int | None = None, **options: Any) -> list[Any]:
    return load_samples("longbench", [name], limit, str(folder), 0, **options)


def test_all_real_rows_make_the_official_prompt(shared: Callable[[str], Path]) -> None:
    place = shared("data/longbench")
    prompts = json.loads((place / "config/dataset2prompt.json").read_text(encoding="utf-8"))
    lengths = json.loads((place / "config/dataset2maxlen.json").read_text(encoding="utf-8"))
    samples = load_samples("longbench", None, None, str(place), 0)
    rows = [
        (name, json.loads(line))
        for name in longbench.TASKS
        for line in (place / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    assert len(samples) == len(rows) > 100
    for sample, (name, raw) in zip(samples, rows, strict=True):
        assert sample.task.name == name
        assert sample.prompt == prompts[name].format(**raw)
        assert sample.before.endswith(raw["context"])
        assert sample.task.max_new_tokens == lengths[name]
        assert list(sample.answers) == raw["answers"]
        assert sample.all_classes == (tuple(raw["all_classes"]) if raw["all_classes"] else None)
        assert sample.length == raw["length"]
    assert len({(s.task.name, s.id) for s in samples}) == len(samples)


def test_task_rules_of_the_official_code() -> None:
    tasks = {name: longbench.make_task(name, 1) for name in task_names("longbench")}
    assert len(tasks) == 21
    assert {n for n, t in tasks.items() if not t.chat} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"
    }  # fmt: skip
    assert {n for n, t in tasks.items() if t.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert [(n, t.min_new_tokens) for n, t in tasks.items() if t.stop_at_newline] == [("samsum", 1)]
    assert len(task_names("longbench_en")) == 16
    assert task_names("longbench_zh") == [
        "multifieldqa_zh",
        "dureader",
        "vcsum",
        "lsht",
        "passage_retrieval_zh",
    ]


def test_a_language_group_is_a_suite(shared: Callable[[str], Path]) -> None:
    samples = load_samples("longbench_zh", None, 1, str(shared("data/longbench")), 0)
    assert [s.task.name for s in samples] == task_names("longbench_zh")
    with pytest.raises(DataError, match="no task of suite longbench_zh"):
        load_samples("longbench_zh", ["hotpotqa"], 1, None, 0)


def test_a_larger_limit_extends_a_smaller_one(folder: Path) -> None:
    assert load(folder, limit=2) == load(folder)[:2]
    assert len(load(folder, limit=99)) == 3


def test_environment_variable_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGBENCH_DIR", str(folder))
    assert len(load_samples("longbench", ["hotpotqa"], None, None, 0)) == 3
    monkeypatch.setenv("LONGBENCH_DIR", str(folder / "nowhere"))
    with pytest.raises(DataError, match=r"LONGBENCH_DIR=.*no such folder"):
        load_samples("longbench", ["hotpotqa"], None, None, 0)


def test_texts_that_look_like_dates_stay_texts(folder: Path) -> None:
    """datasets' own JSON reader makes datetime objects of such a column."""
    dates = row(input="2015-03-04", answers=["2015-03-05"])
    (folder / "data/lcc.jsonl").write_text(json.dumps(dates))
    (sample,) = load(folder, "lcc")
    assert sample.answers == ("2015-03-05",)


def without(name: str) -> str:
    return json.dumps({key: value for key, value in row().items() if key != name})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a", "cont', "broken JSON"),
        (without("context"), "field 'context' is missing"),
        (without("input"), "field 'input' is missing"),
        (without("answers"), "field 'answers' is missing"),
        (json.dumps(row(answers="me")), "field 'answers' must be a list of one or more strings"),
        (json.dumps(row(answers=[])), "field 'answers' must be"),
        (json.dumps(row(context=None)), "field 'context' must be a string"),
        (json.dumps(row(all_classes="a")), "field 'all_classes' must be"),
        (json.dumps(row(length="3")), "field 'length' must be"),
        ('["a"]', "expected a JSON object, found list"),
        (r'{"input": "\ud800", "context": "", "answers": ["a"]}', "not UTF-8 text"),
        (json.dumps(row(length=10**30)), "field 'length' must be a whole number, at most 9223372036854775807"),
        (json.dumps(row(length=-(10**30))), "field 'length' must be"),
        (json.dumps(row(length=float("nan"))), "field 'length' must be"),
        (json.dumps(row(length=True)), "field 'length' must be"),
        (json.dumps(row())[:-1] + ', "more": ' + "9" * 5000 + "}", "a number of more than"),
        (json.dumps(row())[:-1] + ', "more": ' + "[" * 100_000 + "}", "broken JSON"),
        ('{"_id": ' + "9" * 5000 + ', "input": "", "context": "", "answers": ["a"]}', "a number of more than"),
        *((json.dumps(row(_id=wrong)), "field '_id' must be") for wrong in (True, 1.5, float("nan"), [1], {"a": 1})),
        (json.dumps(row(answers=["a", None])), "field 'answers' must be"),
        (json.dumps(row(answers=[["a"]])), "field 'answers' must be"),
        (json.dumps(row(all_classes=[1])), "field 'all_classes' must be"),
        (json.dumps(row()).replace("who?", "who\0?"), "broken JSON"),
        ("\ufeff" + json.dumps(row()), "broken JSON"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(line: str, message: str, folder: Path) -> None:
    (folder / "data/lcc.jsonl").write_text(json.dumps(row()) + "\n\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        load(folder, "lcc", limit=1)
    assert str(caught.value).startswith(f"{folder}/data/lcc.jsonl, line 3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    recorded = load(folder, "lcc", broken="record")  # nothing is lost: the row is there with its reason
    assert [sample.error for sample in recorded] == [None, str(caught.value)]


def test_bad_files_and_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGBENCH_DIR", raising=False)

    def message(name: str = "hotpotqa", **options: Any) -> str:
        with pytest.raises(DataError) as caught:
            load(folder, name, **options)
        return str(caught.value)

    assert "lcc.jsonl is missing, which task lcc reads" in message("lcc")
    assert "valid: narrativeqa, qasper" in message("nonsense")
    assert "limit=0" in message(limit=0)
    assert "tasks.nonsense: no setting of suite longbench" in message(nonsense=1)
    assert "tasks.config_dir" in message(config_dir=str(folder / "data"))
    (folder / "data/lcc.jsonl").write_text("\n")
    assert "holds no rows" in message("lcc")
    (folder / "data/qasper.jsonl").write_text(json.dumps(row()))
    assert "dataset2prompt.json has no entry for task qasper" in message("qasper")
    (folder / "config/dataset2maxlen.json").write_text('{"hotpotqa": "32"}')
    assert "dataset2maxlen.json: must be a JSON object of task names to int" in message()
    (folder / "config/dataset2prompt.json").write_text('{"hotpotqa": "{contxt}"}')
    assert "has no {context}" in message()
    (folder / "config/dataset2prompt.json").write_text('{"hotpotqa": "{context} {question}"}')
    assert "is malformed" in message()
    (folder / "config/dataset2prompt.json").write_text("{")
    assert "dataset2prompt.json: broken JSON" in message()
    (folder / "config/dataset2prompt.json").unlink()
    assert "tasks.config_url: ftp://x" in message(config_url="ftp://x")
    with pytest.raises(DataError, match="suite=nonsense: unknown; valid: pocket"):
        load_samples("nonsense", None, None, None, 0)
    with pytest.raises(DataError, match=r"tasks.data_dir=/no/where: no such folder"):
        load_samples("longbench", None, None, "/no/where", 0)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_config_files_name_only_real_settings(path: Path) -> None:
    """Every key is a setting, with the same default, and carries a comment."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for other in settings.pop("defaults", ["_self_"])[:-1]:  # the file that it builds on
        settings = yaml.safe_load(path.with_stem(other).read_text(encoding="utf-8")) | settings
    suite, names, data_dir = (settings.pop(key) for key in ("suite", "names", "data_dir"))
    assert suite == path.stem and names is None and data_dir is None
    assert task_names(suite) or suite == "mine"  # whose tasks are the file's
    loaders: dict[str, Any] = {"pocket": pocket.load, "longgenbench": longgenbench.load, "mine": mine.load}
    loader = loaders.get(suite, longbench.load)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(loader).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    defaults.pop("broken", None)  # the run's own setting, broken_rows
    assert settings == defaults


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as package:
        for name, text in files.items():
            package.writestr(name, text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name", ["../evil.jsonl", "data/../../evil.jsonl", "/evil.jsonl", "..\\evil.jsonl", "C:/evil.jsonl"]
)
def test_an_archive_that_reaches_outside_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(archive(**{"data/lcc.jsonl": "{}", name: "evil"}))
    with pytest.raises(DataError, match="names a path outside of itself"):
        unpack(tmp_path / "data.zip", tmp_path / "cache" / "target")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "cache" / "target").exists()


def test_broken_and_empty_archives(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="not a readable zip archive"):
        unpack(tmp_path / "data.zip", tmp_path / "target")
    (tmp_path / "data.zip").write_bytes(archive(**{"readme.txt": "hello"}))
    with pytest.raises(DataError, match=r"holds no data/<task>\.jsonl"):
        unpack(tmp_path / "data.zip", tmp_path / "target")
    assert not (tmp_path / "target").exists()


LOAD = """
import sys
import warnings
from evals.errors import DataError
from evals.suites import load_samples
try:
    samples = load_samples("longbench", ["hotpotqa"], None, None, 0, config_url=sys.argv[1], hub_revision=sys.argv[2])
    print(len(samples), samples[0].task.max_new_tokens, repr(samples[0].prompt))
except DataError as error:
    print("DataError:", error)
"""


def run_load(config_url: str, home: Path, revision: str = "main", **environment: str) -> str:
    """In a process of its own: huggingface_hub reads its environment once, when it is imported."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "LONGBENCH", "KVBENCH"))}
    clean |= {"HF_HOME": str(home / "hf"), "KVBENCH_CACHE": str(home / "own"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, config_url, revision],
        cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


def test_download_once_from_a_stand_in_for_the_hub(hub: tuple[str, type[FileServer]], tmp_path: Path) -> None:
    address, handler = hub
    rows = json.dumps(row())
    handler.files |= {
        "/datasets/zai-org/LongBench/resolve/main/data.zip": archive(
            **{"data/hotpotqa.jsonl": rows, "data/hotpotqa_e.jsonl": rows, "README.md": "x"}
        ),
        "/config/dataset2prompt.json": json.dumps(PROMPTS).encode(),
        "/config/dataset2maxlen.json": json.dumps(LENGTHS).encode(),
    }
    expected = "1 32 " + repr("Passages:\na {brace} text\nQ: who?\nA: ")
    assert run_load(f"{address}/config", tmp_path, HF_ENDPOINT=address) == expected
    assert len(handler.log) == 3
    assert run_load(f"{address}/config", tmp_path, HF_ENDPOINT=address) == expected
    assert len(handler.log) == 3, "a second run downloads nothing"
    assert run_load(f"{address}/config", tmp_path, HF_HUB_OFFLINE="1") == expected


def test_the_pinned_archive_is_verified_and_the_hub_needs_https(
    hub: tuple[str, type[FileServer]], tmp_path: Path
) -> None:
    address, handler = hub
    handler.files[f"/datasets/zai-org/LongBench/resolve/{REVISION}/data.zip"] = archive(**{"data/hotpotqa.jsonl": "{}"})
    line = run_load(f"{address}/config", tmp_path, REVISION, HF_ENDPOINT=address)
    assert line.startswith("DataError: ") and "data.zip: damaged or another file, its SHA-256 is not cb45b11a" in line
    line = run_load(f"{address}/config", tmp_path, HF_ENDPOINT="http://hub.example.org")
    assert line == "DataError: HF_ENDPOINT=http://hub.example.org: valid: an https:// address " + (
        "(http:// only of this machine)"
    )


def test_the_rows_are_those_of_one_commit() -> None:
    assert re.fullmatch("[0-9a-f]{40}", REVISION) and inspect.signature(longbench.load).parameters[
        "hub_revision"
    ].default == (REVISION)


def pack(path: Path, *entries: tuple[zipfile.ZipInfo | str, str], **how: Any) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **how) as package:
        warnings.simplefilter("ignore")  # a name that is there twice
        for name, text in entries:
            package.writestr(name, text)
    return path


def broken_stream(path: Path) -> None:
    pack(path, ("data/lcc.jsonl", "{}\n" * 5000))
    content = bytearray(path.read_bytes())
    content[30 + len("data/lcc.jsonl")] ^= 0x07  # the first bits say how the stream is packed
    path.write_bytes(content)


def changed_field(path: Path, place: int, value: int) -> None:
    """One byte of the local head and of the directory's entry, which has two bytes more before it."""
    pack(path, ("data/lcc.jsonl", "{}\n" * 5000))
    content = bytearray(path.read_bytes())
    content[place] = content[content.index(b"PK\x01\x02") + place + 2] = value
    path.write_bytes(content)


def link(path: Path) -> None:
    info = zipfile.ZipInfo("data/lcc.jsonl")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    pack(path, (info, "/etc/passwd"))


def wrong_sum(path: Path) -> None:
    path.write_bytes(archive(**{"data/lcc.jsonl": "first"}).replace(b"first", b"fjrst"))


ODD_ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "dot": (lambda p: pack(p, ("data/lcc.jsonl", "{}"), (".", "x")), "an entry without a name ('.')"),
    "empty name": (
        lambda p: p.write_bytes(archive(**{"data/lcc.jsonl": "{}", "Za": "x"}).replace(b"Za", b"\0a")),
        "an entry without a name ('')",
    ),
    "deflate": (broken_stream, "'data/lcc.jsonl' cannot be unpacked"),
    "sum": (wrong_sum, "'data/lcc.jsonl' cannot be unpacked"),
    "encrypted": (lambda p: changed_field(p, 6, 1), "'data/lcc.jsonl' is encrypted"),
    "unknown method": (lambda p: changed_field(p, 8, 97), "'data/lcc.jsonl' cannot be unpacked"),
    "lzma": (lambda p: changed_field(p, 8, 14), "'data/lcc.jsonl' cannot be unpacked"),
    "twice": (lambda p: pack(p, ("data/lcc.jsonl", "{}"), ("data/lcc.jsonl", "{1}")), "holds 'data/lcc.jsonl' twice"),
    "link": (link, "'data/lcc.jsonl' is a link"),
    "bomb": (lambda p: pack(p, ("data/lcc.jsonl", "0" * 200_000)), "refused at 'data/lcc.jsonl', it unpacks to more"),
    "two halves": (
        lambda p: pack(p, ("data/lcc.jsonl", "0" * 60_000), ("data/trec.jsonl", "0" * 60_000)),
        "refused at 'data/trec.jsonl', it unpacks to more than 100,000 bytes",
    ),
    "many": (lambda p: pack(p, *((f"x/{i}", "") for i in range(1001))), "it has 1001 entries"),
    "cut": (lambda p: p.write_bytes(archive(**{"data/lcc.jsonl": "{}"})[:-30]), "not a readable zip archive"),
}


@pytest.mark.parametrize("kind", ODD_ARCHIVES)
def test_odd_archives_are_refused_in_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longbench_files, "LARGEST_UNPACKED", 100_000)
    make, message = ODD_ARCHIVES[kind]
    make(tmp_path / "data.zip")
    with pytest.raises(DataError) as caught:
        unpack(tmp_path / "data.zip", tmp_path / "cache" / "target")
    line = str(caught.value)
    assert message in line and str(tmp_path / "data.zip") in line and "\n" not in line
    assert not list((tmp_path / "cache").iterdir()), "nothing is left"


def test_damaged_rows_are_unpacked_again(tmp_path: Path) -> None:
    pack(tmp_path / "data.zip", ("data/lcc.jsonl", "sound"), ("data/trec.jsonl", "too"))
    target = tmp_path / "cache" / "target"
    (tmp_path / "cache" / ".unpacking-old").mkdir(parents=True)
    os.utime(tmp_path / "cache" / ".unpacking-old", (0, 0))
    rows = unpack(tmp_path / "data.zip", target) / "data" / "lcc.jsonl"
    for damage in (lambda: rows.write_text("sOund"), rows.unlink, (target / "digests.json").unlink):
        damage()
        assert unpack(tmp_path / "data.zip", target) == target and rows.read_text() == "sound"
    assert list((tmp_path / "cache").iterdir()) == [target]
    (tmp_path / "data.zip").unlink()
    assert unpack(tmp_path / "data.zip", target) == target, "what is sound needs no archive"


def test_missing_data_without_network_names_path_and_command(hub: tuple[str, type[FileServer]], tmp_path: Path) -> None:
    address, handler = hub
    line = run_load(f"{address}/config", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert line.startswith("DataError: LongBench rows: data.zip of zai-org/LongBench could not be fetched")
    assert "hf download zai-org/LongBench data.zip --repo-type dataset" in line
    assert "tasks.data_dir" in line and "LONGBENCH_DIR" in line
    line = run_load(f"{address}/config", tmp_path, HF_ENDPOINT=address)  # the repository is not there: 404
    assert line.startswith("DataError: LongBench rows: ")
    handler.files["/datasets/zai-org/LongBench/resolve/main/data.zip"] = archive(**{"data/hotpotqa.jsonl": "{}"})
    line = run_load(f"{address}/config", tmp_path, HF_ENDPOINT=address)
    assert "dataset2prompt.json: missing and could not be fetched" in line
    assert f"Save {address}/config/dataset2prompt.json there" in line and "tasks.config_dir" in line


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{context.foo}", "{context.foo} is no field"),
        ("{context[0]} {input}", "{context[0]} is no field; has no {context}"),
        ("{context!r}", "{context!r} is no field"),
        ("{context:>10}", "{context:>10} is no field"),
        ("{context} {input:.3}", "{input:.3} is no field"),
        ("{context} {0}", "{0} is no field"),
        ("{context} {}", "{} is no field"),
        ("{context} {", "is malformed"),
        ("{context} }", "is malformed"),
        ("{{context}} {input}", "has no {context}"),
        ("{context} {input.__class__}", "{input.__class__} is no field"),
        ("{context} \ud800", "surrogates not allowed"),
    ],
)
def test_only_plain_fields_in_prompts(prompt: str, message: str, folder: Path) -> None:
    (folder / "data/hotpotqa.jsonl").write_text(json.dumps(row()))
    (folder / "config/dataset2prompt.json").write_text(json.dumps({"hotpotqa": prompt}))
    with pytest.raises(DataError) as caught:
        load(folder, "hotpotqa")
    start = f"{folder}/config/dataset2prompt.json: the prompt of task hotpotqa is malformed: "
    assert str(caught.value).startswith(start) and message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt", ["{{x}} {context} {input}", "{input} {{{context}}} {{context}}", "{context}{context}"]
)
def test_prompts_are_what_format_makes_of_them(prompt: str) -> None:
    before, after = split_prompt(prompt, "c{x}", "q")
    assert before + after == prompt.format(context="c{x}", input="q") and before.rstrip().endswith("c{x}")


@pytest.mark.parametrize("name", ["dataset2prompt.json", "dataset2maxlen.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"hotpotqa": ' + "9" * 5000 + "}", "\ufeff{"])
def test_broken_config_files(name: str, text: str, folder: Path) -> None:
    (folder / "data/hotpotqa.jsonl").write_text(json.dumps(row()))
    (folder / "config" / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}: broken JSON"):
        load(folder, "hotpotqa")


def test_a_length_that_no_model_reaches(folder: Path) -> None:
    (folder / "data/hotpotqa.jsonl").write_text(json.dumps(row()))
    (folder / "config/dataset2maxlen.json").write_text('{"hotpotqa": 1' + "0" * 30 + "}")
    with pytest.raises(DataError, match=r"task hotpotqa has length 10+; must be 1 to 1000000"):
        load(folder, "hotpotqa")


def test_ids_that_are_missing_are_the_rows_number(folder: Path) -> None:
    rows = [row(), row(), row()]
    for one, name in zip(rows, [None, "", 7], strict=True):
        one["_id"] = name
    (folder / "data/hotpotqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [sample.id for sample in load(folder, "hotpotqa")] == ["0", "1", "7"]
