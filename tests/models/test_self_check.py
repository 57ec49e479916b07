"""The full cache against the plain model: once per model, remembered, and loud when they differ."""

from pathlib import Path
from typing import Any

import pytest
import torch

from src.errors import InputError
from src.models import self_check
from src.models.load import load_model
from src.models.self_check import check_once, fingerprint
from tests.support.tiny import tiny, tiny_tokenizer, tokens


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Model types that were compared, in order."""
    found: list[str] = []
    real = self_check.compare_with_plain

    def noting(model: Any) -> None:
        found.append(model.config.model_type)
        real(model)

    monkeypatch.setattr(self_check, "compare_with_plain", noting)
    return found


def break_attention(model: Any, layer: int) -> None:
    """A layer that treats its queries otherwise when the engine calls it: what a new version might bring."""
    module = model.model.layers[layer].self_attn
    plain = module.q_proj.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        query: torch.Tensor = plain(hidden)
        return query if module.config._attn_implementation == "sdpa" else 1.01 * query

    module.q_proj.forward = forward


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_models_pass_and_are_left_as_they_were(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(arch, dtype=dtype)
    before, text = model.config._attn_implementation, tokens(12)
    expected = model(text).logits
    check_once(model, tmp_path)
    assert model.config._attn_implementation == before
    assert torch.equal(model(text).logits, expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_difference_names_the_first_layer_and_its_kind(layer: int, tmp_path: Path) -> None:
    model = tiny("qwen2")
    break_attention(model, layer)
    with pytest.raises(InputError) as error:
        check_once(model, tmp_path)
    message = str(error.value)
    assert f"attention layer {layer} (full_attention, Qwen2Attention)" in message
    assert "qwen2" in message and "valid" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []  # not remembered
    assert model.config._attn_implementation == "sdpa"
    check_once(model, tmp_path, compare=False)


def test_bfloat16_forgives_rounding_only(tmp_path: Path) -> None:
    model: Any = tiny("llama", dtype=torch.bfloat16)
    break_attention(model, 0)  # one per cent is about what bfloat16 rounds
    check_once(model, tmp_path)
    module = model.model.layers[0].self_attn
    plain = module.v_proj.forward
    module.v_proj.forward = lambda h: plain(h) * (1 if module.config._attn_implementation == "sdpa" else 2)
    with pytest.raises(InputError, match="attention layer 0"):
        check_once(model, tmp_path / "other")


def test_a_passed_check_is_remembered(compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        check_once(tiny("llama"), tmp_path)
    assert compared == ["llama"]
    check_once(tiny("llama", seed=1), tmp_path)  # other weights
    check_once(tiny("llama", dtype=torch.bfloat16), tmp_path)
    check_once(tiny("llama", rms_norm_eps=1e-5), tmp_path)
    monkeypatch.setattr(self_check.transformers, "__version__", "99.0")  # the one it asks
    check_once(tiny("llama"), tmp_path)
    assert compared == ["llama"] * 5
    check_once(tiny("llama"), Path("/dev/null/no"))  # a place that cannot be written costs the memory only
    assert compared == ["llama"] * 6


def test_the_setting_switches_it_off(compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    load_model({"path": str(tmp_path / "model"), "self_check": False})
    assert compared == [] and not (tmp_path / "cache").exists()
    loaded = load_model({"path": str(tmp_path / "model")})
    assert compared == ["llama"]
    remembered = list((tmp_path / "cache" / "kv-eviction-bench" / "self-check").iterdir())
    assert [path.name for path in remembered] == [fingerprint(loaded.model)]


def test_a_model_that_fails_on_plain_text_is_one_line(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.model.norm.forward = lambda hidden: hidden["nonsense"]
    with pytest.raises(InputError, match=r"model type llama fails on a few tokens \(") as error:
        check_once(model, tmp_path)
    assert "\n" not in str(error.value)


def test_numbers_that_are_none_are_said(tmp_path: Path) -> None:
    model = tiny("llama")
    model.get_parameter("model.layers.1.self_attn.k_proj.weight")[0, 0] = torch.nan
    with pytest.raises(InputError, match="not numbers"):
        check_once(model, tmp_path)
