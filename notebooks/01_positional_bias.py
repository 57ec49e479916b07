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
# # 1. Positional bias: does accumulated attention forget the end?
#
# H2O keeps the tokens with the largest attention summed over all queries. An early token is summed over more
# queries: if logits were exchangeable, token $j$ of $n$ would collect $H_n - H_{j-1} \approx \ln(n/j)$ whatever it
# says. AhaKV sums recent queries only. This notebook looks at what each policy really kept.
#
# Its data: `python -m src.sweep experiment=bias_study tasks.data_dir=DIR`, else the committed study tables.

# %%
import sys

sys.path.insert(0, "..")

import matplotlib.pyplot as plt
import numpy as np

from src.retention.measures import expected_accumulation
from src.study import lab
from src.study.theory import accumulated, expected_with_sinks, slope_on_log

ROOT = None  # a folder with bias_study/ in it; None: ../results
MIN_PROMPT = 2500  # tokens; shorter prompts are left out
BUDGET = None  # needed when the study has several

lab.greyscale()
tables = lab.at_budget(lab.load("bias_study", ROOT, baseline="ahakv", min_prompt=MIN_PROMPT), BUDGET)
lab.need(tables, "h2o", "snapkv", "ahakv")

# %% [markdown]
# ## The theory, without a model
# Gaussian queries and keys follow the curve. One sink, that is one key with a fixed extra logit as real models have
# it at the first token, takes most of what the early tokens would collect: there the theory fails.

# %%
n, draws, weight = 1000, 16, 300.0
position = np.arange(1, n + 1)
plain, sink = (accumulated(n, draws, sink=logit) for logit in (0.0, np.log(weight)))
figure, axes = plt.subplots(figsize=(6, 3.2))
axes.loglog(position, plain.mean(0), ".", color="0.6", label="Gaussian logits")
axes.loglog(position, expected_accumulation(n), "k-", label=r"$H_n - H_{j-1}$")
axes.loglog(
    position[1:], sink.mean(0)[1:], "x", color="0.6", markersize=3, label=f"the same and a sink of {weight:.0f}"
)
axes.loglog(position[1:], expected_with_sinks(n, weight)[1:], "k--", label="expected beside the sink")
axes.set(xlabel="position j (tokens)", ylabel="accumulated attention $S_j$ (rows)")
axes.set_title(f"no model: {draws} draws of n = {n:,} tokens")
axes.legend(frameon=False)
lab.save(figure, "theory")
for name, sums, first in (("no sink", plain, 1), ("a sink", sink, 2)):
    print(f"{name}: slope of S_j on ln(n/j) = {slope_on_log(sums, first)[0]:.2f} (theory: 1)")

# %% [markdown]
# ## The theory on a real model
# The score that a policy gave each token of the prompt when it was cut, by octave of the position (1, 2-3, 4-7, ...),
# relative to its mean; means over layers, KV heads and prompts. H2O's score is accumulated attention. Its first token
# is a sink, which no theory of exchangeable logits has; beyond it the curve shows whether early tokens are ahead
# because they are early.

# %%
n = int(tables.all_tasks["prompt_tokens"].mean())
competing = n - int(tables.budgets[0]) // 2  # H2O's other half is recent tokens, which need no score
curve = expected_accumulation(n)[:competing]
figure, axes = plt.subplots(figsize=(6.5, 3.4))
for label in ("h2o", "h2o normalise=expectation", "snapkv", "ahakv", "random"):
    rows = tables.octaves[tables.octaves["label"] == label].dropna(subset="value").sort_values("first")
    if len(rows):
        axes.loglog(rows["first"], rows["value"], label=label)
octave = np.log2(np.arange(1, competing + 1)).astype(int)
theory = np.array([curve[octave == i].mean() for i in range(octave[-1] + 1)]) / curve.mean()
axes.loglog(2.0 ** np.arange(len(theory)), theory, ":", color="0.0", linewidth=2.5, marker="", label="$H_n - H_{j-1}$")
axes.axhline(1, color="0.85", linewidth=1, zorder=0)
axes.set(xlabel="first position of the octave (tokens)", ylabel="score / mean score")
axes.set_title(tables.facts(), fontsize=9)
figure.legend(loc="outside right upper", fontsize=7, handlelength=3.5)
lab.save(figure, "octaves")
slopes, theories = (lab.measure(tables, name, "all") for name in ("score_slope", "score_slope_theory"))
for label in slopes.index:
    beside = f"; for exchangeable logits {theories.loc[label, 'value']:+.2f}" if label in theories.index else ""
    print(f"{label}: ln(score) falls with ln(position) at a slope of {slopes.loc[label, 'value']:+.2f}{beside}")

# %% [markdown]
# ## What was kept
# The heavy part of each kept set: the forced recent window is left out, and the rest of the prompt counts as the whole.

