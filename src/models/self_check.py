"""Does the full cache give what the plain model gives? Asked once per model, then remembered in the cache folder.

The guard against what nobody foresaw: an architecture, or a new version of transformers, that wants something of its
attention which neither its config nor its calls show. Two texts of random tokens, a short and a longer one, are read
by the model as transformers runs it and by the engine, in one wave; their last tokens go through the cache one by one.
The short text is the beginning of the longer one, so that the plain model reads both at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from evals.visible import reason
from policies.full import Full
from src.engine.engine import Engine
from src.engine.layer_kinds import TextLengths, listed
from src.engine.request import Job, Request, Variant
from src.errors import InputError
from src.kv.faults import is_out_of_memory
from src.models.digest import digest

log = logging.getLogger(__name__)

LENGTHS = (5, 24)  # tokens of the two prompts: enough to mix heads and layers, and cheap
STEPS = 2  # tokens read one by one after them
# Largest relative difference of logits. In half precision rounding alone makes several per cent, and now and then
# a mixture of experts chooses another expert; there the median over all compared tokens counts instead of the largest.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
PRECISE = (torch.float64, torch.float32)
SRC = Path(__file__).resolve().parents[1]  # a changed engine is checked anew


def check_once(model: PreTrainedModel, folder: Path, compare: bool = True) -> None:
    """The check, unless it is known to pass.

    Args:
        folder: where passed checks are remembered.
        compare: False looks only whether the model's layers come to the engine as they must, on a few tokens.

    Raises:
        InputError: the model cannot be served, or its numbers differ; it names the model type and the layers.
    """
    passed = folder / fingerprint(model)
    if passed.is_file():
        return
    with implementation_restored(model), refusing_failures(model):
        if compare:
            compare_with_plain(model)
        else:
            run_engine(model, [random_text(model.config, LENGTHS[0])])
    if compare:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            passed.write_text(model.config.get_text_config().model_type + "\n", encoding="utf-8")
        except OSError as error:  # nothing is lost: the next run checks again
            log.info("the self-check is not remembered (%s)", error)


def fingerprint(model: PreTrainedModel) -> str:
    """What a passed check depends on: config, weights, precision, device, versions, and the engine's own code."""
    files = [Path(__file__), *sorted(SRC.glob("engine/*.py")), *sorted(SRC.glob("kv/*.py"))]
    code = b"".join(file.read_bytes() for file in files)
    parts = (
        model.config.to_json_string(use_diff=False),
        digest(model),
        str(model.dtype),
        model.device.type,
        transformers.__version__,
        torch.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode() + code).hexdigest()[:32]


def compare_with_plain(model: PreTrainedModel) -> None:
    """Engine against plain model, token by token.

    Raises:
        InputError: logits differ by more than rounding; it names the first layer whose output does.
    """
    config = model.config.get_text_config()
    lengths = fitting(TextLengths.of(model))
    text = random_text(model.config, max(lengths))
    with torch.inference_mode(), Recorder(model) as plain:
        model(torch.tensor([text], device=model.device), use_cache=False)
    with Recorder(model) as engine:
        run_engine(model, [text[:n] for n in lengths])
    errors = differences(engine.logits, plain.logits[0], lengths)
    error = float(errors.max() if model.dtype in PRECISE else errors.median())
    if (
        error <= TOLERANCE[model.dtype]
    ):  # then two tokens can only change places where their logits are as good as equal
        return
    raise InputError(
        f"model.self_check: model type {config.model_type}, texts of {lengths[0]} and {lengths[1]} tokens: "
        f"logits with the full cache differ from the plain model's by {error:.1e} (valid: {TOLERANCE[model.dtype]:g}), "
        f"first {blame(model, plain, engine, lengths)}; "
        "valid: a model that the engine reproduces, or model.self_check=false to go on all the same"
    )


def run_engine(model: PreTrainedModel, texts: list[list[int]]) -> None:
    """All texts in one wave: the last tokens are fed as a question after the cut (`prompt_scope=context`)."""
    full = Variant(Full(), None)
    jobs = [
        Job(Request(f"self-check of {len(t)} tokens", t, frozenset(), 1, context_tokens=len(t) - STEPS), [full])
        for t in texts
    ]
    for result in Engine(model, len(jobs)).run(jobs):
        if result.error:
            raise InputError(f"model.self_check: {result.error}")


