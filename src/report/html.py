"""The report as one HTML page that asks nothing of the network. Every text that is not ours is escaped."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape as html_escape
from typing import Any

from evals.visible import visible
from src.compare.analysis import Analysis
from src.compare.runs import show_budget
from src.compare.stored import flat
from src.report.assets import SCRIPT, STYLE
from src.report.contrasts import CUT, Answer, Contrast
from src.report.formats import Table, comma_separated, latex, markdown, number
from src.report.sentences import headline, notes, summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
CAPTIONS = {
    "score_vs_budget": "Average score at each budget. Where bands overlap, look at the paired differences "
    "below before believing an order: pairing removes the spread that all policies share.",
    "differences": "Paired differences of the average score with 95 % intervals, on the samples that both "
    "sides have. Filled: clear after Holm correction (p < 0.05); hollow: within chance.",
    "score_vs_bytes": "Every run by the memory of its cache, bookkeeping included. The line joins the runs "
    "that nothing cheaper beats, with their budgets.",
    "fidelity_vs_budget": "How far the next-token distribution moves away from the full cache's on the "
    "reference answer: less noisy than scores.",
    "counts": "Entries of each layer and KV head after the prompt, mean over samples, as a share of the cell's mean; "
    "the numbers above are the fewest and the most. Cells whose layers and heads all hold alike are left out.",
    "kept_over_time": "One sample: output tokens read, from left to right, against positions in the text, upwards; "
    "above the line are output tokens. For a policy that chooses at each step, what it attended to.",
    "retention": "Share of the prompt's positions that are kept, by layer and place in the prompt, mean over "
    "KV heads and up to 96 samples. The scale is stretched at its lower end, and the same in all panels.",
}


def escape(text: str) -> str:
    """For HTML; line breaks of a model's answer stay, all else that nobody would see is shown."""
    return html_escape(visible(text, keep="\n\t"))


def page(
    analysis: Analysis,
    tables: Sequence[Table],
    figures: Mapping[str, str],
    samples: Sequence[Contrast],
    warnings: Sequence[str] = (),
) -> str:
    """The whole page. `figures`: name -> inline SVG."""
    study = analysis.study
    by_name = {table.name: table for table in tables}
    sections: list[tuple[str, str, str]] = []  # name, heading, content

    def add(name: str, heading: str, *parts: str) -> None:
        content = "".join(parts)
        if content:
            sections.append((name, heading, content))

    def figure(name: str) -> str:
        return _figure(figures[name], CAPTIONS[name]) if name in figures else ""

    def table(name: str) -> str:
        return _table(by_name[name]) if name in by_name else ""

    add("scores", "Score versus budget", figure("score_vs_budget"), table("scores"), table("extra_scores"))
    add("differences", "What is a real difference?", figure("differences"), table("comparison"))
    add("memory", "Score versus memory", figure("score_vs_bytes"), table("memory"))
    add("fidelity", "Fidelity to the full cache", figure("fidelity_vs_budget"), table("fidelity"))
    add("retention", "Which positions survive", figure("retention"), table("retention"), table("overlap"))
    add("counts", "Who holds how much", figure("counts"))
    add("over-time", "What is cached as the output grows", figure("kept_over_time"))
    add("samples", "Where policies differ most", _samples(analysis, samples))
    add("policies", "Notes on each policy", _notes(analysis))
    add("conditions", "Conditions", _conditions(analysis))
    links = "".join(f'<a href="#{name}">{name.replace("-", " ").capitalize()}</a>' for name, _, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{content}</section>' for name, heading, content in sections
    )
    title = f"KV-cache eviction on {study.model}"
    tiles = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(small)}</span></div>'
        for name, value, small in headline(analysis)
    )
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary(analysis))
    alarms = "".join(f'<p class="warning">{escape(text)}</p>' for text in (*study.warnings, *warnings))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(_subtitle(analysis))}</p>'
        f'<div class="tiles">{tiles}</div></header>'
        f'<nav aria-label="Sections"><div><a href="#summary">Summary</a>{links}</div></nav>'
        f'<main><section id="summary"><h2>In short</h2>{alarms}<ul class="summary">{lines}</ul></section>'
        f"{body}</main>"
        f"<footer>{escape(_method(analysis))}</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _subtitle(analysis: Analysis) -> str:
    policies = ", ".join(map(analysis.study.shown, analysis.study.labels)) or "no budgeted policy"
    return f"{policies} · budgets {', '.join(show_budget(b) for b in analysis.study.budgets) or '–'}"


