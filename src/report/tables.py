"""The tables of a report: what stands in which cell. How a table looks is src/report/formats.py."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from src.compare.analysis import Analysis, Difference, Row
from src.compare.intervals import Interval, macro_stderr
from src.compare.runs import show_budget
from src.report.formats import Column, Table, TableCell, between, number, p_value, signed

DAGGER = "†"
POLICY, BUDGET = Column("policy", number=False), Column("budget", "entries per head")


def make_tables(analysis: Analysis) -> list[Table]:
    """Every table of scores and sizes that these runs can fill, in reading order."""
    tables = [scores_table(analysis), comparison_table(analysis), memory_table(analysis)]
    if analysis.has_fidelity:
        tables.append(fidelity_table(analysis))
    if any(_extra(row, task) for row in analysis.rows for task in row.tasks):
        tables.append(extra_table(analysis))
    return tables


def scores_table(analysis: Analysis) -> Table:
    """As in the papers: a row per policy and budget, a column per task, the average last."""
    study = analysis.study
    usual = {task: _usual_n(analysis, task) for task in study.tasks}
    columns = [
        POLICY,
        BUDGET,
        *(Column(task, f"{_metric(analysis, task)}n={usual[task]}") for task in study.tasks),
    ]
    failures = analysis.failed > 0
    columns += [Column("failed", "samples")] if failures else []
    columns.append(Column("average", "of tasks", pinned=True))
    winners = {task: _winners(analysis, task) for task in (*study.tasks, None)}
    rows = []
    for row in analysis.rows:
        cells = heads(row)
        for task in study.tasks:
            mean, n = row.tasks.get(task, (math.nan, 0))
            text = number(mean) + (f" (n={n})" if n != usual[task] else "")
            full = analysis.full.tasks.get(task, (0.0, 0))[0] if analysis.full else 0.0
            cells.append(
                TableCell(
                    text,
                    mean,
                    bold=id(row) in winners[task],
                    loss=_loss(mean, full) if _budgeted(row) else None,
                )
            )
        mark = DAGGER if row.odd else ""
        full = analysis.full.average.estimate if analysis.full else 0.0
        mean = row.average.estimate
        loss = _loss(mean, full) if _budgeted(row) else None
        cells += [TableCell(str(row.failed), row.failed)] if failures else []
        cells.append(TableCell(number(mean) + mark, mean, bold=id(row) in winners[None], loss=loss))
        rows.append(tuple(cells))
    note = "Scores from 0 to 100; the average weighs every task the same. Bold: best policy at that budget."
    return Table("scores", "Scores per task", tuple(columns), tuple(rows), breaks(analysis), note + _odd(analysis))


def tasks_table(analysis: Analysis) -> Table:
    """The same scores in long form, a line per run and task: for pandas rather than for eyes."""
    study, rows = analysis.study, []
    for column, row in enumerate(analysis.rows):
        for index, task in enumerate(study.tasks):
            here = study.task_of == index
            if task not in row.tasks:
                continue
            mean, n = row.tasks[task]
            stderr = float(macro_stderr(study.scores[here][:, [column]], study.task_of[here])[0][0])
            failed = sum(bool(record.error) for key, record in row.run.records.items() if key[0] == task)
            cells = [
                TableCell(task),
                TableCell(str(n), n),
                TableCell(str(failed), failed),
                plain(mean, 2),
                plain(stderr, 2),
            ]
            rows.append((*heads(row), *cells))
    names = ("n", "failed", "score", "standard error")
    columns = (POLICY, BUDGET, Column("task", number=False), *(Column(name) for name in names))
    return Table("tasks", "Scores, a line per task", columns, tuple(rows))


def comparison_table(analysis: Analysis) -> Table:
    """Averages with intervals, and the paired differences with what they rest on."""
    baseline = analysis.study.baseline
    against = [("full cache", "full")] if analysis.full else []
    against += [(analysis.study.shown(baseline), "baseline")] if baseline else []
    columns = [POLICY, BUDGET, Column("n", "samples"), Column("average", "95 % interval")]
    uneven = any(d and d.interval.n != row.average.n for row in analysis.rows for d in (row.full, row.baseline))
    for name, _ in against:
        columns += [
            Column(f"Δ {name}", "paired, 95 % interval", key=f"difference to {name}"),
            Column("SE", "of the Δ", detail=True, key=f"SE of difference to {name}"),
            *([Column("n", "pairs", detail=True, key=f"pairs with {name}")] if uneven else []),
            Column("p", "Holm", key=f"p (Holm) of difference to {name}"),
        ]
    rows = []
    for row in analysis.rows:
        mark = DAGGER if row.odd else ""
        cells = [*heads(row), TableCell(str(row.average.n), row.average.n), _interval(row.average, mark)]
        for _, attribute in against:
            cells += _difference(getattr(row, attribute), uneven)
        rows.append(tuple(cells))
    note = (
        f"Intervals: bootstrap of samples within tasks, {analysis.resamples:,} resamples. p: paired "
        "sign-flip test, two-sided, Holm-corrected over all policies and budgets against the same "
        "reference. Bold: p < 0.05."
    )
    title = "Averages and paired differences"
    return Table("comparison", title, tuple(columns), tuple(rows), breaks(analysis), note + _odd(analysis))


def memory_table(analysis: Analysis) -> Table:
    """Bytes of the caches, as recorded per sample. No speeds: cells of a sweep share their steps."""
    columns = [
        POLICY,
        BUDGET,
        Column("entries", "MiB after prompt, mean"),
        Column("bookkeeping", "MiB, mean"),
        Column("total", "MiB, mean"),
        Column("total", "% of full cache's entries", key="total, % of full cache's entries"),
        Column("entries at most", "MiB, mean of peaks"),
    ]
    note = (
        "Per sample, over all layers. Bookkeeping: positions and a policy's own state; total: entries and bookkeeping, "
        "wherever they lie. A policy's speed is measured by src.bench, not here."
    )
    split = any(row.memory("kv_bytes_device_mean") is not None for row in analysis.rows)
    if split:
        columns += [
            Column("on the device", "% of full cache's entries"),
            Column("with codebooks", "% of full cache's entries"),
        ]
        note += (
            " On the device: the part of the total that does not lie in host memory. Codebooks are shared by all "
            "samples of a model; here they are counted to a single one."
        )
    rows = []
    for row in analysis.rows:
        sizes = (row.memory("kv_bytes_mean"), row.memory("bookkeeping_bytes_mean"), row.total_bytes)
        cells = [*map(mebibytes, sizes), percent(row.total_share), mebibytes(row.memory("kv_bytes_peak_mean"))]
        if split:
            device = row.device_bytes
            both = None if device is None else device + (row.memory("codebook_bytes") or 0)
            cells += [percent(row.share(device)), percent(row.share(both))]
        rows.append((*heads(row), *cells))
    return Table("memory", "Cache memory", tuple(columns), tuple(rows), breaks(analysis), note)


def fidelity_table(analysis: Analysis) -> Table:
    """How far a policy's next-token distribution moves from the full cache's on the reference answers."""
    names = {
        "kl": Column("KL(full || policy)", "nats per token"),
        "nll": Column("NLL", "nats per token"),
        "top1": Column("top-1 agreement", "share"),
        "output_error": Column("attention output error", "relative, mean over layers"),
    }
    present = [name for name in names if any(name in row.fidelity for row in analysis.rows)]
    rows = []
    for row in analysis.rows:
        cells = [_interval(row.fidelity[n], "", 3) if n in row.fidelity else missing() for n in present]
        measured = max((i.n for i in row.fidelity.values()), default=0)
        rows.append((*heads(row), TableCell(str(measured), measured), *cells))
    columns = (POLICY, BUDGET, Column("n", "samples"), *(names[n] for n in present))
    note = "Teacher-forced on the reference answer, mean over tasks, 95 % intervals. Lower KL, NLL are better."
    title = "Distance from the full cache"
    return Table("fidelity", title, columns, tuple(rows), breaks(analysis), note)


def extra_table(analysis: Analysis) -> Table:
    """Scores beside the official ones, such as LongGenBench's with answers paired by question number."""
    pairs = sorted({(task, name) for row in analysis.rows for task in row.tasks for name in _extra(row, task)})
    columns = (POLICY, BUDGET, *(Column(task, f"{name}, 0 to 100", key=f"{task} {name}") for task, name in pairs))
    rows = [(*heads(row), *(plain(_extra(row, task).get(name), 1) for task, name in pairs)) for row in analysis.rows]
    note = "Not the official scores, and in no average: they say how much of a difference is bookkeeping."
    return Table("extra_scores", "Scores beside the official ones", columns, tuple(rows), breaks(analysis), note)


