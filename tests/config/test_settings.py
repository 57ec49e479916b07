"""Settings are typed: every key of conf/ has a field and every field a key, and a value is checked where it is made."""

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from evals.errors import DataError
from evals.suites import SUITES
from policies import base
from src.config import compose as composed
from src.config.settings import GROUPS, STAGES, ModelSettings, RunSettings, TaskSettings, read_settings, wanted
from src.errors import InputError
from src.kv.budget import SplitBudget
from src.kv.checks import check
from src.session import session

NOT_KEYS = {"composed", "options"}  # fields that hold what is given as a whole, and keys that only one suite has


def config(stage: str, *overrides: str) -> Any:
    with composed.composing():
        return composed.compose(stage, overrides=list(overrides))


def settings(stage: str, *overrides: str) -> Any:
    return read_settings(stage, config(stage, *overrides))


def field_names(kind: type[Any]) -> set[str]:
    return {setting.name for setting in fields(kind)} - NOT_KEYS


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_command_has_a_field_and_the_other_way_round(stage: str) -> None:
    cfg = config(stage)
    assert set(cfg) - {"cluster"} == field_names(STAGES[stage])  # an empty group: what it chooses is hydra.launcher
    made = read_settings(stage, cfg)
    assert isinstance(made, STAGES[stage])
    for group, kind in GROUPS.items():
        if group in cfg:
            assert isinstance(getattr(made, group), kind)
            assert set(cfg[group]) == field_names(kind)


@pytest.mark.parametrize("path", sorted((composed.CONF / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_suite_is_one_of_its_options(path: Path) -> None:
    file, options = yaml.safe_load(path.read_text()), set(SUITES[path.stem].options)
    assert set(file) - {"defaults"} <= field_names(TaskSettings) | options
    composition = config("config", f"tasks={path.stem}").tasks  # with the file that it builds on
    assert {str(key) for key in composition} == field_names(TaskSettings) | options
    made = settings("config", f"tasks={path.stem}").tasks
    assert set(made.options) == options and made.suite == path.stem


@pytest.mark.parametrize("path", sorted((composed.CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_model_has_a_field(path: Path) -> None:
    keys = set(yaml.safe_load(path.read_text())) - {"defaults"}
    assert keys <= field_names(ModelSettings) and (path.stem != "_base" or keys == field_names(ModelSettings))


def test_values_are_what_their_types_say() -> None:
    made = settings("config", "retention=off", "model.thinking=off", "budget={prompt: 0.5, decode: 64}", "seed=3")
    assert (made.retention, made.model.thinking) == ("off", "off")  # YAML reads a bare `off` as false
    assert made.budget == SplitBudget(0.5, 64) and made.seed == 3
    assert type(made.model.stop_tokens) is list and type(made.wandb.tags) is list and type(made.policy) is dict
    assert settings("config", "policy=random", "seed=5").policy["seed"] == 5
    with pytest.raises(FrozenInstanceError):
        made.seed = 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 0}, "limit=0: valid: a whole number, 1 or more, or null: every sample"),
        ({"fidelity": 3}, "fidelity=3: valid: true, false"),
        ({"prompt_scope": "foo"}, "prompt_scope=foo: valid: whole, context"),
        ({"kept_over_time": True}, "kept_over_time=true: valid: a whole number, 0 or more"),
        ({"lanes": None}, "lanes=null: valid: a whole number, 1 or more"),
    ],
)
def test_no_wrong_value_is_ever_held(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(settings("config"), **changes)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "int8"}, "model.dtype=int8: valid are auto, float32, bfloat16, float16"),
        ({"layers": 2}, "model.layers=2: only with model=random; valid: null"),
        ({"like": "llama3-8b", "layers": 99}, "model.layers=99: valid are 1 to 32, or null for all of them"),
        ({"stop_tokens": "</s>"}, "model.stop_tokens=</s>: valid: a list of names, e.g. [first,second]"),
        ({"context_length": 1}, "model.context_length=1: valid: a whole number, 2 or more, or null: what the model's"),
    ],
)
def test_a_model_is_checked_before_anything_is_loaded(given: dict[str, Any], said: str) -> None:
    """Also where a script gives a plain mapping, without Hydra."""
    with pytest.raises(InputError) as caught:
        ModelSettings.of({"path": "/some/model", **given})
    assert str(caught.value).startswith(said)


def test_tasks_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(DataError, match=r"tasks\.names=foo: no task of suite pocket"):
        TaskSettings(suite="pocket", names=["foo"], data_dir=None, options={})
    with pytest.raises(DataError, match=r"tasks\.config_url: no setting of suite longgenbench"):
        TaskSettings.of({"suite": "longgenbench", "config_url": "x"})


def test_a_policys_settings_and_a_commands_are_checked_by_one_function() -> None:
    assert base.check is check
    assert get_type_hints(RunSettings)["limit"] == int | None
    assert wanted("model.chat") == wanted("fidelity") == "true, false"
    assert wanted("wandb.table_rows") == "a whole number, 0 or more"
    assert wanted("parts").startswith("a list of prefill") and wanted("centroids") == "a whole number, 2 or more"
    assert wanted("budgt") == wanted("hydra.mode") == wanted("policy") == ""


def test_a_setting_that_wandb_does_not_have_is_one_line() -> None:
    with pytest.raises(InputError, match=r"wandb\.x: no setting named 'x'; valid in wandb: entity, finish_timeout"):
        settings("config", "+wandb.x=1")


def test_config_yaml_is_what_a_run_alone_is_given() -> None:
    """A sweep's cell writes what a run of it does, and a key that no command knows stays."""
    run = settings("config", "policy=h2o", "budget=40", "+note=mine")
    swept = settings("sweep", "+note=mine")
    written = [yaml.safe_load(made.config_yaml({"name": "h2o", "heavy_share": 0.5}, 40)) for made in (run, swept)]
    assert written[0].pop("lanes") == 8
    assert written[0].pop("broken_rows") == "refuse" and written[1].pop("broken_rows") == "record"
    assert written[0] == written[1] and written[0]["note"] == "mine" and "hydra" not in written[0]


def test_nothing_below_the_configuration_sees_hydras_own_types() -> None:
    rooms = [Path(session.__file__).parents[1] / name for name in ("session", "models", "bench", "tracking", "engine")]
    files = [path for room in rooms for path in room.glob("*.py")] + [
        Path(session.__file__).parents[1] / "calibrate.py"
    ]
    assert len(files) > 30
    assert not [path.name for path in files if "omegaconf" in path.read_text()]
