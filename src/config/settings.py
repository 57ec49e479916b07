"""Every setting of every command, typed: a composed configuration becomes a frozen dataclass, here and nowhere else.

What a type does not say about a value (bounds, choices, what null means) stands in the annotation beside it
(`src.kv.checks`). Asked before anything is loaded, so that a typo costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from evals.metrics import EDIT_SIMILARITIES
from evals.suites import BROKEN_ROWS, check_choice
from src.errors import InputError
from src.kv.budget import Budget, parse_budget
from src.kv.checks import SECONDS, Rule, check_fields, one_of, rules, text, texts, whole
from src.models.settings import ModelSettings
from src.retention.store import MODES as RETENTION
from src.tracking.wandb import MODES as WANDB

BENCH_PARTS = ("prefill", "decode", "grid", "bytes", "peak", "peers", "overlap")
PARTS = Rule(
    lambda value: isinstance(value, list) and bool(value) and all(part in BENCH_PARTS for part in value),
    f"a list of {', '.join(BENCH_PARTS)}",
)
LENGTHS = Rule(
    lambda value: isinstance(value, list) and bool(value) and all(type(n) is int and n >= 2 for n in value),
    "a list of token counts, e.g. [1024,4096]",
)
PROCESSES = Rule(lambda value: type(value) is int and value != 0, "a number of processes, or -1: one per core")


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """A file of conf/tasks.

    Attributes:
        options: the suite's own further settings.
    """

    suite: str
    names: Annotated[list[str] | None, texts("all of the suite")]
    data_dir: Annotated[str | None, text("the suite's own place")]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        check_fields(self, "tasks.")
        check_choice(str(self.suite), self.names, self.options)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TaskSettings:
        own = ("suite", "names", "data_dir")
        options = {str(name): value for name, value in given.items() if name not in own}
        return cls(**{name: given.get(name) for name in own}, options=options)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """`wandb` in conf/common.yaml."""

    mode: Annotated[str, one_of(WANDB)]
    project: Annotated[str | None, text("the key's default")]
    entity: Annotated[str | None, text("the key's default")]
    group: Annotated[str | None, text("none")]
    tags: Annotated[list[str], texts()]
    init_timeout: Annotated[float, SECONDS]
    finish_timeout: Annotated[float, SECONDS]
    identify: bool
    table_rows: Annotated[int, whole(0)]

    def __post_init__(self) -> None:
        check_fields(self, "wandb.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> WandbSettings:
        found = chosen(cls, given, "wandb.")
        for name in given:
            if name not in found:
                raise InputError(f"wandb.{name}: no setting named {name!r}; valid in wandb: {', '.join(sorted(found))}")
        return cls(**found)


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What a run and a sweep have in common: a model, tasks, and conf/common.yaml.

    Attributes:
        composed: all of it as plain values, in the files' order and with keys that have no field: for config.yaml.
    """

    model: ModelSettings
    tasks: TaskSettings
    wandb: WandbSettings
    limit: Annotated[int | None, whole(1, "every sample")]
    seed: Annotated[int, whole()]
    prompt_scope: Literal["whole", "context"]
    fidelity: bool
    max_new_tokens: Annotated[int | None, whole(1, "what each task says")]
    min_new_tokens: Annotated[int | None, whole(0, "what each task says")]
    edit_similarity: Annotated[str, one_of(EDIT_SIMILARITIES)]
    broken_rows: Annotated[str, one_of(BROKEN_ROWS)]
    retention: Annotated[str, one_of(RETENTION)]
    kept_over_time: Annotated[int, whole(0)]
    output_root: Annotated[str, text()]
    overwrite: bool
    composed: dict[str, Any] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)

    def config_yaml(self, policy: Mapping[str, Any], budget: Any) -> str:
        """A cell's config.yaml: what a run of it alone is given, whatever grid it was part of."""
        grid = ("policies", "budgets", "max_lanes")
        config = {name: value for name, value in self.composed.items() if name not in grid}
        return OmegaConf.to_yaml(OmegaConf.create(config | {"policy": dict(policy), "budget": budget}))


