"""Codebooks: fitted, stored, found again, and refused where they belong to another model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from policies.hcattention import HCAttention
from src import calibrate
from src.config.binding import bind, shape_of
from src.config.cells import CellConfig
from src.config.settings import read_settings
from src.engine.request import Variant
from src.errors import InputError
from src.files import cache_folder
from src.kv.codebooks import default_path, load_codebooks, save_codebooks
from src.kv.product import encode
from src.kv.state import ModelShape
from src.models.codebooks import fit_codebooks, sample_keys
from tests.support import naive
from tests.support.tiny import tiny, tiny_loaded, tokens

one_thread = pytest.fixture(scope="module", autouse=True)(naive.one_thread)

SHAPE = ModelShape("tiny", 2, 2, 16, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def saved(path: Path, shape: ModelShape = SHAPE, groups: int = 4, centroids: int = 8) -> Path:
    size = (shape.layers, shape.kv_heads, groups, centroids, shape.head_dim // groups)
    save_codebooks(path, torch.randn(size, generator=torch.Generator().manual_seed(0)), shape)
    return path


def test_sampled_keys_are_the_cached_ones() -> None:
    """After the rotary embedding, of every layer and KV head, texts one after the other."""
    model = tiny("llama")
    ids = tokens(30)[0].tolist()
    keys = sample_keys(model, [ids, ids[:7]])
    assert [tuple(layer.shape) for layer in keys] == [(2, 37, 16)] * 2
    assert torch.equal(keys[0][:, :7], keys[0][:, 30:])
    model.set_attn_implementation("sdpa")
    reference = model(torch.tensor([ids]), use_cache=True).past_key_values
    for layer, mine in enumerate(keys):
        assert torch.allclose(reference.layers[layer].keys[0], mine[:, :30], atol=1e-6)


def test_a_fit_is_a_codebook_per_layer_head_and_group() -> None:
    draw = torch.Generator().manual_seed(1)
    keys = [torch.randn(2, 400, 16, generator=draw) for _ in range(3)]
    fitted = fit_codebooks(keys, groups=4, centroids=16, seed=0)
    assert fitted.shape == (3, 2, 4, 16, 4)
    assert torch.equal(fitted, fit_codebooks(keys, 4, 16, seed=0))
    for layer in range(3):  # far better than the mean alone, and each part better with its own than with another's
        codes = encode(keys[layer][None], fitted[layer])[0]
        for head in range(2):
            for part in range(4):
                points = keys[layer][head].unflatten(-1, (4, 4))[:, part]
                error = (points - fitted[layer, head, part][codes[head, :, part]]).square().sum(-1).mean()
                assert error < 0.6 * points.var(dim=0).sum()


def test_stored_with_what_they_are_for(tmp_path: Path) -> None:
    path = default_path("tiny", 4, 8)
    assert tmp_path in path.parents
    saved(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            **{"model": "tiny", "layers": "2", "kv_heads": "2", "head_dim": "16"},
            **{"weights": "", "groups": "4", "centroids": "8", "dtype": "float32"},
        }
    found = load_codebooks(None, SHAPE, 4, 8)
    assert found.centroids.shape == (2, 2, 4, 8, 4)
    assert load_codebooks(str(path), SHAPE, 4, 8).digest == found.digest
    half = load_codebooks(None, ModelShape("tiny", 2, 2, 16, torch.bfloat16, torch.device("cpu")), 4, 8)
    assert half.centroids.dtype == torch.bfloat16
    save_codebooks(path, torch.zeros(2, 2, 4, 8, 4), SHAPE)  # a file written anew is read anew
    assert load_codebooks(None, SHAPE, 4, 8).digest != found.digest


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"name": "llama3-8b"}, "model=llama3-8b, this run has model=tiny"),
        ({"head_dim": 32}, "head_dim=32, this run has head_dim=16"),
        ({"layers": 5}, "layers=5, this run has layers=2"),
        ({"kv_heads": 1}, "kv_heads=1, this run has kv_heads=2"),
        ({"weights": "other"}, "weights=other, this run has weights="),
    ],
)
def test_of_another_model(tmp_path: Path, other: dict[str, Any], names: str) -> None:
    path = saved(tmp_path / "x.safetensors", ModelShape(**{**vars(SHAPE), **other}))
    with pytest.raises(InputError, match=f"codebooks={path}.*{names}.*valid: .*src.calibrate"):
        HCAttention(groups=4, centroids=8, codebooks=str(path)).bind(SHAPE)


def test_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no codebooks at .*python -m src.calibrate model=tiny groups=4 centroids=8"):
        load_codebooks(None, SHAPE, 4, 8)
    path = saved(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="groups=4, this run has groups=8"):
        load_codebooks(str(path), SHAPE, 8, 8)
    (tmp_path / "broken").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="not a codebook file"):
        load_codebooks(str(tmp_path / "broken"), SHAPE, 4, 8)
    cell = CellConfig("hcattention", {}, Variant(HCAttention(groups=5), None))
    with pytest.raises(InputError, match="policy=hcattention: groups=5: does not divide the head size 16; valid: 1, 2"):
        bind([cell], tiny_loaded())


def test_their_digest_names_the_results() -> None:
    loaded = tiny_loaded()
    shape = shape_of(loaded)
    assert (shape.name, shape.layers, shape.kv_heads, shape.head_dim) == ("tiny-llama", 2, 2, 16)
    saved(default_path("tiny-llama", 4, 8), shape)
    cell = CellConfig("hcattention", {"name": "hcattention"}, Variant(HCAttention(groups=4, centroids=8), None))
    (bound,) = bind([cell], loaded)
    assert bound.settings == {"name": "hcattention"} and set(bound.found) == {"codebooks_digest"}
    assert bound.variant.policy.loaded is not None  # type: ignore[attr-defined]
    exact = CellConfig("hcattention", {}, Variant(HCAttention(quantise_keys=False), None))
    assert bind([exact], loaded)[0].found == {}


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    monkeypatch.setattr("src.models.load.load_model", lambda cfg: loaded)
    assert calibrate.make(small()) == 0
    assert str(default_path("tiny-llama", 8, 16)) in capsys.readouterr().out
    assert load_codebooks(None, shape_of(loaded), 8, 16).centroids.shape == (2, 2, 8, 16, 2)
    assert calibrate.make(small()) == 0 and "there already" in capsys.readouterr().out
    with torch.no_grad():
        next(loaded.model.parameters())[0, 0] += 1  # another checkpoint of the same name: the advice must help
    with pytest.raises(InputError, match="weights="):
        load_codebooks(None, shape_of(loaded), 8, 16)
    assert calibrate.make(small()) == 0 and "there already" not in capsys.readouterr().out
    assert load_codebooks(None, shape_of(loaded), 8, 16).centroids.shape == (2, 2, 8, 16, 2)
    for setting, value in (("groups", 5), ("centroids", 301), ("centroids", 1)):
        with pytest.raises(InputError, match=f"{setting}={value}.*valid: "):
            calibrate.make(small(**{setting: value}))


def test_another_checkpoint_of_the_same_name_and_shape_is_another_model() -> None:
    first, second = tiny_loaded(), tiny_loaded()
    assert shape_of(first) == shape_of(second)
    with torch.no_grad():
        next(second.model.parameters())[0, 0] += 1
    assert shape_of(first).weights != shape_of(second).weights
    in_float32 = shape_of(second).weights
    second.model.to(torch.bfloat16)
    assert shape_of(second).weights == in_float32


def test_a_models_name_stays_in_the_cache_folder(cache: Path) -> None:
    home = cache_folder() / "codebooks"
    names = ["../../x", "/etc/x", "..", "", "a/b", "a_b", "a b", "x", "m" * 400, "m" * 401, "a\nb", "\x1b[31m"]
    paths = [default_path(name, 4, 8) for name in names]
    assert all(path.parent == home and path.resolve().parent == home.resolve() for path in paths)
    assert len({*paths}) == len(names) and all(len(path.name) < 150 for path in paths)
    assert default_path("smollm2-135m", 4, 8).name == "smollm2-135m-g4-c8.safetensors"


def small(**more: Any) -> Any:
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(calibrate.__file__.replace("src/calibrate.py", "conf/calibrate.yaml"))
    given = {"model": {}, "groups": 8, "centroids": 16, "sample_tokens": 100, "jobs": 1, **more}
    return read_settings("calibrate", OmegaConf.merge(cfg, given))  # type: ignore[arg-type]


def test_where_nothing_can_be_written_is_said_before_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.models.load.load_model", lambda cfg: tiny_loaded())
    monkeypatch.setattr("src.models.codebooks.sample_keys", lambda *_: pytest.fail("the fit has begun"))
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "x", tmp_path, Path("/proc/no/x"), tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=r"output=.*valid: ") as caught:
            calibrate.make(small(output=str(output), overwrite=True))
        assert "\n" not in str(caught.value)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(InputError, match="No space left on device"):
            calibrate.make(small())
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=f"seed={seed}: valid: 0 to 4294967295"):
            calibrate.make(small(seed=seed))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file"]


def test_a_disk_that_fills_up_during_the_fit_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("src.kv.codebooks.save_file", full)
    with pytest.raises(InputError, match=r"output=.*No space left on device.*valid: "):
        saved(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_keys_that_are_not_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    with torch.no_grad():
        loaded.model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    monkeypatch.setattr("src.models.load.load_model", lambda cfg: loaded)
    with pytest.raises(InputError, match="not all finite"):
        calibrate.make(small())


def test_a_group_that_this_command_lacks_is_one_line() -> None:
    from tests.support.cli import call

    done = call("calibrate", "policy=h2o")
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith("error: policy: no setting named 'policy'; valid: centroids, groups, jobs, model")