# %%
shown = {label: lab.deciles(tables, label) for label in tables.all_tasks["label"]}
shown = {label: rows for label, rows in shown.items() if rows is not None}
columns = 4
grid = -(-max(len(shown), 1) // columns)
figure, panels = plt.subplots(grid, columns, figsize=(8.5, 1.9 * grid), sharex=True, sharey=True, squeeze=False)
tenths, top = np.arange(1, 11), 60
panels[0, 0].set_ylim(0, top)
for axes in panels.flat[len(shown) :]:
    axes.set_visible(False)
for axes, (label, rows) in zip(panels.flat, shown.items(), strict=False):
    errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
    axes.bar(tenths, 100 * rows["value"], color="0.65", yerr=100 * np.nan_to_num(errors), ecolor="0.2")
    axes.axhline(10, color="0.0", linestyle=":", linewidth=1)
    axes.set_title(f"{label} (n = {int(rows['n'].iloc[0])})", fontsize=7)
    for tenth, share in zip(tenths, 100 * rows["value"], strict=True):
        if share > top:  # StreamingLLM's sinks are all in the first tenth
            axes.annotate(f"{share:.0f} %", (tenth, top), (2, -8), textcoords="offset points", fontsize=7)
    axes.set_xticks([1, 5, 10])
figure.supxlabel("tenth of the prompt (1: first)")
figure.supylabel("share of kept entries (%)")
figure.suptitle(f"heavy part at budget {tables.budgets[0]:g}; dotted: no preference; {tables.facts()}", fontsize=9)
lab.save(figure, "deciles")

# %%
ratio = lab.measure(tables, "first_to_last").replace(np.inf, np.nan)
order = ratio.dropna(subset="value").sort_values("value").index  # StreamingLLM has nothing in the last tenth
figure, axes = plt.subplots(figsize=(6.5, 0.6 + 0.25 * len(order)))
lab.dots(axes, order, ratio, "value", "low", "high")
axes.axvline(1, color="0.0", linestyle=":")
axes.set_xscale("log")
axes.set_xlabel("first tenth / last tenth of the prompt, shares of the heavy part (95 %)")
axes.set_title(tables.facts(), fontsize=9)
lab.save(figure, "first_to_last")
ratio[["n", "value", "low", "high"]].round(2)

# %% [markdown]
# ## The abstract's claims, one sentence each
# "No preference" is not the target: the oracles, which know what the answer will attend to, show where a kept set
# ought to lie.


# %%
def difference(label: str, name: str):
    """A policy minus AhaKV."""
    rows = tables.differences
    return rows[(rows["label"] == label) & (rows["measure"] == name)].squeeze()


def shown_interval(row, digits: int = 2) -> str:
    return f"{row['low']:.{digits}f} to {row['high']:.{digits}f}"


h2o, ahakv = ratio.loc["h2o"], ratio.loc["ahakv"]
for label in ratio.index[ratio.index.str.startswith("oracle")]:
    row = ratio.loc[label]
    print(
        f"What the answer attends to ({label}) has first / last tenth {row['value']:.2f}, 95 % {shown_interval(row)}."
    )
biased = lab.apart(h2o["low"], h2o["high"], 1, 1)
print(
    lab.verdict(
        "Accumulated attention (H2O) prefers the beginning",
        biased,
        f"first / last tenth {h2o['value']:.2f}, 95 % {shown_interval(h2o)}",
    )
)


def distance_from_1(row) -> tuple[float, float]:
    """The interval of the factor by which the two ends differ, whichever is ahead, as a logarithm."""
    low, high = sorted(np.abs(np.log([row["low"], row["high"]])))
    return (0.0 if row["low"] <= 1 <= row["high"] else low), high


def distance_from(row, target) -> tuple[float, float]:
    """The same, of the factor between two policies' ratios."""
    low, high = np.log([row["low"] / target["high"], row["high"] / target["low"]])
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


against = f"first / last tenth {ahakv['value']:.2f}, 95 % {shown_interval(ahakv)}, against {h2o['value']:.2f} of H2O"
print(
    lab.verdict(
        "AhaKV takes away H2O's preference for the beginning",
        lab.apart(h2o["low"], h2o["high"], ahakv["low"], ahakv["high"]),
        against,
    )
)
print(
    lab.verdict(
        "AhaKV's kept set has less of a preference for either end",
        lab.apart(*distance_from_1(h2o), *distance_from_1(ahakv)),
        against,
    )
)
for label in ratio.index[ratio.index.str.startswith("oracle")]:
    target = ratio.loc[label]
    print(
        lab.verdict(
            f"AhaKV keeps, more than H2O, where the answer will look ({label})",
            lab.apart(*distance_from(h2o, target), *distance_from(ahakv, target)),
            f"{against}, {target['value']:.2f} of {label}",
        )
    )
for other in ("h2o", "snapkv"):
    score, kl = difference(other, "score"), difference(other, "kl")
    higher = lab.apart(0, 0, score["low"], score["high"])
    print(
        lab.verdict(
            f"AhaKV scores higher than {other}",
            higher,
            f"{other} - ahakv: score {score['difference']:+.2f}, 95 % {shown_interval(score)}, p = {score['p']:.2g}; "
            f"KL to the full cache {kl['difference']:+.3f}, 95 % {shown_interval(kl, 3)}",
        )
    )
