# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Add your policy
#
# A policy is one file in `policies/` and one YAML in `conf/policy/`; nothing else changes. Here is one from an empty
# page: keep the sinks, the recent tokens, and of the rest what the last queries look at *most at once* (the largest
# weight instead of the sum), so that a token needed by a single query is not outvoted.

# %%
import sys

sys.path.insert(0, "..")

from dataclasses import dataclass
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from policies.base import ScorePolicy
from policies.h2o import H2O
from policies.snapkv import SnapKV
from src.kv.prompt import PromptAttention
from src.study import lab

lab.greyscale()


# %%
@dataclass(frozen=True)
class Peak(ScorePolicy):
    """Keep what any of the last `window` queries gives its largest weight."""

    window: int = 32
    sinks: int = 4
    group: Literal["mean", "max"] = "mean"

    def recent(self, budget: int) -> int:
        return self.window

    def least_budget(self) -> int:
        return self.window + self.sinks + 1

    def score(self, prompt: PromptAttention, budget: int) -> Tensor:
        peak = prompt.window_weights(self.window).amax(dim=2)  # (kv_heads, group, n)
        score = peak.mean(dim=1) if self.group == "mean" else peak.amax(dim=1)
        score[:, : self.sinks] = torch.inf
        return score


# %% [markdown]
# Try it before any model runs it: random queries and keys, a sink at the first token, sixty tokens that every query
# finds mildly interesting, and one needle that a single query of the window looks for.

# %%
n, dim, needle, budget = 600, 64, 300, 64
draw = torch.Generator().manual_seed(0)
queries, keys, values = (torch.randn(heads, n, dim, generator=draw) for heads in (4, 2, 2))
queries[..., 0], keys[..., 0] = 4, 0  # one direction that all queries share:
keys[:, 0, 0], keys[:, 100:160, 0] = 12, 3  # logits of 4 x 12 / 8 for the sink, 4 x 3 / 8 for the mildly interesting
queries[:, n - 10] += 0.5 * keys.repeat_interleave(2, dim=0)[:, needle]  # one query of the window wants the needle
prompt = PromptAttention(queries, keys, values, dim**-0.5, layer=0, layers=1)

kept = {policy: policy.keep_prompt(prompt, budget) for policy in (Peak(), SnapKV(kernel=1), H2O())}
figure, axes = plt.subplots(figsize=(7, 1.8))
for row, positions in enumerate(kept.values()):
    assert positions.shape == (2, budget)  # kv_heads, k
    axes.plot(positions[0], np.full(budget, row), "|", color="0.0", markersize=12, markeredgewidth=0.8, linestyle="")
    found = "kept" if needle in positions[0] else "lost"
    axes.text(n + 8, row, f"needle {found}", va="center", fontsize=8)
axes.axvline(needle, color="0.5", linestyle=":")
axes.set_yticks(range(len(kept)), [type(policy).__name__ for policy in kept])
axes.set(
    xlabel=f"position (tokens); dotted: the needle; budget {budget} of n = {n}, KV head 0",
    xlim=(-5, n + 90),
    ylim=(-0.6, 2.6),
)
lab.save(figure, "needle")

# %% [markdown]
# ## Make it part of the house
# Save the class as `policies/peak.py` and this as `conf/policy/peak.yaml`:
#
# ```yaml
# # Peak: what any of the last queries gives its largest weight.
# name: peak
# _target_: policies.peak.Peak
# window: 32   # queries looked at = recent tokens kept
# sinks: 4     # first tokens that always stay
# group: mean  # joins the query heads of a KV head: mean | max
# ```
#
# then compare it, over one prefill, with what is there:
#
# ```bash
# python -m src.run policy=peak budget=256 limit=4
# python -m src.sweep policies=[full,snapkv,ahakv,peak] budgets=[128,256] fidelity=true output_root=results/mine
# python -m src.report results/mine
# ```
#
# Scores need no more than `recent` and `score`. To go on evicting while decoding, set `evicts_while_decoding = True`
# and write `start` (what to remember about the kept tokens), `observe` (fold in one step) and `evict` (which slot
# goes); `policies/h2o.py` does it in fifteen lines. Other options of a policy go into a sweep as
# `policies='[snapkv,{name: peak, sinks: 0}]'`, and outside this repository the YAML may lie in a folder of your own:
# `--config-dir my_conf` with `my_conf/policy/peak.yaml`.
