"""Where LongBench's files come from: a folder, or one download that later runs reuse."""

import json
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from evals.downloads import cache_folder, download, file_sha256, intact, refuse_insecure_hub
from evals.errors import DataError
from evals.rows import parse_format
from evals.visible import reason

HUB_REPO = "zai-org/LongBench"  # formerly THUDM/LongBench
ARCHIVE = "data.zip"
# The rows at one commit of the hub's repository, and that archive's SHA-256: three public projects name both.
REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
ARCHIVE_SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
LARGEST_UNPACKED = 2 << 30  # bytes; the real rows take a fraction of it
MOST_ENTRIES = 1000
UNPACKING, OLD_SECONDS = ".unpacking-", 3600.0  # work folders, and when one is nobody's any more
# The GitHub repository in January 2025. A fixed commit: prompts must not change under a comparison.
COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
CONFIG_URL = f"https://raw.githubusercontent.com/THUDM/LongBench/{COMMIT}/LongBench/config"
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
SHA256 = {  # of both at that commit
    PROMPTS: "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
    LENGTHS: "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
}
# What zipfile raises for an entry that is damaged, or packed in a way that it does not know.
DAMAGES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, struct.error)
DIGESTS = "digests.json"  # beside the unpacked rows
LARGEST_CONFIG = 1 << 20
LONGEST = 1_000_000  # new tokens; more is a slip, and no model has positions for it


def row_folder(root: Path | None, hub_repo: str, revision: str) -> Path:
    """The folder with <task>.jsonl: `data` in the given folder, else the unpacked archive of the hub."""
    if root is not None:
        return root / "data"
    archive = download_archive(hub_repo, revision)
    # The hub's cache keeps a file under its commit, so another revision is unpacked beside this one.
    name = re.sub(r"[^\w.-]", "_", f"{hub_repo}-{archive.parent.name}")
    known = ARCHIVE_SHA256 if (hub_repo, revision) == (HUB_REPO, REVISION) else None
    return unpack(archive, cache_folder("longbench") / name, known) / "data"


def download_archive(hub_repo: str, revision: str) -> Path:
    """data.zip, downloaded once by huggingface_hub (which honours HF_ENDPOINT and HF_HUB_OFFLINE)."""
    refuse_insecure_hub()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_repo, ARCHIVE, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"LongBench rows: {ARCHIVE} of {hub_repo} could not be fetched ({reason(error)}). With network "
            f"run `hf download {hub_repo} {ARCHIVE} --repo-type dataset --revision {revision}`, or set tasks.data_dir "
            "(or LONGBENCH_DIR) to a folder with data/<task>.jsonl and config/*.json"
        ) from None


def unpack(archive: Path, target: Path, digest: str | None = None) -> Path:
    """Unpack data/*.jsonl of the archive, all or nothing: a killed one leaves no folder that looks whole.

    Only plain names in `data/` are written; an archive that names a path outside of itself is refused. What was
    unpacked earlier is verified against the digests taken then, and unpacked again where it is damaged.

    Args:
        digest: the archive's SHA-256, if it is known.
    """
    if unharmed(target):
        return target
    try:
        if digest and file_sha256(archive) != digest:
            raise DataError(f"{archive}: damaged or another file, its SHA-256 is not {digest}; delete it and try again")
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{UNPACKING}*"):  # by one that was killed
            if time.time() - left.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=UNPACKING, dir=target.parent) as work:
            whole = Path(work) / "whole"
            (whole / "data").mkdir(parents=True)
            extract(archive, whole)
            found = {path.name: file_sha256(path) for path in sorted((whole / "data").iterdir())}
            (whole / DIGESTS).write_text(json.dumps(found, indent=2), encoding="utf-8")
            if target.exists() and not unharmed(target):
                os.replace(target, Path(work) / "damaged")
            os.replace(whole, target)
    except OSError as error:
        if unharmed(target):  # another process was faster
            return target
        raise DataError(f"{target}: cannot unpack {archive} ({reason(error)})") from None
    return target


def unharmed(target: Path) -> bool:
    """Are the unpacked rows those that were unpacked?"""
    try:
        recorded = json.loads((target / DIGESTS).read_text(encoding="utf-8"))
        return bool({path.name: file_sha256(path) for path in (target / "data").iterdir()} == recorded)
    except (OSError, ValueError, RecursionError):
        return False