def _figure(svg: str, caption: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>{labelled}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col" class="{"pin" if c.pinned else "" if c.number else "text"}">'
        f"<button>{escape(c.name)}</button>{f'<small>{escape(c.note)}</small>' if c.note else ''}</th>"
        for c in table.columns
    )
    rows = []
    for i, row in enumerate(table.rows):
        cells = []
        for cell, column in zip(row, table.columns, strict=True):
            raw = cell.raw if not column.number else cell.value
            known = raw is not None and not (isinstance(raw, float) and math.isnan(raw))
            classes = " ".join(
                name for name, on in (("text", not column.number), ("loss", cell.loss), ("pin", column.pinned)) if on
            )
            share = f' style="--share:{cell.loss:.3f}"' if cell.loss else ""
            text = f"<b>{escape(cell.text)}</b>" if cell.bold else escape(cell.text)
            value = escape(str(raw)) if known else ""
            cells.append(f'<td class="{classes}"{share} data-value="{value}">{text}</td>')
        rows.append(f'<tr class="{"break" if i in table.breaks else ""}">{"".join(cells)}</tr>')
    forms = (("Markdown", markdown(table)), ("LaTeX", latex(table)), ("CSV", comma_separated(table)))
    copies = "".join(f"<h3>{name}</h3><pre>{escape(text)}</pre>" for name, text in forms)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    shaded = any(cell.loss for row in table.rows for cell in row)
    if shaded:
        note += '<p class="note">Shade: share of the full cache\'s score that is lost.</p>'
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
        f'<details class="forms"><summary>This table as Markdown, LaTeX, CSV</summary>{copies}</details>'
    )


def _samples(analysis: Analysis, samples: Sequence[Contrast]) -> str:
    if not samples:
        return ""
    tasks = list(dict.fromkeys(sample.key[0] for sample in samples))
    options = "".join(f'<option value="{escape(t)}">{escape(t)}</option>' for t in tasks)
    intro = (
        f"<p>The {len(samples)} samples with the widest spread of scores, the tasks in turn. Each bar is a "
        "run, in the order of the tables; runs that said the same are listed together. These samples are "
        "extremes, not typical.</p>"
        '<p class="controls"><label>Task <select id="task-choice"><option value="">all</option>'
        f"{options}</select></label></p>"
    )
    return intro + "".join(_sample(analysis, sample, opened=not i) for i, sample in enumerate(samples))


def _sample(analysis: Analysis, sample: Contrast, opened: bool) -> str:
    scores = {run.folder: answer.score for answer in sample.answers for run in answer.runs}
    bars: list[str] = []
    before: int | float | None = None
    for row in analysis.rows:
        score = scores.get(row.run.folder)
        classes = [
            *(["gap"] if bars and row.run.budget != before else []),
            *(["none"] if score is None else []),
        ]
        tip = escape(f"{row.run.cell}: {number(score) if score is not None else 'no score'}")
        height = min(max((score or 0) / 100, 0), 1)
        bars.append(f'<i class="{" ".join(classes)}" style="--share:{height:.2f}" title="{tip}"></i>')
        before = row.run.budget
    size = f"{sample.prompt_tokens:,} tokens" if sample.prompt_tokens else ""
    expected = " · ".join(_cut(text) for text in sample.expected) or "–"
    rows = "".join(_answer(answer) for answer in sample.answers)
    return (
        f'<details class="sample" data-task="{escape(sample.key[0])}"{" open" if opened else ""}>'
        f"<summary><b>{escape(sample.key[0])}</b>"
        f'<span><code>{escape(sample.key[1])}</code> <span class="soft">{size}</span></span>'
        f'<span class="meter">{"".join(bars)}</span>'
        f'<span class="range">{number(sample.low)} to {number(sample.high)}</span></summary>'
        f'<div><p class="soft">Expected</p><div class="said">{escape(expected)}</div>'
        f"<table><tbody>{rows}</tbody></table></div></details>"
    )