def fitting(lengths: TextLengths) -> list[int]:
    """Tokens of the texts, shorter where the model serves only shorter ones."""
    most = min(
        [limit.tokens for limit in lengths.limits] + ([lengths.switch] if lengths.switch else []), default=1 << 62
    )
    return [max(STEPS + 1, min(n + STEPS, most - 1)) for n in LENGTHS]


def random_text(config: PreTrainedConfig, length: int) -> list[int]:
    """Token ids, always the same; none that the config names (image tokens, padding)."""
    text = config.get_text_config()
    special = {
        value
        for each in (config, text)
        for name, value in each.to_dict().items()
        if ("token_id" in name or "token_index" in name) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(0)
    ids: list[int] = torch.randint(0, text.vocab_size, (length + 64,), generator=generator).tolist()
    ordinary = [i for i in ids if i not in special]
    return (ordinary or ids)[:length]


class Recorder:
    """Notes the logits and every attention module's outputs of every forward pass, `(lanes, tokens, size)`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.logits: list[Tensor] = []
        self.outputs: dict[str, list[Tensor]] = {}

    def __enter__(self) -> Recorder:
        self._hooks = [self.model.register_forward_hook(lambda m, a, out: self.logits.append(out.logits.float().cpu()))]
        for name, module in attention_modules(self.model):
            self._hooks.append(module.register_forward_hook(self._noting(self.outputs.setdefault(name, []))))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _noting(self, into: list[Tensor]) -> Any:
        def note(module: nn.Module, given: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and first.dim() == 3:
                into.append(first.float().cpu())

        return note


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int) and "attention" in type(module).__name__.lower():
            yield name, module


def differences(passes: list[Tensor], plain: Tensor, lengths: list[int]) -> Tensor:
    """Of every compared token of every text, how far two vectors are apart, relative to how much the plain one varies.

    Args:
        passes: the engine's: one per prompt `(1, tokens, size)`, then one per step over all lanes `(lanes, 1, size)`.
        plain: the plain model's pass over the longest text, `(1, tokens, size)`.
    """
    prompts, steps = passes[: len(lengths)], passes[len(lengths) :]
    found = torch.stack([torch.stack([prompts[i][0, -1], *(s[i, -1] for s in steps)]) for i in range(len(lengths))])
    expected = torch.stack([plain[0, n - STEPS - 1 : n] for n in lengths])
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return ((found - expected).norm(dim=-1) / spread.clamp_min(1e-30)).flatten()


def blame(model: PreTrainedModel, plain: Recorder, engine: Recorder, lengths: list[int]) -> str:
    """The first attention layer whose output differs, and its kind; or all kinds there are."""
    kinds = listed(model.config.get_text_config(), "layer_types")
    for name, module in attention_modules(model):
        layer: Any = module.layer_idx
        where = f"attention layer {layer} ({f'{kinds[layer]}, ' if layer < len(kinds) else ''}{type(module).__name__})"
        if len(plain.outputs[name]) != 1 or len(engine.outputs[name]) != len(lengths) + STEPS:
            return f"in {where}, which is called another number of times"
        if float(differences(engine.outputs[name], plain.outputs[name][0], lengths).max()) > TOLERANCE[model.dtype]:
            return f"in {where}"
    return f"outside the attention layers (kinds: {', '.join(sorted({*map(str, kinds)})) or 'not named'})"


@contextmanager
def refusing_failures(model: PreTrainedModel) -> Iterator[None]:
    """Whatever the model's own code raises when it is called is the model's refusal, not this program's fault."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        kind = model.config.get_text_config().model_type
        raise InputError(
            f"model.self_check: model type {kind} fails on a few tokens ({type(error).__name__}: {reason(error)}); "
            "valid: a model that reads plain text"
        ) from error


@contextmanager
def implementation_restored(model: PreTrainedModel) -> Iterator[None]:
    """The engine sets its own attention implementation; afterwards all parts of the model have theirs again."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