@dataclass(frozen=True, kw_only=True)
class RunSettings(SessionSettings):
    """conf/config.yaml; the policy with `name` and `_target_`."""

    policy: dict[str, Any]
    budget: Budget
    lanes: Annotated[int, whole(1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if "policies" in self.composed:  # an experiment made for sweeps; a single cell of it would pass for all
            raise InputError(
                f"policies={self.composed['policies']}: a run has one policy; "
                "valid: python -m src.sweep with the same settings"
            )


@dataclass(frozen=True, kw_only=True)
class SweepSettings(SessionSettings):
    """conf/sweep.yaml; what policies and budgets may be is checked where the grid is made of them."""

    policies: list[Any]
    budgets: list[Any]
    max_lanes: Annotated[int, whole(1)]


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """conf/bench.yaml."""

    model: ModelSettings
    parts: Annotated[list[str], PARTS]
    policies: list[Any]
    budgets: list[Any]
    prompt_tokens: Annotated[list[int], LENGTHS]
    new_tokens: Annotated[int, whole(2)]
    grid_tokens: Annotated[int, whole(2)]
    grid_prompts: Annotated[int, whole(1)]
    max_lanes: Annotated[int, whole(1)]
    repeats: Annotated[int, whole(1)]
    peer_python: str
    overlap_tokens: Annotated[list[int], LENGTHS]
    overlap_budgets: Annotated[list[int], LENGTHS]
    longbench_dir: Annotated[str | None, text("the generated pocket prompts")]
    output_root: Annotated[str, text()]

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """conf/calibrate.yaml."""

    model: ModelSettings
    groups: Annotated[int, whole(1)]
    centroids: Annotated[int, whole(2)]
    samples: Annotated[int, whole(1)]
    sample_tokens: Annotated[int, whole(1)]
    seed: Annotated[int, whole()]
    jobs: Annotated[int, PROCESSES]
    output: Annotated[str | None, text("the cache folder")]
    overwrite: bool

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed}: valid: 0 to {2**32 - 1}")
        most = min(self.samples * self.sample_tokens, 2**15)
        if self.centroids > most:
            raise InputError(f"centroids={self.centroids}: valid: 2 to {most} (sampled tokens, 15 bits)")


STAGES: dict[str, type[Any]] = {
    "config": RunSettings,
    "sweep": SweepSettings,
    "bench": BenchSettings,
    "calibrate": CalibrateSettings,
}
GROUPS: dict[str, type[Any]] = {"model": ModelSettings, "tasks": TaskSettings, "wandb": WandbSettings}
MAKE: dict[str, Callable[[Any], Any]] = {name: kind.of for name, kind in GROUPS.items()} | {"budget": parse_budget}


def read_settings(config_name: str, cfg: DictConfig) -> Any:
    """The settings of a command out of its composed configuration.

    Returns:
        What `STAGES` has under the configuration's name.

    Raises:
        InputError, DataError: the first setting that is not of its kind: its name, its value and what would be valid.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    kind = STAGES[config_name]
    for group in [setting.name for setting in fields(kind) if setting.name in ("policy", *GROUPS)]:
        if not isinstance(plain.get(group), dict):
            raise InputError(f"{group}={plain.get(group, 'null')}: valid: a name of the group; see --help")
    found = chosen(kind, {"composed": plain, **plain})
    return kind(**{name: MAKE[name](value) if name in MAKE else value for name, value in found.items()})


def chosen(kind: type[Any], given: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Of what is given the fields of a dataclass."""
    found = {}
    for setting in fields(kind):
        if setting.name not in given:
            raise InputError(f"{group}{setting.name}: not there; valid: see --help")
        found[setting.name] = given[setting.name]
    if found.get("retention") is False:
        found["retention"] = "off"  # as YAML reads a bare `off`
    return found


def wanted(name: str) -> str:
    """What would be valid for a setting, by the name that a command writes; empty: nothing is asked of it here."""
    group, _, key = name.rpartition(".")
    kinds = [GROUPS[group]] if group in GROUPS else [] if group else STAGES.values()
    found = [rule for kind in kinds if (rule := rules(kind).get(key))]
    return found[0].wanted if found else ""