def _answer(answer: Answer) -> str:
    budgets: dict[str, list[str]] = {}
    for run in answer.runs:
        budgets.setdefault(run.shown, []).extend([] if run.full else [show_budget(run.budget)])
    who = "<br>".join(f"<b>{escape(name)}</b> {escape(', '.join(at))}" for name, at in budgets.items())
    text = f"failed: {answer.error}" if answer.error else answer.text
    said = escape(_cut(text)) if text.strip() else '<span class="soft">(nothing)</span>'
    score = f'<td class="score">{number(answer.score)}</td>'
    return f'<tr>{score}<td><div class="said">{said}</div></td><td class="who">{who}</td></tr>'


def _cut(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} … ({len(text) - CUT:,} more characters)"


def _notes(analysis: Analysis) -> str:
    parts = []
    for label in dict.fromkeys(row.run.label for row in analysis.rows):
        rows = [row for row in analysis.rows if row.run.label == label]
        lines = "".join(f"<p>{escape(line)}</p>" for line in notes(rows))
        if lines:
            parts.append(f"<dt>{escape(rows[0].run.shown)}</dt><dd>{lines}</dd>")
    return f'<dl class="notes">{"".join(parts)}</dl>' if parts else ""


def _conditions(analysis: Analysis) -> str:
    """What must be equal for numbers to be compared, what they were made on, where they come from."""
    same = _pairs({k: [v] for k, v in flat(analysis.study.comparability).items()})
    seen: dict[str, list[Any]] = {}
    for row in analysis.rows:
        environment = {k: v for k, v in row.run.environment.items() if k != "earlier"}
        for name, value in flat(environment).items():
            if value not in seen.setdefault(name, []):
                seen[name].append(value)
    folders = "".join(
        f'<tr><td class="text">{escape(row.run.cell)}</td><td>{row.average.n}</td><td>{row.failed}</td>'
        f'<td class="text"><code>{escape(row.run.folder.name)}</code></td></tr>'
        for row in analysis.rows
    )
    return (
        '<div class="pair"><div class="box"><h3>Equal in all runs, or there would be no report</h3>'
        f'{same}</div><div class="box"><h3>Environment</h3>{_pairs(seen)}</div></div>'
        '<h3>Runs</h3><div class="scroll"><table><thead><tr><th class="text">run</th><th>samples</th>'
        '<th>failed</th><th class="text">folder</th></tr></thead>'
        f"<tbody>{folders}</tbody></table></div>"
    )


def _pairs(values: Mapping[str, Sequence[Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(' | '.join(_shown(v) for v in found))}</code></td></tr>"
        for name, found in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else '<p class="soft">Not recorded.</p>'


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _method(analysis: Analysis) -> str:
    return (
        "Intervals: bootstrap of samples within tasks (n - 1 of n drawn, percentiles widened to "
        f"Student's t), {analysis.resamples:,} resamples, seed {analysis.seed}. Tests: paired sign flips, "
        "two-sided, corrected after Holm over all policies and budgets that share a reference. Tasks "
        "weigh the same. Samples are paired by task, id and a hash of the prompt. An interval of no width "
        "means that all samples scored alike, not certainty."
    )
