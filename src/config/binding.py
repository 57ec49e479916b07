"""Policies meet the model: asked once, before anything runs (`Policy.bind`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from policies.base import Policy
from src.config.cells import CellConfig
from src.engine.layer_kinds import first_layer
from src.engine.request import Variant
from src.errors import InputError
from src.kv.contract import RAISED, ContractError, beyond_policy, check_measures, fault, show
from src.kv.state import ModelShape
from src.models.digest import digest
from src.models.load import LoadedModel


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
    )


def bind(cells: Sequence[CellConfig], model: LoadedModel) -> list[CellConfig]:
    """The cells with policies that know the model; what they found outside their settings is noted.

    Raises:
        InputError: a policy that does not go with the model.
    """
    shape, bound = shape_of(model), []
    for cell in cells:
        hook = "bind"
        try:
            policy = cell.variant.policy.bind(shape)
            if not isinstance(policy, Policy):
                raise ContractError(f"gave {show(policy)}; expected a Policy")
            hook = "fingerprint"
            found = check_measures(policy.fingerprint())
            json.dumps(found, allow_nan=False)
        except InputError:
            raise
        except RAISED as error:
            if beyond_policy(error):
                raise
            usual = hook == "bind" and type(error) is ValueError  # what `bind` is told to raise
            why = str(error) if usual else fault(cell.variant.policy, hook, None, error)
            raise InputError(f"policy={cell.label}: {why}") from None
        bound.append(replace(cell, variant=Variant(policy, cell.variant.budget), found=found))
    return bound
