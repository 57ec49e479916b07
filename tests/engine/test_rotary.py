"""In-cache positions: how each layer turns its queries is learned from the model, or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from policies.full import Full
from policies.h2o import H2O
from policies.streaming_llm import StreamingLLM
from src.engine import attention
from src.engine.engine import Engine
from src.engine.request import Generation, Job, Request, Variant
from src.engine.rotary import Rotary
from src.errors import InputError
from tests.support.tiny import SHAPE, scale_weights, tiny, tokens
from tests.support.versions import needs_documented

MLA = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {**MLA, "head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 9}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

# Every layer rotates alike: pairs of halves or of neighbours, a head's first or last dimensions, both directions.
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "partial": ("glm4_moe", {"partial_rotary_factor": 0.5, "first_k_dense_replace": 9}),
    "neighbours": ("cohere", {}),
    "neighbours-partial": ("glm4", {"partial_rotary_factor": 0.5}),
    "last": ("deepseek_v3", DEEPSEEK),
    "last-neighbours": ("deepseek_v2", DEEPSEEK),
    "backwards": ("nanochat", {}),
    "none": ("smollm3", {"no_rope_layers": [0, 0], "use_sliding_window": False}),
}
# Layers differ: some are not rotated, or the frequencies go with the type of the layer.
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "unrotated": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "unrotated-neighbours": ("cohere2", {"sliding_window": 4096, "sliding_window_pattern": 2}),
    "two-sets": (
        "gemma3_text",
        {"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": ROPES},
    ),
}


def built(kind: tuple[str, dict[str, Any]], dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    arch, options = kind
    config = AutoConfig.for_model(arch, **{**SHAPE, **options, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    scale_weights(model, torch.Generator().manual_seed(0))
    model = model.to(dtype).eval().requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return model


class Queries:
    """Keeps each layer's queries of a plain pass."""

    longest = 30

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, whole: Any) -> Tensor:
        self.found.append(query)
        return whole(query, key, value)


@torch.inference_mode()
def errors(model: PreTrainedModel, rotary: Rotary, shift: int, named: bool = True) -> list[float]:
    """Per layer, the relative error of queries at p + shift, turned back, against those at p."""
    near, far = Queries(), Queries()
    for offset, watch in ((0, near), (shift, far)):
        model(tokens(30), position_ids=torch.arange(30)[None] + offset, use_cache=False, lanes=watch)
    found = []
    for layer, (right, moved) in enumerate(zip(near.found, far.found, strict=True)):
        back = rotary.turn(moved, torch.tensor([-shift]), layer if named else None)
        found.append(float((back - right).norm() / right.norm()))
    return found


@pytest.mark.parametrize("name", [*ALIKE, *MIXED])
@pytest.mark.parametrize("shift", [1, 17, 1999])
def test_queries_are_turned_back_on_every_layer(name: str, shift: int) -> None:
    model = built((ALIKE | MIXED)[name])
    found = errors(model, Rotary(model), shift)
    assert len(found) == 2 and max(found) < 1e-4 * max(1, shift / 500)  # models round far angles to float32


@pytest.mark.parametrize("name", ALIKE)
def test_a_layer_need_not_be_named_where_all_are_alike(name: str) -> None:
    model = built(ALIKE[name])
    assert max(errors(model, Rotary(model), 17, named=False)) < 1e-4


