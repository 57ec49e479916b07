"""Where LongBench's files come from: a folder, or one download that later runs reuse."""

import json
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from evals.downloads import cache_folder, download, one_line
from evals.errors import DataError
from evals.rows import parse_format

HUB_REPO = "zai-org/LongBench"  # formerly THUDM/LongBench
ARCHIVE = "data.zip"
# The GitHub repository in January 2025. A fixed commit: prompts must not change under a comparison.
COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
CONFIG_URL = f"https://raw.githubusercontent.com/THUDM/LongBench/{COMMIT}/LongBench/config"
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
LARGEST_CONFIG = 1 << 20
LONGEST = 1_000_000  # new tokens; more is a slip, and no model has positions for it


def row_folder(root: Path | None, hub_repo: str, revision: str) -> Path:
    """The folder with <task>.jsonl: `data` in the given folder, else the unpacked archive of the hub."""
    if root is not None:
        return root / "data"
    archive = download_archive(hub_repo, revision)
    # The hub's cache keeps a file under its commit, so another revision is unpacked beside this one.
    name = re.sub(r"[^\w.-]", "_", f"{hub_repo}-{archive.parent.name}")
    return unpack(archive, cache_folder("longbench") / name) / "data"


def download_archive(hub_repo: str, revision: str) -> Path:
    """data.zip, downloaded once by huggingface_hub (which honours HF_ENDPOINT and HF_HUB_OFFLINE)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_repo, ARCHIVE, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"LongBench rows: {ARCHIVE} of {hub_repo} could not be fetched ({one_line(error)}). With network "
            f"run `hf download {hub_repo} {ARCHIVE} --repo-type dataset`, or set tasks.data_dir (or "
            "LONGBENCH_DIR) to a folder with data/<task>.jsonl and config/*.json"
        ) from None


def unpack(archive: Path, target: Path) -> Path:
    """Unpack data/*.jsonl of the archive, all or nothing: a killed one leaves no folder that looks whole.

    Only plain names in `data/` are written; an archive that names a path outside of itself is refused.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=target.parent) as work,
            zipfile.ZipFile(archive) as package,
        ):
            (Path(work) / "whole" / "data").mkdir(parents=True)
            for info in package.infolist():
                path = PurePosixPath(info.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise DataError(f"{archive}: refused, it names a path outside of itself ({info.filename})")
                if len(path.parts) == 2 and path.parts[0] == "data" and path.suffix == ".jsonl":
                    with package.open(info) as source, open(Path(work) / "whole" / path, "wb") as copy:
                        shutil.copyfileobj(source, copy)
            if not any((Path(work) / "whole" / "data").iterdir()):
                raise DataError(f"{archive}: holds no data/<task>.jsonl")
            os.replace(Path(work) / "whole", target)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DataError(f"{archive}: not a readable zip archive ({one_line(error)}); delete it and try again") from None
    except OSError as error:
        if target.is_dir():  # another process was faster
            return target
        raise DataError(f"{target}: cannot unpack {archive} ({one_line(error)})") from None
    return target


def config_files(root: Path | None, config_dir: str | None, url: str) -> tuple[dict[str, str], dict[str, int]]:
    """Prompts and lengths: from config_dir, else `config` in the data folder, else from the URL."""
    if config_dir:
        folder = Path(config_dir).expanduser()
    elif root is not None and (root / "config" / PROMPTS).is_file():
        folder = root / "config"
    else:
        folder = cache_folder("longbench") / re.sub(r"[^\w.-]", "_", url)
        for name in (PROMPTS, LENGTHS):
            if not (folder / name).is_file():
                source, target = f"{url.rstrip('/')}/{name}", folder / name
                advice = (
                    f"Save {source} there yourself, or set tasks.config_dir to a folder with {PROMPTS} and {LENGTHS}"
                )
                download(source, target, "tasks.config_url", json.loads, LARGEST_CONFIG, advice)
    prompts = read_table(folder / PROMPTS, str)
    for task, text in prompts.items():
        try:
            text.encode("utf-8")
            parse_format(text)
        except ValueError as error:  # also half of a surrogate pair, which is no text
            raise DataError(f"{folder / PROMPTS}: the prompt of task {task} is malformed: {one_line(error)}") from None
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
        raise DataError(f"{path}: broken JSON ({one_line(error)})") from None
    if not isinstance(table, dict) or not all(type(value) is kind for value in table.values()):
        raise DataError(f"{path}: must be a JSON object of task names to {kind.__name__} values")
    return table
