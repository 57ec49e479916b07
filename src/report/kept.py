"""The report's table of kept positions: where they lie, and how scores depend on the position."""

from collections.abc import Mapping
from typing import Any

from src.compare.analysis import Analysis
from src.compare.matched import retention_samples
from src.report.formats import Column, Table, TableCell, number
from src.report.tables import BUDGET, POLICY, breaks, heads, missing, percent, plain
from src.retention.per_head import PER_HEAD


def retention_table(analysis: Analysis) -> Table | None:
    """Where in the prompt the kept entries lie, and how much of the answering sentence is among them, if recorded."""
    sometimes = {
        "needle": (
            Column("needle kept", "% of it"),
            lambda found: _share(found.get("needle"), "after_prompt"),
            " Needle: of the sentence that holds the answer, in the samples where it is known.",
        ),
        "score_slope": (
            Column("score slope", "ln-ln, by position"),
            lambda found: _slope(found.get("score_slope")),
            " Score slope: of ln(score) against ln(position), 0 has no preference; in brackets, what accumulated "
            "attention would have if logits were exchangeable.",
        ),
    }
    measured = [row.run.metrics.get("retention") or {} for row in analysis.rows]
    if not any(measured):
        return None
    covered = [retention_samples(row.run) for row in analysis.rows]
    fewer = any(found and n != all_ for found, (n, all_) in zip(measured, covered, strict=True))
    shown = [entry for name, entry in sometimes.items() if any(name in found for found in measured)]
    columns = (
        POLICY,
        BUDGET,
        *([Column("n", "of scored")] if fewer else []),
        Column("first tenth", "% of kept"),
        Column("last tenth", "% of kept"),
        *(Column(measure.head, measure.below) for measure in PER_HEAD.values()),
        Column("KL to uniform", "nats"),
        Column("Gini", "0 even"),
        Column("first tenth", "% of heavy", key="first tenth of heavy"),
        Column("last tenth", "% of heavy", key="last tenth of heavy"),
        Column("drift", "% lost later"),
        *(column for column, _, _ in shown),
    )
    rows = []
    for row, kept, (n, all_) in zip(analysis.rows, measured, covered, strict=True):
        found = {**kept, **kept.get("chosen", {})}
        heavy: dict[str, Any] = found.get("heavy") or {}
        tenths, heavy_tenths = (x.get("decile_shares") or [None] * 10 for x in (found, heavy))
        rows.append(
            (
                *heads(row),
                *([TableCell(f"{n} of {all_}", n) if kept else missing()] if fewer else []),
                *(plain(None if x is None else 100 * x, 1) for x in (tenths[0], tenths[-1])),
                *(plain(found.get(name), 2) for name in (*PER_HEAD, "kl_uniform", "gini")),
                *(plain(None if x is None else 100 * x, 1) for x in (heavy_tenths[0], heavy_tenths[-1])),
                plain(None if found.get("drift") is None else 100 * found["drift"], 1),
                *(figure(found) for _, figure, _ in shown),
            )
        )
    note = (
        "After the prompt, mean over heads, layers, samples. Heavy: without the recent window that all "
        "heads keep. Drift: share of those positions no longer held when decoding ended."
    )
    if any("chosen" in kept for kept in measured):
        note += " Where a policy chooses at each step: of the tokens that it chose."
    if fewer:
        note += " n: samples whose kept positions are there, of those that were scored; the other tables have them all."
    note += "".join(told for _, _, told in shown)
    return Table("retention", "Where the kept entries lie", columns, tuple(rows), breaks(analysis), note)


def _share(found: Mapping[str, Any] | None, name: str) -> TableCell:
    return percent(found[name]) if found else missing()


def _slope(found: Mapping[str, Any] | None) -> TableCell:
    if not found or found["mean"] is None:
        return missing()
    theory = f" ({number(found['theory'], 2)})" if found["theory"] is not None else ""
    return TableCell(number(found["mean"], 2) + theory, found["mean"])