@needs_documented
@pytest.mark.parametrize("name", MIXED)
def test_a_layer_must_be_named_where_they_differ(name: str) -> None:
    with pytest.raises(InputError, match="layers 0 and 1 of this model rotate differently"):
        Rotary(built(MIXED[name])).turn(torch.zeros(1, 4, 16), torch.tensor([1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "neighbours-partial", "last", "backwards", "unrotated"])
def test_half_precision_learns_the_same(name: str, dtype: torch.dtype) -> None:
    ways = []
    for kind in (torch.float32, dtype):
        rotary = Rotary(built((ALIKE | MIXED)[name], kind))
        rotary.turn(torch.zeros(1, 4, 24 if name == "last" else 16, dtype=kind), torch.tensor([1]), 0)
        ways.append([(w.first, w.second, float(w.frequencies.sum()) > 0) for w in rotary.layers.values()])
    assert ways[0] == ways[1]


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_llama_kinds_are_turned_bit_for_bit_as_before(name: str) -> None:
    options = {"partial_rotary_factor": 0.5} if name == "phi3" else {}
    model = tiny(name, **options)
    model.set_attn_implementation(attention.NAME)
    half = 4 if name == "phi3" else 8
    vectors = torch.randn(3, 2, 2, 16, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([-5, 0, -333])
    frequencies = next(m.inv_freq for m in model.modules() if hasattr(m, "inv_freq"))
    angle = (shift[:, None].double() * frequencies.double()).view(3, 1, 1, half)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second, rest = vectors.split([half, half, 16 - 2 * half], dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    assert torch.equal(Rotary(model).turn(vectors, shift, 0), turned)


# ---- the whole way: one layer sees its cache as if the evicted text had never been there --------------------


def answer(model: PreTrainedModel, variant: Variant, length: int = 60, new: int = 12) -> Generation:
    request = Request("x", tokens(length)[0].tolist(), frozenset(), new)
    (found,) = Engine(model).run([Job(request, [variant])])
    return found


@pytest.mark.parametrize("name", ALIKE)
def test_one_layer_answers_as_the_plain_model_on_what_it_keeps(name: str) -> None:
    """With one layer a token's key is its own; so the plain model over sinks and recent tokens is the right answer."""
    arch, options = ALIKE[name]
    options = {k: v[:1] if k == "no_rope_layers" else v for k, v in options.items()}
    model = built((arch, options), num_hidden_layers=1)
    found = answer(model, Variant(StreamingLLM(sinks=4), 16)).tokens
    model.set_attn_implementation("sdpa")
    text = tokens(60)[0].tolist() + found[:1]  # the first one comes from the whole prompt
    for _ in found[1:]:
        seen = torch.tensor([text[:4] + text[-13:]])  # 16 cached, and the incoming one
        text.append(int(model(seen).logits[0, -1].argmax()))
    assert found == text[60:]
    assert len(set(found)) > 3


# ---- refusals -------------------------------------------------------------------------------------------


def refused(model: PreTrainedModel, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        answer(model, Variant(StreamingLLM(), 16))
    message = str(caught.value)
    assert "\n" not in message and "Valid: policy.positions=original" in message
    for part in parts:
        assert part in message
    assert len(answer(model, Variant(StreamingLLM(positions="original"), 16)).tokens) == 12


@needs_documented
@pytest.mark.parametrize("begins", [1024, 16384])
def test_a_query_scale_that_depends_on_the_position_is_refused(begins: int) -> None:
    """Also where it begins so far away that nothing shows in a short text."""
    rope = {**YARN, "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
    rope |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": begins}
    options = {"rope_parameters": rope, "max_position_embeddings": 4 * begins}
    refused(built(("ministral3", options)), "layer 0", "size")


@needs_documented
def test_positions_that_are_no_rotation_are_refused() -> None:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": None}
    config = AutoConfig.for_model("gpt2", vocab_size=128, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    refused(model, "layer 0", "without a rotary embedding")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(kind: str) -> None:
    rope = LONGROPE if kind == "longrope" else {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    rope = {**rope, "original_max_position_embeddings": 2048}
    # The model is asked directly: an engine may refuse such a one altogether.
    with pytest.raises(InputError, match=f"length of the text .{kind}.*Valid: policy.positions=original"):
        Rotary(built(("llama", {"rope_parameters": rope}))).turn(torch.zeros(1, 4, 16), torch.tensor([1]), 0)


def test_a_rotation_nobody_has_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimension c paired with the last but c: the check decides, not the architecture's name."""

    def mirrored(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None, :, :8], sin[:, None, :, :8]

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., :8], x[..., 8:].flip(-1)
            return torch.cat([a * cos - b * sin, (b * cos + a * sin).flip(-1)], dim=-1)

        return turn(q), turn(k)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", mirrored)
    refused(tiny("llama"), "layer 0", "no way of rotating")


def test_frequencies_of_another_model_are_refused() -> None:
    """What a module says it rotates by is believed only when its queries move so: here slow frequencies are off."""
    model = built(("llama", {}))
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    said, plain = rotary.inv_freq.clone(), rotary.forward

    def forward(x: Tensor, position_ids: Tensor) -> Any:
        rotary.inv_freq = said * torch.tensor([1.0] * 7 + [0.5])
        found = plain(x, position_ids)
        rotary.inv_freq = said
        return found

    rotary.forward = forward
    refused(model, "layer 0", "no way of rotating")


def test_runs_that_never_turn_ask_nothing_of_the_model() -> None:
    engine = Engine(tiny("llama"))
    variants = [Variant(Full(), None), Variant(H2O(), 16), Variant(StreamingLLM(positions="original"), 16)]
    list(engine.run([Job(Request("x", tokens(40)[0].tolist(), frozenset(), 4), variants)]))
    assert engine.rotary.layers == {}
    list(engine.run([Job(Request("x", tokens(40)[0].tolist(), frozenset(), 4), [Variant(StreamingLLM(), 16)])]))
    assert sorted(engine.rotary.layers) == [0, 1]