def _extra(row: Row, task: str) -> dict[str, float]:
    found = (row.run.metrics.get("tasks") or {}).get(task) or {}
    return dict(found.get("extra_scores") or {})


# --- cells ---


def mebibytes(value: float | None) -> TableCell:
    return plain(None if value is None else value / 2**20, 2)


def heads(row: Row) -> list[TableCell]:
    budget = "–" if row.run.full else show_budget(row.run.budget)
    return [TableCell(row.run.shown), TableCell(budget, None if row.run.full else row.run.budget)]


def _interval(interval: Interval, mark: str, digits: int = 1) -> TableCell:
    text = f"{number(interval.estimate, digits)}{mark} {between(interval, digits)}".strip()
    return TableCell(text, interval.estimate, (interval.low, interval.high))


def _difference(difference: Difference | None, pairs: bool) -> list[TableCell]:
    if difference is None:
        return [missing()] * (4 if pairs else 3)
    interval = difference.interval
    text = f"{signed(interval.estimate)} {between(interval)}".strip()
    return [
        TableCell(text, interval.estimate, (interval.low, interval.high), bold=difference.clear),
        TableCell(number(interval.stderr, 2), interval.stderr),
        *([TableCell(str(interval.n), interval.n)] if pairs else []),
        TableCell(p_value(difference.p_holm), difference.p_holm),
    ]


