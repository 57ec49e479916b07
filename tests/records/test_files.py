"""Files on a disk that is full, names of samples' files, and archives with a wrong byte."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evals.suites import task_names
from src.errors import Damaged, InputError
from src.files import Npz, append_whole, file_name, write_npz, write_whole
from src.retention.journal import Journal
from src.retention.store import Kept, KeptSample, Key, kept_sample, load_retention, write_retention
from tests.support.cli import call


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the system takes what fits of a write, and refuses the next."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- full disks ---


def test_an_append_that_is_cut_short_is_taken_away_again(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert append_whole(path, b"first\n") == 0
    with room(10), pytest.raises(InputError, match=r"lines: cannot be written \(File too large"):
        append_whole(path, b"the second is longer\n")
    assert path.read_bytes() == b"first\n"
    assert append_whole(path, b"third\n") == 6


def test_a_replacement_that_is_cut_short_leaves_the_old_content_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    write_whole(path, "old")
    with room(10), pytest.raises(InputError, match=r"whole\.json: cannot be written"):
        write_whole(path, "new and much longer")
    assert [p.name for p in tmp_path.iterdir()] == ["whole.json"] and path.read_text() == "old"


def test_retention_that_is_cut_short_is_one_line_and_leaves_the_journal(tmp_path: Path) -> None:
    journal = filled(tmp_path / "retention.part")
    with room(400), pytest.raises(InputError, match=r"retention\.npz: cannot be written"):
        write_retention(tmp_path / "retention.npz", list(journal.frames), journal.read)
    assert [p.name for p in tmp_path.iterdir()] == ["retention.part"]
    with room(tmp_path.joinpath("retention.part").stat().st_size + 9), pytest.raises(InputError, match="cannot be"):
        journal.append(entry("late"))
    assert list(Journal(journal.path).frames) == list(journal.frames)


def test_the_system_s_own_error_is_one_line_wherever_it_comes_out(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("src.session.session.show_results", full)  # say, the terminal's output goes to a file there
    done = call("run", *base, "policy=full")
    assert (
        done.code == 2 and done.err.splitlines()[-1] == "error: the disk: cannot be written (No space left on device)"
    )


def test_codebooks_that_cannot_be_written_are_refused_before_the_fit(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("fitted for nothing")

    monkeypatch.setattr("src.models.codebooks.sample_keys", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    local = ["model=local", f"model.path={model_folder}", "groups=4", "centroids=4"]
    for output in ("file/books", "folder"):
        done = call("calibrate", *local, f"output={tmp_path / output}", "overwrite=true")
        assert done.code == 2 and "output=" in done.err and output in done.err
        assert len(done.err.splitlines()) == 1


# --- names ---


def test_no_two_samples_share_a_file() -> None:
    ids = ["a/b", "a_b", "a b", "A_b", "a_B", "a.b", "a-b", "", ".", "..", "/", "é", "e\u0301", "x" * 400, "x" * 401]
    ids += ["汉" * 200, "汉" * 201, "a\nb", "a\\b", "CON", "a~b", "0", "00", "-", "\U0001f600", "\U0001f601"]
    ids += [file_name("qa", name).removeprefix("qa-") for name in ids]  # names made to be taken for another's
    ids = list(dict.fromkeys(ids))
    names = [file_name("qa", name) for name in ids]
    assert len({name.casefold() for name in names}) == len(ids)
    assert all(len(f"{name}.npz.part".encode()) <= 255 and "/" not in name for name in names)


def test_simple_ids_keep_the_names_they_had() -> None:
    assert file_name("needle", "needle-0-12") == "needle-needle-0-12"
    assert file_name("repobench-p", "0123456789abcdef" * 3) == "repobench-p-" + "0123456789abcdef" * 3


def test_no_task_is_another_with_a_dash() -> None:
    names = {name for suite in ("pocket", "longbench", "longgenbench") for name in task_names(suite)}
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}-")]


# --- a wrong byte anywhere ---


def entry(name: str) -> KeptSample:
    positions = np.array([[0, 3, 9, 31], [1, 2, len(name) % 30, 31]])
    return kept_sample(("qa", name, "aa"), 32, Kept([positions], [positions[:, 1:]]))


def filled(path: Path) -> Journal:
    journal = Journal(path)
    for name in ("one", "number two", "three"):
        journal.append(entry(name))
    return journal


def same(a: KeptSample, b: KeptSample) -> bool:
    arrays = zip((a.prompt, a.end, a.generated), (b.prompt, b.end, b.generated), strict=True)
    return a.key == b.key and a.n == b.n and all(np.array_equal(x, y) for x, y in arrays)


@pytest.mark.parametrize("flip", [1, 0x80, 0xFF])
def test_a_wrong_byte_in_the_journal_costs_one_entry_at_most(tmp_path: Path, flip: int) -> None:
    path = tmp_path / "retention.part"
    right = filled(path)
    content = path.read_bytes()
    wanted: dict[Key, KeptSample] = {key: right.read(key) for key in right.frames}
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        found = Journal(path)
        assert len(found.frames) == 2
        assert all(same(found.read(key), wanted[key]) for key in found.frames)


def test_the_journal_goes_on_behind_a_damaged_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "retention.part"
    keys = list(filled(path).frames)
    content = bytearray(path.read_bytes())
    content[0:2] = b"??"
    path.write_bytes(content)
    journal = Journal(path)
    assert "bytes in the middle are damaged" in caplog.text
    journal.append(entry("one"))
    assert sorted(Journal(path).frames) == sorted(keys)


def test_a_wrong_byte_in_retention_npz_is_never_taken_for_right(tmp_path: Path) -> None:
    journal = filled(tmp_path / "retention.part")
    path = tmp_path / "retention.npz"
    write_retention(path, list(journal.frames), journal.read)
    content = path.read_bytes()
    outcomes = set()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            found = load_retention(path)
        except Damaged as error:
            outcomes.add("index")
            assert "launch the run's command again" in str(error)
            continue
        lost = found.drop_damaged()
        outcomes.add("sample" if lost else "harmless")
        assert len(lost) + len(found) == 3 and not {*lost} & {*found.keys}
        assert all(same(each, journal.read(each.key)) for each in found)
        found.close()
    assert outcomes == {"index", "sample", "harmless"}


def test_a_header_that_says_fewer_is_noticed(tmp_path: Path) -> None:
    """numpy.load would read half of the array and compare nothing."""
    path = tmp_path / "stored.npz"
    np.savez(path, x=np.zeros(40000, dtype=np.uint8))
    content = path.read_bytes()
    assert content.count(b"(40000,)") == 1
    path.write_bytes(content.replace(b"(40000,)", b"(20000,)"))
    with np.load(path) as fooled:
        assert len(fooled["x"]) == 20000
    with Npz(path) as found, pytest.raises(Damaged):
        found["x"]


def test_arrays_come_back(tmp_path: Path) -> None:
    write_npz(tmp_path / "sub" / "a.npz", x=np.arange(3), y=np.ones((2, 2), np.float32))
    with Npz(tmp_path / "sub" / "a.npz") as found:
        assert found["x"].tolist() == [0, 1, 2] and found["y"].dtype == np.float32
        with pytest.raises(Damaged):
            found["z"]