def extract(archive: Path, whole: Path) -> None:
    """Write data/*.jsonl of the archive below `whole`.

    Raises:
        DataError: an archive that is not readable, or that no sound source makes; it names archive and entry.
        OSError: no room, or no permission.
    """
    try:
        with zipfile.ZipFile(archive) as package:
            entries = package.infolist()
            if len(entries) > MOST_ENTRIES:
                raise DataError(f"{archive}: refused, it has {len(entries)} entries; valid: {MOST_ENTRIES} at most")
            room = LARGEST_UNPACKED
            for info in entries:
                if name := wanted(archive, info):
                    if (whole / name).exists():
                        raise DataError(f"{archive}: refused, it holds {info.filename!r} twice")
                    room -= copy(archive, package, info, whole / name, room)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive}: not a readable zip archive ({reason(error)}); delete it and try again") from None
    if not any((whole / "data").iterdir()):
        raise DataError(f"{archive}: holds no data/<task>.jsonl")


def wanted(archive: Path, info: zipfile.ZipInfo) -> str | None:
    """`data/<task>.jsonl` for an entry to unpack, None for one to pass over."""
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if not path.parts:
        raise DataError(f"{archive}: refused, it has an entry without a name ({info.filename!r})")
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"{archive}: refused, it names a path outside of itself ({info.filename!r})")
    if info.is_dir() or len(path.parts) != 2 or path.parts[0] != "data" or path.suffix != ".jsonl":
        return None
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(f"{archive}: refused, {info.filename!r} is a link")
    if info.flag_bits & 1:
        raise DataError(f"{archive}: refused, {info.filename!r} is encrypted")
    return str(path)


def copy(archive: Path, package: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, room: int) -> int:
    """Unpack one entry; returns its size. What it says about its size is not believed."""
    try:
        size = 0
        with package.open(info) as source, target.open("wb") as written:
            while block := source.read(1 << 20):
                size += len(block)
                if size > room:
                    raise DataError(
                        f"{archive}: refused at {info.filename!r}, it unpacks to more than {LARGEST_UNPACKED:,} bytes"
                    )
                written.write(block)
    except DAMAGES as error:
        raise DataError(f"{archive}: {info.filename!r} cannot be unpacked ({reason(error)})") from None
    return size


def config_files(root: Path | None, config_dir: str | None, url: str) -> tuple[dict[str, str], dict[str, int]]:
    """Prompts and lengths: from config_dir, else `config` in the data folder, else from the URL."""
    if config_dir:
        folder = Path(config_dir).expanduser()
    elif root is not None and (root / "config" / PROMPTS).is_file():
        folder = root / "config"
    else:
        folder = cache_folder("longbench") / re.sub(r"[^\w.-]", "_", url)
        for name in (PROMPTS, LENGTHS):
            known = SHA256[name] if url == CONFIG_URL else None
            if not intact(folder / name, known):
                source, target = f"{url.rstrip('/')}/{name}", folder / name
                advice = (
                    f"Save {source} there yourself, or set tasks.config_dir to a folder with {PROMPTS} and {LENGTHS}"
                )
                download(source, target, "tasks.config_url", json.loads, LARGEST_CONFIG, advice, known)
    prompts = read_table(folder / PROMPTS, str)
    for task, text in prompts.items():
        try:
            text.encode("utf-8")
            parse_format(text)
        except ValueError as error:  # also half of a surrogate pair, which is no text
            raise DataError(f"{folder / PROMPTS}: the prompt of task {task} is malformed: {reason(error)}") from None
    lengths = read_table(folder / LENGTHS, int)
    for task, length in lengths.items():
        if not 1 <= length <= LONGEST:
            raise DataError(f"{folder / LENGTHS}: task {task} has length {length}; must be 1 to {LONGEST}")
    return prompts, lengths


def read_table(path: Path, kind: type) -> dict[str, Any]:
    """A JSON object task -> str or int."""
    try:
        table = json.loads(path.read_bytes())
    except OSError:
        raise DataError(
            f"{path}: missing. It is one of LongBench's own files ({CONFIG_URL}/{path.name}); put it there "
            f"or set tasks.config_dir to a folder with {PROMPTS} and {LENGTHS}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({reason(error)})") from None
    if not isinstance(table, dict) or not all(type(value) is kind for value in table.values()):
        raise DataError(f"{path}: must be a JSON object of task names to {kind.__name__} values")
    return table
