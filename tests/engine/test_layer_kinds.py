"""Models whose layers need more than causal attention over one growing cache: refused, and the reason named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from policies.full import Full
from policies.h2o import H2O
from src.engine import attention
from src.engine.engine import Engine
from src.engine.layer_kinds import TextLengths, check_kinds, table_limits, text_limits
from src.engine.request import Job, Request, Variant
from src.errors import InputError
from src.models.load import load_model
from tests.support.cli import call, lines, longbench_folder, metrics, row
from tests.support.tiny import SHAPE, scale_weights, tiny, tiny_tokenizer, tokens
from tests.support.versions import needs_documented

FULL = Variant(Full(), None)
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_experts": 2, "n_routed_experts": 2}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
LLAMA4 = {**MOE, "intermediate_size_mlp": 96, "no_rope_layers": [1, 1], "attn_temperature_tuning": False}
PHI_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
LONGROPE = {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": PHI_ROPE}
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4096,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 0,
}


def config(arch: str, **changes: Any) -> Any:
    return AutoConfig.for_model(arch, **{**SHAPE, **changes})


def build(arch: str, **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config(arch, **changes), dtype=torch.float32)
    scale_weights(model, torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def ask(length: int, new: int = 8, **more: Any) -> Request:
    return Request(f"{length}", tokens(length, seed=length)[0].tolist(), frozenset(), new, **more)


def generated(model: PreTrainedModel, length: int, new: int) -> list[int]:
    model.set_attn_implementation("sdpa")
    ids = tokens(length, seed=length)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, length:].tolist()


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("lfm2", {"layer_types": ["full_attention", "conv"], "block_ff_dim": 96}, "conv"),
        ("minimax", {"layer_types": ["full_attention", "linear_attention"], **MOE}, "linear_attention"),
        pytest.param("falcon_h1", {}, "hybrid", marks=needs_documented),
        pytest.param("deepseek_v32", {**MLA, **MOE, "index_topk": 32}, "indexed_attention", marks=needs_documented),
        ("doge", {}, "keep_window_size"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        pytest.param(
            "gemma4_text", {**GEMMA4, "global_head_dim": 32}, "different head_dim (16, 32)", marks=needs_documented
        ),
        pytest.param(
            *("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 1, "global_head_dim": 16}, "num_kv_shared_layers"),
            marks=needs_documented,
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_kinds_of_layers_are_refused_from_the_config(arch: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        check_kinds(config(arch, **changes))
    assert arch in str(error.value) and said in str(error.value) and "valid: " in str(error.value)


@pytest.mark.parametrize(
    ("arch", "changes", "tokens"),
    [
        ("llama4_text", {**LLAMA4, "attention_chunk_size": 32}, [32]),
        ("llama4_text", {**LLAMA4, "attention_chunk_size": 4096}, [4096]),
        ("llama4_text", {**LLAMA4, "no_rope_layers": [1, 0], "attn_temperature_tuning": True, "floor_scale": 8,
                         "layer_types": ["full_attention"] * 2}, [7]),
        ("mistral", {"sliding_window": 32}, [32]),
        ("mistral", {"sliding_window": None}, []),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}, []),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, []),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, [32]),
        ("llama", {"max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}, [63]),
        ("llama", {}, []),
    ],
)  # fmt: skip
def test_windows_and_chunks_bound_the_text(arch: str, changes: dict[str, Any], tokens: list[int]) -> None:
    assert [limit.tokens for limit in text_limits(config(arch, **changes))] == tokens


def test_a_chunk_is_honoured_or_refused() -> None:
    """A text that grows beyond its chunk while decoding is refused before its first token."""
    model = build("llama4_text", **LLAMA4, attention_chunk_size=32)
    expected = generated(model, 20, 13)
    engine = Engine(model)
    assert next(engine.run([Job(ask(20, 13), [FULL])])).tokens == expected  # the last token is not read
    for request in (ask(20, 14), ask(40, 1)):
        with pytest.raises(InputError, match=r"attention_chunk_size=32.*valid: 32 tokens"):
            list(engine.run([Job(request, [FULL])]))


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indices": torch.zeros(1)}, "indices"),
        ({"unheard_of": False}, "unheard_of"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"softcap": 3.0}, "softcap"),
        ({"s_aux": torch.zeros(1)}, "sinks"),
    ],
)
def test_whatever_a_model_asks_of_its_attention_is_known_or_refused(keywords: dict[str, Any], said: str) -> None:
    class Lanes:
        longest = 3

        def attend(self, layer: int, query: torch.Tensor, *rest: Any) -> torch.Tensor:
            return query

    layer = tiny("llama").model.layers[0].self_attn
    states = torch.zeros(1, 4, 3, 16)
    harmless: dict[str, Any] = {"attention_mask": None, "use_cache": False, "dropout": 0.0, "position_bias": None}
    attention.lanes_attention(layer, states, states, states, lanes=Lanes(), **harmless)
    with pytest.raises(InputError) as error:
        attention.lanes_attention(layer, states, states, states, lanes=Lanes(), **{**harmless, **keywords})
    message = str(error.value)
    assert said in message and "llama" in message and "valid" in message and "\n" not in message


class Wrong(torch.nn.Module):
    """A decoder layer's attention that is called as `how` says."""

    def __init__(self, inner: Any, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.calls = inner, how, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.how == "skipped" or (self.how == "skipped while decoding" and self.calls > 1):
            return torch.zeros_like(kwargs["hidden_states"]), None
        if self.how == "twice":
            self.inner(*args, **kwargs)
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("how", ["skipped", "skipped while decoding", "twice"])
def test_every_layer_comes_exactly_once_in_every_pass(layer: int, how: str) -> None:
    model: Any = tiny("llama")
    model.model.layers[layer].self_attn = Wrong(model.model.layers[layer].self_attn, how)
    with pytest.raises(InputError, match=r"llama.* of 2 layers; valid: .*exactly once, in order"):
        list(Engine(model).run([Job(ask(9), [FULL, Variant(H2O(), 6)])]))


@pytest.mark.parametrize("arch", ["diffllama", "nemotron"])
def test_an_architecture_that_calls_attention_otherwise_is_refused_at_load(arch: str, tmp_path: Path) -> None:
    build(arch).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for self_check in (True, False):
        with pytest.raises(InputError, match=f"model type {arch}"):
            load_model({"path": str(tmp_path), "chat": False, "self_check": self_check})


def test_a_model_whose_flag_says_no_is_served_when_it_works(tmp_path: Path) -> None:
    """BioGPT goes through the attention interface, though it does not say so."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config("biogpt", pad_token_id=0), dtype=torch.float32)
    model.eval().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model({"path": str(tmp_path), "chat": False}).model
    expected = generated(loaded, 20, 6)
    assert next(Engine(loaded).run([Job(ask(20, 6), [FULL])])).tokens == expected


# longrope: two sets of frequencies, chosen by the longest text of a forward pass.


def test_longrope_texts_of_both_sides_never_share_a_wave() -> None:
    model = build("phi3", **LONGROPE)
    lengths = [30, 80, 40, 100, 56]
    expected = {n: generated(model, n, 9) for n in lengths}
    for lanes in (1, 8):
        found = {r.request.name: r for r in Engine(model, lanes).run(Job(ask(n, 9), [FULL]) for n in lengths)}
        assert {int(name): r.tokens for name, r in found.items()} == expected
    assert generated(model, 80, 9) != generated(build("phi3", sliding_window=None), 80, 9)  # the side matters


@pytest.mark.parametrize(
    ("request_", "served"),
    [
        (ask(56, 9), True),  # reads 64 tokens
        (ask(56, 10), False),
        (ask(64, 2), False),
        (ask(65, 40), True),
        (ask(80, 4, context_tokens=64), False),  # the context is read before the question
        (ask(80, 4, context_tokens=65), True),
    ],
)
def test_a_text_that_crosses_the_switch_is_refused(request_: Request, served: bool) -> None:
    engine = Engine(build("phi3", **LONGROPE))
    assert (engine.refusal(request_) is None) == served
    if not served:
        with pytest.raises(InputError, match=r"at 64 tokens \(longrope\).*valid"):
            list(engine.run([Job(request_, [FULL])]))


# At the command line.


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    texts = ["a b c. " * 2, "d e f. " * 12, "g h. " * 5]
    data = longbench_folder(tmp_path / "data", [row(i, context=text, input="x?") for i, text in enumerate(texts)])
    common = ["model=local", f"model.path={tmp_path / 'model'}", "tasks=hotpotqa", f"tasks.data_dir={data}"]
    return [*common, "policy=full", "wandb.mode=disabled", f"output_root={tmp_path / 'results'}", "model.chat=false"]


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def test_a_crossing_sample_fails_and_the_others_go_on(arguments: list[str], tmp_path: Path) -> None:
    save(build("phi3", **LONGROPE), tmp_path / "model")
    done = call("run", *arguments, "max_new_tokens=20")
    assert done.code == 1, done.err
    found = {r["id"]: (r["prompt_tokens"], r["error"]) for r in lines(done.folder)}
    crossing = {i for i, (n, _) in found.items() if n <= 64 < n + 19}
    assert crossing == {i for i, (_, error) in found.items() if error} == {"row2"}
    assert "longrope" in found["row2"][1]
    again = call("run", *arguments, "max_new_tokens=20")
    assert again.code == 1 and len(lines(done.folder)) == 3


@needs_documented
def test_positions_in_a_table_are_not_exceeded(arguments: list[str], tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    assert [limit.tokens for limit in table_limits(model)] == [128]
    save(model, tmp_path / "model")
    for setting in ([], ["model.context_length=4096"]):  # a setting makes the table no longer
        refused = call("run", *arguments, *setting, "model.max_prompt_tokens=120", "max_new_tokens=9")
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert "table of 128 positions" in refused.err and "model.max_prompt_tokens=119 or less" in refused.err
    assert call("run", *arguments, "model.max_prompt_tokens=120", "max_new_tokens=8").code == 0


def test_rotary_positions_beyond_the_context_are_said(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tiny("llama", max_position_embeddings=100), tmp_path / "model")
    limits = ["model.max_prompt_tokens=95", "max_new_tokens=10", "model.stop_tokens=[]"]
    done = call("run", *arguments, *limits)
    assert done.code == 0 and "105 positions, the model was made for 100" in caplog.text
    assert metrics(done.folder)["comparability"]["beyond_context"] is True
    for record in lines(done.folder):
        beyond = record["prompt_tokens"] + record["new_tokens"] - 100
        assert record.get("beyond_context") == (beyond if beyond > 0 else None)
    assert any("beyond_context" in record for record in lines(done.folder))
    caplog.clear()
    fits = call("run", *arguments, "model.max_prompt_tokens=90", "max_new_tokens=10", "overwrite=true")
    assert "positions" not in caplog.text and "beyond_context" not in metrics(fits.folder)["comparability"]


def test_a_multimodal_config_runs_as_its_text_model(arguments: list[str], tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text",
        **SHAPE,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4096,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102, "mm_tokens_per_image": 4}
    whole = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, **images
    )
    model = AutoModelForCausalLM.from_config(whole, dtype=torch.float32).eval()
    assert [limit.tokens for limit in TextLengths.of(model).limits] == [4096]  # not the 4 patches of an image
    save(model, tmp_path / "model")
    done = call("run", *arguments, "max_new_tokens=5", "policy=h2o", "budget=30")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "gemma3"
    loaded = load_model({"path": str(tmp_path / "model"), "chat": False})
    assert (loaded.vocab_size, loaded.context_length) == (128, 4096)
    expected = generated(loaded.model, 20, 6)
    assert next(Engine(loaded.model).run([Job(ask(20, 6), [FULL])])).tokens == expected


@needs_documented
def test_layers_of_one_shape_in_a_config_per_layer(arguments: list[str], tmp_path: Path) -> None:
    """Gemma 4's config refuses to name one head size, even where all layers have the same."""
    save(build("gemma4_text", **GEMMA4, global_head_dim=16), tmp_path / "model")
    done = call("run", *arguments, "max_new_tokens=5", "policy=h2o", "budget=30")
    assert done.code == 0, done.err
