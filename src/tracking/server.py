"""Is a W&B key configured, and does its server answer? Without asking anybody, and in bounded time."""

import configparser
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_SERVER = "https://api.wandb.ai"


def server() -> str:
    """The W&B server's address: environment, else wandb's settings file, else the public one."""
    return os.environ.get("WANDB_BASE_URL") or _user_setting("base_url") or DEFAULT_SERVER


def key_configured() -> bool:
    """Would wandb find credentials without asking? Looks where wandb looks; nothing is kept."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if _user_setting("api_key"):
        return True
    paths = [Path(p).expanduser() for p in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc") if p]
    try:
        path = next(path for path in paths if path.exists())
        found = netrc.netrc(path).hosts.get(urlsplit(server()).netloc)
    except (StopIteration, OSError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])


def server_answers(address: str, seconds: float) -> bool:
    """Any HTTP answer, even a refusal, is a sign of life. The environment's proxies are used, as by wandb."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(address, timeout=seconds):
                return True
        except urllib.error.HTTPError:
            return True
        except (OSError, ValueError):
            return False

    done, result = within(seconds + 1, ask)  # looking up a name is not covered by the timeout
    return done and result is True


def _user_setting(name: str) -> str | None:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
    except configparser.Error:
        return None
    return parser.get("default", name, fallback=None)


def within(seconds: float, call: Callable[[], Any]) -> tuple[bool, Any]:
    """Run `call` for at most so long: (ended in time, its result or the exception it raised)."""
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(result), result[0] if result else None


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
