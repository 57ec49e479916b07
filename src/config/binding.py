"""Policies meet the model: asked once, before anything runs (`Policy.bind`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from policies.base import Policy
from src.config.cells import CellConfig
from src.engine.cut import allotment
from src.engine.layer_kinds import first_layer
from src.engine.request import Variant
from src.errors import InputError
from src.kv.contract import check_measures
from src.kv.faults import ContractError, Fault, ask, show
from src.kv.state import ModelShape
from src.models.digest import digest
from src.models.load import LoadedModel

LONG = 1 << 30  # tokens of a prompt that no budget holds


def shape_of(model: LoadedModel) -> ModelShape:
    """What a policy may know about a model."""
    config = first_layer(model.model.config)
    heads = config.num_attention_heads
    return ModelShape(
        name=model.name,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        device=model.device,
        weights=digest(model.model),
        encode=model.encode,
        turn=model.turn_ids,
    )


def bind(cells: Sequence[CellConfig], model: LoadedModel) -> list[CellConfig]:
    """The cells with policies that know the model; what they found outside their settings is noted.

    Raises:
        InputError: a policy that does not go with the model.
    """
    shape, bound = shape_of(model), []
    for cell in cells:
        given = cell.variant.policy
        try:
            policy = ask(given, "bind", None, bound_to, shape, given, cell.label)
            ask(policy, "bind", None, check_parts, shape, policy, cell)
            found = ask(given, "fingerprint", None, fingerprint, policy)
        except Fault as fault:
            raise InputError(f"policy={cell.label}: {fault}") from None
        bound.append(replace(cell, variant=Variant(policy, cell.variant.budget), found=found))
    return bound


def bound_to(shape: ModelShape, policy: Policy, label: str) -> Policy:
    """`Policy.bind`, which is told to raise a plain ValueError where policy and model do not go together."""
    try:
        bound = policy.bind(shape)
    except ValueError as error:
        if type(error) is not ValueError:  # somebody else's, e.g. of a text that is no JSON
            raise
        raise InputError(f"policy={label}: {error}") from None
    if not isinstance(bound, Policy):
        raise ContractError(f"gave {show(bound)}; expected a Policy")
    return bound


def check_parts(shape: ModelShape, policy: Policy, cell: CellConfig) -> None:
    """A store that cannot hold the model's keys, or a budget that an allocator cannot divide: refused before anything
    runs. A budget that is a share of the prompt is looked at with every prompt.

    Raises:
        InputError: it names the setting and what would be valid.
    """
    budget = cell.variant.budget
    try:
        if policy.store is not None:
            policy.store.check_model(shape)
        if policy.allocate is not None and isinstance(budget, int):
            policy.allocate.plan(allotment(policy, budget, LONG, shape.layers, shape.kv_heads))
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise InputError(f"policy={cell.label}: {error}") from None


def fingerprint(policy: Policy) -> dict[str, Any]:
    """`Policy.fingerprint`, which goes into a JSON file."""
    found = check_measures(policy.fingerprint())
    json.dumps(found, allow_nan=False)
    return found
