"""Files fetched once over http(s) and kept in the user's cache folder, whole or not at all."""

import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from evals.errors import DataError

TIMEOUT_SECONDS = 30


def user_cache() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache: also where it is relative, as the XDG specification has it."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return given if given.is_absolute() else Path.home() / ".cache"


def cache_folder(suite: str) -> Path:
    """Downloads of a suite are kept here: $KVBENCH_CACHE, or a folder in the user's cache folder."""
    own = os.environ.get("KVBENCH_CACHE")
    return (Path(own).expanduser() if own else user_cache() / "kv-eviction-bench") / suite


def download(url: str, target: Path, setting: str, check: Callable[[bytes], object], largest: int, advice: str) -> None:
    """One file. `check` raises ValueError for a content that cannot be right, such as an error page.

    Raises:
        DataError: `setting` holds no http(s) address, or nothing (right) came; ends with `advice`.
    """
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{setting}: {url} must begin with https:// or http://")
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            content, announced = answer.read(largest + 1), answer.headers.get("Content-Length")
        if len(content) > largest:
            raise ValueError(f"more than {largest:,} bytes")
        if announced is not None and int(announced) != len(content):  # read(n) does not complain about fewer
            raise ValueError(f"{len(content)} of {announced} bytes came")
        check(content)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        partial.write_bytes(content)
        os.replace(partial, target)
    except (OSError, ValueError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise DataError(f"{target}: missing and could not be fetched ({one_line(error)}). {advice}") from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
