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
# # 2. Which part of AhaKV does the work?
#
# Each of the three parts off, and each of the eight switches that the reconstruction had to guess, one at a time
# (`policies/ahakv.py` says what they mean). Every row is paired with plain `ahakv` on the same samples.
#
# All rows are our reconstruction: the formulas come from two third-party summaries, the paper's body could not be read.
# On the committed tables the parts are **undecided**: plain `ahakv` stands where a random choice stands, and most
# variants differ from it by exactly 0.0 points. An interval of no width there is no evidence that a part does nothing.
#
# Its data: `python -m src.sweep experiment=ahakv_ablation tasks=pocket`, else the committed study tables.

# %%
import sys

sys.path.insert(0, "..")

import matplotlib.pyplot as plt
import numpy as np

from src.study import lab
from src.study.theory import row_entropy

ROOT = None  # a folder with ahakv_ablation/ in it; None: ../results
BUDGET = None  # needed when the study has several

lab.greyscale()
tables = lab.at_budget(lab.load("ahakv_ablation", ROOT, baseline="ahakv"), BUDGET)
lab.need(tables, "ahakv")

# %% [markdown]
# ## Differences to plain AhaKV
# Left: KL to the full cache on the reference answer, below 0 is better than AhaKV. Right: score, above 0 is better.


# %%
def paired(name: str):
    return tables.differences[tables.differences["measure"] == name].set_index("label")


kl, score = paired("kl"), paired("score")
order = kl.sort_values("difference").index
n = int(score["n"].max())
figure, panels = plt.subplots(1, 2, figsize=(8.5, 0.8 + 0.24 * len(order)), sharey=True)
for axes, frame, what in zip(panels, (kl, score), ("KL(full || policy), nats", "score, points"), strict=True):
    lab.dots(axes, order, frame, "difference", "low", "high")
    axes.axvline(0, color="0.0", linestyle=":")
    axes.set_xlabel(f"difference to ahakv: {what}")
figure.suptitle(f"budget {tables.budgets[0]:g}, 95 % intervals, paired; {tables.facts(n)}", fontsize=9)
lab.save(figure, "differences")

# %%
columns = ["n", "score", "score_low", "score_high", "kl", "nll", "top1"]
tables.all_tasks.set_index("label")[columns].sort_values("kl").round(3)

# %% [markdown]
# ## The three parts
# A difference of exactly 0 at the floor decides nothing.
# The paper's order of importance is value prior (1.46 points), recent accumulation (1.26), step gain (0.83).

# %%
for part in ("recent_accumulation", "step_gain", "value_prior"):
    label = f"ahakv {part}=false"
    if label in score.index:
        row, fidelity = score.loc[label], kl.loc[label] if label in kl.index else None
        # What is lost without the part: plain AhaKV minus the variant, so the signs turn round.
        holds = lab.apart(-row["high"], -row["low"], 0, 0)
        also = "" if fidelity is None else f"; KL without it {fidelity['difference']:+.3f}"
        interval = f"{0 - row['high']:.2f} to {0 - row['low']:.2f}"
        print(lab.verdict(f"{part} helps", holds, f"{0 - row['difference']:+.2f} points, 95 % {interval}{also}"))

# %% [markdown]
# ## Does the gain do what it promises?
# The step gain is made so that a row's entropy is that of an even spread over the budget, $\ln k$. On Gaussian
# logits it is, nearly; logits of a real model have another variance (`logit_variance` above).

# %%
rows = [row_entropy(4096, k, queries=32) for k in (64, 128, 256, 512, 1024, 2048)]
budgets = [row.budget for row in rows]
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(budgets, [row.ordinary for row in rows], "s--", color="0.6", label="ordinary softmax")
axes.plot(budgets, [row.sharpened for row in rows], "o-", color="0.0", label="with the step gain")
axes.plot(budgets, np.log(budgets), ":", color="0.0", label=r"target $\ln k$")
axes.set_xscale("log", base=2)
axes.set(xlabel="budget k (entries)", ylabel="entropy of a row (nats)")
axes.set_title("no model: 32 Gaussian queries over n = 4,096 keys")
axes.legend(frameon=False)
lab.save(figure, "entropy")
