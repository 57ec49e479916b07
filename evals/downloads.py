"""Files fetched once over https and kept in the user's cache folder, whole and as they came, or not at all."""

import hashlib
import os
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evals.errors import DataError
from evals.visible import reason

TIMEOUT_SECONDS = 30


def user_cache() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache: also where it is relative, as the XDG specification has it."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return given if given.is_absolute() else Path.home() / ".cache"


def cache_folder(suite: str) -> Path:
    """Downloads of a suite are kept here: $KVBENCH_CACHE, or a folder in the user's cache folder."""
    own = os.environ.get("KVBENCH_CACHE")
    return (Path(own).expanduser() if own else user_cache() / "kv-eviction-bench") / suite


def secure(url: str) -> bool:
    """https, or http that never leaves this machine (a mirror of one's own, a tunnel)."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme == "https":
        return bool(host)
    try:
        return parts.scheme == "http" and (host == "localhost" or ip_address(host).is_loopback)
    except ValueError:  # a name
        return False


class SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect from https to where anybody may listen or answer."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not secure(newurl):
            raise OSError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def refuse_insecure_hub() -> None:
    """
    Raises:
        DataError: HF_ENDPOINT sends huggingface_hub to a place without https.
    """
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and not secure(endpoint):
        raise DataError(f"HF_ENDPOINT={endpoint}: valid: an https:// address (http:// only of this machine)")


def intact(path: Path, wanted: str | None) -> bool:
    """Is the kept file there, and the one that was fetched?

    Args:
        wanted: its SHA-256 where it is known beforehand; else the one written down beside it when it came (or now,
            of a file that somebody put there by hand).
    """
    try:
        found = file_sha256(path)
        if not wanted and not beside(path).exists():
            with suppress(OSError):  # a cache folder that cannot be written
                beside(path).write_text(found, encoding="ascii")
            return True
        return found == (wanted or beside(path).read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return False


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path) -> Path:
    """Where a kept file's SHA-256 is written down."""
    return path.with_name(f"{path.name}.sha256")


def download(
    url: str,
    target: Path,
    setting: str,
    check: Callable[[bytes], object],
    largest: int,
    advice: str,
    digest: str | None = None,
) -> None:
    """One file. `check` raises ValueError for a content that cannot be right, such as an error page.

    Args:
        digest: the SHA-256 that the content must have; None: not known, so the one that comes is written down
            beside the file and asked for from then on (`intact`).

    Raises:
        DataError: `setting` holds no https address, or nothing (right) came; ends with `advice`.
    """
    if not secure(url):
        raise DataError(f"{setting}: {url} must begin with https:// (http:// is for this machine's own addresses)")
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.build_opener(SecureRedirects).open(url, timeout=TIMEOUT_SECONDS) as answer:
            content, announced = answer.read(largest + 1), answer.headers.get("Content-Length")
        if len(content) > largest:
            raise ValueError(f"more than {largest:,} bytes")
        if announced is not None and int(announced) != len(content):  # read(n) does not complain about fewer
            raise ValueError(f"{len(content)} of {announced} bytes came")
        check(content)
        found = hashlib.sha256(content).hexdigest()
        if digest and found != digest:
            raise ValueError(f"its SHA-256 is {found[:12]}..., not {digest[:12]}... as it should be")
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, written in ((beside(target), found.encode()), (target, content)):
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            partial.write_bytes(written)
            os.replace(partial, path)
    except (OSError, ValueError, RecursionError, HTTPException) as error:  # urllib's own errors are OSErrors
        state = "damaged" if target.exists() else "missing"
        raise DataError(f"{target}: {state} and could not be fetched ({reason(error)}). {advice}") from None
