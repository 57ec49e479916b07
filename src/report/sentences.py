"""The report in plain sentences, computed from its numbers, and what there is to know about each run."""

from collections import Counter
from typing import Any

import numpy as np

from evals.visible import one_line
from src.compare.analysis import Analysis, Row
from src.compare.intervals import Interval
from src.compare.runs import show_budget
from src.report.formats import between, number, p_value, signed

FEW = 10  # samples per task below which a task's own score is mostly noise


def headline(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Three or four figures to start with: name, value, small print."""
    tiles = []
    full, best = analysis.full, analysis.best(analysis.budgeted)
    if full:
        tiles.append(("Full cache", number(full.average.estimate), _ci(full)))
    if best:
        tied = _tied(analysis.budgeted, best)
        best = min(tied, key=lambda row: row.total_share or np.inf)
        among = f", the smallest of {len(tied)} equal" if len(tied) > 1 else ""
        tiles.append((f"Best budgeted: {best.run.cell}{among}", number(best.average.estimate), _ci(best)))
        if best.total_share is not None:
            small = "of the full cache's bytes, with bookkeeping"
            tiles.append(("Its cache memory", f"{100 * best.total_share:.1f} %", small))
    study = analysis.study
    tiles.append(("Evidence", f"{study.scored:,} samples", f"{_count(len(study.tasks), 'task')}, paired"))
    return tiles


def summary(analysis: Analysis) -> list[str]:
    """What a reader should take away, most important first."""
    study, full = analysis.study, analysis.full
    named = study.labels
    lines = [
        f"{_count(len(named), 'policy', 'policies')} at {_count(len(study.budgets), 'budget')} "
        f"on {study.model}: {_count(len(study.tasks), 'task')}, {_count(study.scored, 'sample')}."
    ]
    if full:
        scored = number(full.average.estimate)
        lines.append(f"The full cache scores {scored} on average{_range(full.average)}.")
    else:
        lines.append("There is no run of the full cache here, so no difference to it can be stated.")
    lines += [line for budget in study.budgets if (line := _at_budget(analysis, budget))]
    lines += _against_baseline(analysis)
    lines += _no_clear_loss(analysis)
    lines += _largest_loss(analysis)
    lines += _noise(analysis)
    return lines


def _at_budget(analysis: Analysis, budget: Any) -> str:
    rows = analysis.at(budget)
    best = analysis.best(rows)
    if best is None:
        return ""
    tied = _tied(rows, best)
    lead = "there is" if len(rows) == 1 else "the best is" if len(tied) == 1 else "the best are equally"
    names = _and([row.run.shown + (_share(row) if len(tied) == 1 else "") for row in tied])
    line = f"At budget {show_budget(budget)} {lead} {names} with {number(best.average.estimate)}"
    if len(tied) == 1:
        return f"{line}{_loss(best)}."
    return f"{line}: {'; '.join(f'{row.run.shown}{_share(row)}{_loss(row)}' for row in tied)}."


def _tied(rows: list[Row], best: Row) -> list[Row]:
    """The rows that share the best average; each has bytes and an interval of its own."""
    return [r for r in rows if not r.odd and abs(r.average.estimate - best.average.estimate) < 1e-9]


def _share(row: Row) -> str:
    """Entries and bookkeeping, in brackets."""
    total, entries = row.total_share, row.share(row.memory("kv_bytes_mean"))
    if total is None or entries is None:
        return ""
    return f" ({100 * total:.1f} % of the full cache's bytes, {100 * (total - entries):.1f} of them bookkeeping)"


def _loss(row: Row) -> str:
    if not row.full:
        return ""
    change = row.full.interval
    verdict = "a clear difference" if row.full.clear else "not a clear difference"
    return (
        f", {signed(change.estimate)} against the full cache{_range(change)}, {verdict} "
        f"(p = {p_value(row.full.p_holm)})".replace("p = <", "p < ")
    )


def _against_baseline(analysis: Analysis) -> list[str]:
    compared = [row for row in analysis.budgeted if row.baseline]
    if not compared:
        return []
    name = analysis.study.shown(str(analysis.study.baseline))
    better, worse = ([r for r in compared if r.baseline and r.baseline.clear and _sign(r) == s] for s in (1, -1))
    if not better and not worse:
        return [f"No policy differs clearly from {name} at any budget (Holm-corrected p < 0.05)."]
    lines = [
        f"Clearly {word} than {name} (Holm-corrected p < 0.05): {_cells(rows)}."
        for word, rows in (("better", better), ("worse", worse))
        if rows
    ]
    return lines if better else ["No policy is clearly better than " + f"{name} at any budget.", *lines]


def _sign(row: Row) -> float:
    return float(np.sign(row.baseline.interval.estimate)) if row.baseline else 0.0


def _cells(rows: list[Row]) -> str:
    """snapkv at 64 and 128; h2o at 64"""
    budgets: dict[str, list[str]] = {}
    for row in rows:
        budgets.setdefault(row.run.shown, []).append(show_budget(row.run.budget))
    return "; ".join(f"{name} at {_and(values)}" for name, values in budgets.items())


def _no_clear_loss(analysis: Analysis) -> list[str]:
    """Absence of evidence is said together with how much could be hidden in it."""
    judged = [r for r in analysis.budgeted if r.full and not np.isnan(r.full.interval.low) and not r.odd]
    kept = [r for r in judged if r.full and not (r.full.clear and r.full.interval.estimate < 0)]
    if not judged:
        return ["Too few samples to judge any loss against the full cache."] if analysis.full else []
    if not kept:
        return ["Every policy loses clearly against the full cache at every budget tried."]
    size = {id(row): (row.total_share or np.inf, -row.average.estimate) for row in kept}
    smallest = [row for row in kept if size[id(row)] == min(size.values())]
    lead = (
        "The smallest cache without a clear loss is" if len(smallest) == 1 else "Without a clear loss, equally small:"
    )
    return [f"{lead} {_and([f'{row.run.cell} ({_hidden(row)})' for row in smallest], '; ')}."]


def _hidden(row: Row) -> str:
    hidden = -row.full.interval.low if row.full else 0.0
    if hidden > 0:
        return f"its interval still allows a loss of {number(hidden)} points"
    return "it scores higher" if hidden < 0 else "its interval allows no loss"


def _largest_loss(analysis: Analysis) -> list[str]:
    full = analysis.full
    if not full:
        return []
    drops = [
        (full.tasks[task][0] - mean, task, mean, row)
        for row in analysis.budgeted
        for task, (mean, _) in row.tasks.items()
        if task in full.tasks
    ]
    if not drops:
        return []
    drop, task, mean, row = max(drops, key=lambda found: found[0])
    if drop <= 0:
        return ["No task loses against the full cache under any policy."]
    alike = sum(abs(other[0] - drop) < 1e-9 for other in drops) - 1
    more = f" (one of {alike + 1} losses as large)" if alike else ""
    return [
        f"The largest loss on one task: {task} falls from {number(full.tasks[task][0])} to {number(mean)} "
        f"under {row.run.cell}{more}."
    ]


def _noise(analysis: Analysis) -> list[str]:
    lines = []
    differences = [d for r in analysis.budgeted if (d := r.baseline or r.full) and not np.isnan(d.interval.low)]
    if differences:
        half = float(np.median([(d.interval.high - d.interval.low) / 2 for d in differences]))
        lines.append(f"A paired difference of averages is known to about ± {number(half)} points (median).")
    counts = Counter(int(task) for task in analysis.study.task_of)
    if counts and min(counts.values()) < FEW:
        fewest = min(counts.values())
        lines.append(
            f"Some tasks have only {_count(fewest, 'sample')}: take their single scores as anecdotes, "
            "and intervals as rough."
        )
    if analysis.failed:
        cells = [f"{row.run.cell} ({row.failed})" for row in analysis.rows if row.failed]
        lines.append(f"{_count(analysis.failed, 'sample')} failed and count in no score: {', '.join(cells)}.")
    return lines


def notes(rows: list[Row]) -> list[str]:
    """What to know before reading much into a policy's scores; a figure per budget where it matters."""
    found: dict[str, dict[str, list[str]]] = {}  # sentence -> figure -> budgets
    for row in rows:
        for sentence, figure in _notes(row):
            found.setdefault(sentence, {}).setdefault(figure, []).append(show_budget(row.run.budget))
    lines = []
    for sentence, figures in found.items():
        everywhere = len(figures) == 1 and len(next(iter(figures.values()))) == len(rows)
        parts = [figure if everywhere else f"{figure} at {_and(at)}".strip() for figure, at in figures.items()]
        told = ", ".join(part for part in parts if part)
        lines.append(f"{sentence}: {told}." if told else f"{sentence}.")
    return lines


def _notes(row: Row) -> list[tuple[str, str]]:
    run, found = row.run, []
    if run.reconstruction:
        found.append((f"Our reconstruction: {one_line(run.reconstruction)}", ""))
    records = [r for r in run.records.values() if not r.error]
    of = f"of {len(records)}"
    peak, after = row.memory("kv_bytes_peak_mean"), row.memory("kv_bytes_mean")
    if peak and after and not run.full:
        if peak > 1.001 * after:
            grows = "The budget holds for the prompt only; while decoding the cache grows, in the mean to"
            found.append((grows, f"{100 * peak / after:.0f} %"))
        else:
            found.append(("The cache stays within its budget while decoding", ""))
    whole = sum((r.kv_bytes or 0) >= (r.kv_bytes_full or np.inf) for r in records)
    if whole and not run.full:
        found.append(("The prompt fitted the budget, so that nothing was evicted, in", f"{whole} {of} samples"))
    extra = row.memory("bookkeeping_bytes_mean")
    if extra and after and extra > 0.01 * after:
        found.append(("Bookkeeping besides, in % of the entries' bytes", f"{100 * extra / after:.1f} %"))
    if run.options and not run.full:
        options = ", ".join(f"{k}={v}" for k, v in sorted(run.options.items()))
        found.append(("Options", options))
    for sentence, number_of in (
        ("Answers that ended at the token limit", sum(r.finish == "length" for r in records)),
        ("Prompts cut in the middle to fit", sum(bool(r.truncated) for r in records)),
    ):
        if number_of:
            found.append((sentence, f"{number_of} {of}"))
    reasons = Counter(r.error.strip().split("\n")[0] for r in run.records.values() if r.error)
    found += [(f"Failed samples ({reason})", str(count)) for reason, count in reasons.most_common(3)]
    return found


def _range(interval: Interval) -> str:
    return f" {between(interval)}" if between(interval) else " (too few samples for an interval)"


def _ci(row: Row) -> str:
    return f"95 % interval {between(row.average)}" if between(row.average) else "no interval: too few samples"


def _count(n: int, noun: str, many: str = "") -> str:
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def _and(words: list[str], between: str = ", ") -> str:
    return words[0] if len(words) == 1 else f"{between.join(words[:-1])}{between.rstrip(', ')} and {words[-1]}"
