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
# # 3. Budget curves: what a cache of k entries is worth
#
# Every policy over a range of budgets, controls below (`random`, `recent`), an upper bound above (`oracle`).
#
# Its data: `python -m src.sweep experiment=budget_curve tasks=pocket`, else the committed study tables.

# %%
import sys

sys.path.insert(0, "..")

import matplotlib.pyplot as plt
import pandas as pd

from src.study import lab

ROOT = None  # a folder with budget_curve/ in it; None: ../results

lab.greyscale()
tables = lab.load("budget_curve", ROOT)
lab.need(tables, "full", "oracle", "oracle answer=reference")
full = tables.all_tasks[tables.all_tasks["policy"] == "full"]
curves = {
    label: rows.sort_values("budget") for label, rows in tables.all_tasks.dropna(subset="budget").groupby("label")
}

# %%
figure, panels = plt.subplots(1, 2, figsize=(10.5, 4))
for axes, name, what in zip(panels, ("score", "kl"), ("score (0 to 100)", "KL(full || policy) (nats)"), strict=True):
    for label, rows in curves.items():
        (line,) = axes.plot(rows["budget"], rows[name], label=label)
        # Intervals of all would hide each other; these two are enough to judge the rest by.
        if label in ("ahakv", "snapkv"):
            axes.fill_between(rows["budget"], rows[f"{name}_low"], rows[f"{name}_high"], color="0.88", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tables.budgets, [f"{b:g}" for b in tables.budgets])
    axes.set(xlabel="budget (entries per layer and KV head)", ylabel=what)
panels[0].axhline(full["score"].iloc[0], color="0.0", linewidth=1)
panels[0].text(tables.budgets[0], full["score"].iloc[0], "full cache", va="bottom", fontsize=7)
figure.suptitle(f"{tables.facts()}; grey band: 95 % of ahakv and snapkv", fontsize=9)
figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper", fontsize=7, handlelength=3.5)
lab.save(figure, "curves")

# %% [markdown]
# ## What it costs: bytes of keys, values and bookkeeping

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.4))
for label, rows in curves.items():
    axes.plot((rows["kv_bytes"] + rows["bookkeeping_bytes"]) / 2**20, rows["kl"], label=label)
axes.set_xscale("log")
axes.xaxis.set_major_formatter("{x:g}")
axes.xaxis.set_minor_formatter("{x:g}")
axes.set(xlabel="keys, values and bookkeeping after the prompt (MiB)", ylabel="KL(full || policy) (nats)")
axes.set_title(tables.facts(), fontsize=9)
figure.legend(loc="outside right upper", fontsize=7, handlelength=3.5)
lab.save(figure, "bytes")
total = (full["kv_bytes"] + full["bookkeeping_bytes"]).iloc[0] / 2**20
print(f"full cache: {total:.1f} MiB per prompt, {full['bookkeeping_bytes'].iloc[0] / 2**20:.1f} of them bookkeeping")

# %% [markdown]
# ## Is the oracle an upper bound?
# `oracle answer=reference` keeps the prompt tokens that the reference answer attends to, and fidelity is measured on
# that answer: it should be best at every budget. `oracle` looks at the answer that the full cache gives by itself.
# Where that is another answer it bounds something else, so it is compared task by task with how often the full cache
# was right.

# %%
kl = tables.all_tasks.dropna(subset="budget").pivot(index="label", columns="budget", values="kl")
bounds = [label for label in kl.index if label.startswith("oracle")]
for budget in kl.columns:
    best = kl[budget].drop(bounds).idxmin()
    for label in bounds:
        gap = kl.loc[label, budget] - kl.loc[best, budget]
        found = (
            f"budget {budget:g}: {label} KL {kl.loc[label, budget]:.4f}, best other {best} {kl.loc[best, budget]:.4f}"
        )
        print(found + ("" if gap <= 0 else f"  <- {gap:.3f} above it"))

# %%
each = tables.cells[tables.cells["task"] != "all"]
right = each[each["policy"] == "full"].set_index("task")["score"]
largest = kl.columns[-1]
here = each[each["budget"] == largest].pivot(index="task", columns="label", values="kl")
for task in right.sort_values(ascending=False).index:
    best = here.loc[task].drop(bounds).min()
    print(
        f"{task}, budget {largest:g}: full cache {right[task]:.0f}; KL of oracle {here.loc[task, 'oracle']:.4f}, "
        f"of oracle answer=reference {here.loc[task, 'oracle answer=reference']:.4f}, of the best other {best:.4f}"
    )
pd.concat({"score": tables.all_tasks.pivot(index="label", columns="budget", values="score"), "KL": kl}, axis=1).round(3)