def plain(value: float | None, digits: int) -> TableCell:
    return TableCell(number(value, digits), value)


def percent(share: float | None) -> TableCell:
    return plain(None if share is None else 100 * share, 1)


def missing() -> TableCell:
    return TableCell("–")


def _budgeted(row: Row) -> bool:
    return not row.run.full


def _loss(value: float, full: float) -> float | None:
    return min(max((full - value) / full, 0.0), 1.0) if full > 0 and not math.isnan(value) else None


def _usual_n(analysis: Analysis, task: str) -> int:
    counts = Counter(row.tasks[task][1] for row in analysis.rows if task in row.tasks)
    return max(counts, key=lambda n: (counts[n], n)) if counts else 0


def _metric(analysis: Analysis, task: str) -> str:
    described = (row.run.metrics.get("tasks", {}).get(task, {}).get("metric") for row in analysis.rows)
    name = next((str(m) for m in described if m), "")
    return f"{name}, " if name else ""


def _winners(analysis: Analysis, task: str | None) -> set[int]:
    """Rows that share the best score of their budget, where they rest on equally many samples."""
    best: set[int] = set()
    for budget in analysis.study.budgets:
        rows = analysis.at(budget)
        if task is None:
            scored = [(row, row.average.estimate) for row in rows if not row.odd]
        else:
            usual = _usual_n(analysis, task)
            scored = [(r, r.tasks[task][0]) for r in rows if task in r.tasks and r.tasks[task][1] == usual]
        scored = [(row, score) for row, score in scored if not math.isnan(score)]
        if len(scored) > 1:
            top = max(score for _, score in scored)
            best |= {id(row) for row, score in scored if score > top - 1e-9}
    return best


def breaks(analysis: Analysis) -> frozenset[int]:
    def group(row: Row) -> Any:
        return "full" if row.run.full else row.run.budget

    rows: Sequence[Row] = analysis.rows
    return frozenset(i for i in range(1, len(rows)) if group(rows[i]) != group(rows[i - 1]))


def _odd(analysis: Analysis) -> str:
    return f" {DAGGER}: on other samples than most runs." if any(row.odd for row in analysis.rows) else ""
