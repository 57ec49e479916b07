"""LongGenBench: prompts as the reference runner forms them, its generation settings, and bad files."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals import longgenbench
from evals.downloads import download, secure
from evals.errors import DataError
from evals.longgenbench import INSTRUCTION, SOURCE_URL, check_rows
from evals.suites import load_samples, task_names
from evals.tasks import Sample
from tests.support.file_server import FileServer

ROOT = Path(__file__).parents[2]


def load(data_dir: Path | str | None, names: list[str] | None = None, **options: Any) -> list[Sample]:
    return load_samples("longgenbench", names, None, None if data_dir is None else str(data_dir), 0, **options)


def write(folder: Path, name: str, *lines: object) -> Path:
    path = folder / name.split("_")[0] / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def row(**changes: Any) -> dict[str, Any]:
    text = "Examples:\nQuestion_1: a\n\nAnswer_1: b\n\nFollowing Question: \nQuestion_6:\nwho?\nQuestion_7:"
    return {"prompt": text, "questions": ["who?", "why?"], "answers": ["A", "B"]} | changes


def test_real_rows(shared: Callable[[str], Path]) -> None:
    samples = load(shared("data/longgenbench"))
    counts = {name: [s for s in samples if s.task.name == name] for name in ("gsm8k_30", "mmlu_30", "csqa_40")}
    assert {name: len(found) for name, found in counts.items()} == {
        "gsm8k_30": 43,
        "mmlu_30": 53,
        "csqa_40": 30,
    }
    for sample in samples:
        questions = int(sample.task.name.split("_")[1])
        assert len(sample.answers) == len(sample.extra["questions"]) == questions
        assert sample.extra["first_number"] == (9 if sample.task.name == "gsm8k_30" else 6)
        assert sample.after.startswith("Following Question")
        assert sample.before.startswith(f"<<SYS>>\n {INSTRUCTION}")
    left_out = {str(i) for i in (21, 30, 31, 48)}
    assert not left_out & {s.id for s in counts["mmlu_30"]}
    everything = load(shared("data/longgenbench"), ["mmlu_30"], reference_rows=False)
    assert [s.id for s in everything] == [str(i) for i in range(57)]


def test_the_prompt_has_the_length_that_the_reference_recorded(shared: Callable[[str], Path]) -> None:
    """The published predictions hold the length in characters of the prompts they were made from."""
    oracle = shared("oracles/longgenbench/full") / "meta-llama-3.1-8b-instruct_2048"
    samples = load(shared("data/longgenbench"))
    for dataset, name in (("gsm8k", "gsm8k_30"), ("mmlu", "mmlu_30"), ("csqa", "csqa_40")):
        recorded = [json.loads(line) for line in (oracle / dataset / "ALLKV.jsonl").read_text("utf-8").splitlines()]
        ours = [s for s in samples if s.task.name == name]
        assert [len(s.prompt) for s in ours] == [item["length"] for item in recorded]
        assert [list(s.answers) for s in ours] == [item["answers"] for item in recorded]


def test_generation_settings(tmp_path: Path) -> None:
    names = task_names("longgenbench")
    for name in names:
        write(tmp_path, name, row())
    tasks = {s.task.name: s.task for s in load(tmp_path, names)}
    assert {n: t.max_new_tokens for n, t in tasks.items()} == {
        "gsm8k_30": 4096,
        "mmlu_30": 4096,
        "csqa_40": 7950,
        "gsm8k_60": 7950,
        "mmlu_60": 7950,
        "csqa_80": 7950,
    }
    assert all(t.min_new_tokens == 1 and not t.chat and not t.stop_at_newline for t in tasks.values())
    assert [s.task.name for s in load(tmp_path)] == ["gsm8k_30", "mmlu_30", "csqa_40"]


def test_prompt_by_hand(tmp_path: Path) -> None:
    write(tmp_path, "csqa_40", row())
    write(tmp_path, "mmlu_30", row(task="anatomy"))
    csqa, mmlu = load(tmp_path, ["csqa_40", "mmlu_30"])
    assert csqa.prompt == f"<<SYS>>\n {INSTRUCTION} \n<</SYS>>\n\n{row()['prompt']}"
    assert "(with answers) about  \n<</SYS>>" in mmlu.prompt, "the reference never fills in the subject"
    assert mmlu.extra["subject"] == "anatomy"
    assert csqa.after.startswith("Following Question: \nQuestion_6:")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "broken JSON"),
        (row(prompt=None), "field 'prompt' must be a string"),
        ({k: v for k, v in row().items() if k != "answers"}, "field 'answers' is missing"),
        (row(questions=["one"]), "1 questions, but 2 answers"),
    ],
)
def test_broken_rows_name_file_and_line(line: object, message: str, tmp_path: Path) -> None:
    write(tmp_path, "csqa_40", row(), line)
    with pytest.raises(DataError) as caught:
        load(tmp_path, ["csqa_40"])
    assert f"{tmp_path}/csqa/csqa_40.jsonl, line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_missing_files_say_where_they_come_from(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"github\.com/Linking-ai/SCOPE"):
            load(place)
    write(tmp_path, "csqa_40", "")
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path, ["csqa_40"])


def test_downloaded_once_without_a_folder(
    hub: tuple[str, type[FileServer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, handler = hub
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    handler.files["/LongGenBench/csqa/csqa_40.jsonl"] = json.dumps(row()).encode()
    handler.files["/LongGenBench/gsm8k/gsm8k_30.jsonl"] = b"<html>rate limit</html>"
    handler.files["/LongGenBench/csqa/csqa_80.jsonl"] = b'{"message": "rate limit"}'
    handler.files["/LongGenBench/mmlu/mmlu_60.jsonl"] = b""
    for _ in range(2):
        (sample,) = load(None, ["csqa_40"], source_url=f"{address}/LongGenBench/")
        assert sample.answers == ("A", "B")
    assert handler.log == ["/LongGenBench/csqa/csqa_40.jsonl"]
    for name in ("gsm8k_30", "csqa_80", "mmlu_60", "mmlu_30"):  # an error page, a message, nothing, no such file
        with pytest.raises(DataError, match=r"could not be fetched .*tasks\.data_dir .*github\.com/Linking-ai/SCOPE"):
            load(None, [name], source_url=f"{address}/LongGenBench")
    with pytest.raises(DataError, match=r"tasks\.source_url: ftp://x/csqa/csqa_40\.jsonl must begin with https://"):
        load(None, ["csqa_40"], source_url="ftp://x")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["csqa_40.jsonl", "csqa_40.jsonl.sha256"]
    (kept,) = tmp_path.rglob("csqa_40.jsonl")
    kept.write_text(kept.read_text().replace('"A"', '"C"'))  # damaged: fetched again
    (sample,) = load(None, ["csqa_40"], source_url=f"{address}/LongGenBench/")
    assert sample.answers == ("A", "B") and len(handler.log) > 1 and handler.log[-1] == handler.log[0]
    monkeypatch.setattr(longgenbench, "SOURCE_URL", f"{address}/LongGenBench")  # where every digest is known
    with pytest.raises(DataError, match=r"csqa_40\.jsonl: .*its SHA-256 is .* as it should be"):
        load(None, ["csqa_40"], source_url=f"{address}/LongGenBench")


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("https://example.org/x", True),
        ("http://127.0.0.1:8000/x", True),
        ("http://[::1]:80/x", True),
        ("http://localhost/x", True),
        ("http://example.org/x", False),
        ("http://localhost.example.org/x", False),
        ("http://127.0.0.1@example.org/x", False),
        ("http://10.0.0.1/x", False),
        ("file:///etc/passwd", False),
        ("https://", False),
        ("http://[", False),
        ("", False),
    ],
)
def test_addresses_are_https_or_of_this_machine(url: str, fine: bool) -> None:
    assert secure(url) is fine


@contextmanager
def answering(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on this machine that gives one answer, byte for byte."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x"
        thread.join()


def test_a_redirect_to_plain_http_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://nowhere.invalid/x\r\nContent-Length: 0\r\n\r\n"
    with (
        answering(answer, monkeypatch) as url,
        pytest.raises(DataError, match=r"redirected to http://nowhere\.invalid/x, which is not https"),
    ):
        download(url, tmp_path / "x", "tasks.source_url", check_rows, 1 << 20, "Advice")


def test_the_address_is_the_repository_at_one_commit() -> None:
    conf = yaml.safe_load((ROOT / "conf/tasks/longgenbench.yaml").read_text())
    assert conf["source_url"] == SOURCE_URL
    assert re.search(r"/Linking-ai/SCOPE/[0-9a-f]{40}/data/LongGenBench$", SOURCE_URL)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n%b", b"nonsense\r\n\r\n"])
def test_a_cut_answer_is_not_kept(answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes than announced, though whole rows; and something that is not HTTP."""
    whole = answer.replace(b"%b", json.dumps(row()).encode() + b"\n")
    expected = "of 900 bytes came" if b"900" in answer else "nonsense"
    with answering(whole, monkeypatch) as url, pytest.raises(DataError, match=expected):
        download(url, tmp_path / "x", "tasks.source_url", check_rows, 1 << 20, "Advice")
    assert not list(tmp_path.iterdir())
