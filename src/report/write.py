"""A whole report from run folders: page, numbers, tables and figures, written where they belong."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.visible import visible
from src.compare.analysis import Analysis, Difference, analyse
from src.compare.intervals import RESAMPLES
from src.compare.matched import make_study
from src.errors import InputError
from src.files import write_whole
from src.report.contrasts import contrasts, retention_maps
from src.report.counts import counts_map
from src.report.figures import inline_svg, pdf, png
from src.report.formats import Table, comma_separated, latex, markdown, terminal
from src.report.html import page
from src.report.kept import retention_table
from src.report.kept_over_time import of_study
from src.report.overlap import overlap_table
from src.report.plots import make_figures
from src.report.sentences import summary
from src.report.tables import make_tables, tasks_table


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    samples: int = 24,
) -> tuple[Path, Analysis, list[Table]]:
    """Everything but the terminal; for scripts and sweeps. Returns the page's path and what it shows."""
    study = make_study(folders, baseline)
    analysis = analyse(study, resamples, seed)
    tables = make_tables(analysis)
    tables += [table for table in (retention_table(analysis), overlap_table(analysis)) if table]
    maps, warnings = retention_maps(study)
    study = replace(study, warnings=(*study.warnings, *warnings))  # for the page, report.json and the terminal
    analysis = replace(analysis, study=study)
    figures = make_figures(analysis, maps)
    more = {"counts": counts_map(analysis), "kept_over_time": of_study(study)}
    figures |= {name: figure for name, figure in more.items() if figure is not None}
    out = out or Path(os.path.commonpath([run.folder.parent for run in study.runs])) / "report"
    html = page(
        analysis,
        tables,
        {name: inline_svg(figure, name) for name, figure in figures.items()},
        contrasts(study, samples),
    )
    numbers = json.dumps(as_numbers(analysis), indent=2, ensure_ascii=False, allow_nan=False)
    files = {
        f"tables/{table.name}.{ending}": form(table).encode("utf-8", "replace")
        for table in (*tables, tasks_table(analysis))
        for ending, form in (("md", markdown), ("csv", comma_separated), ("tex", latex))
    }
    for name, figure in figures.items():
        files |= {f"figures/{name}.png": png(figure), f"figures/{name}.pdf": pdf(figure)}
    files["report.json"] = f"{numbers}\n".encode("utf-8", "backslashreplace")  # a lone surrogate, as JSON
    files["report.html"] = html.encode("utf-8", "replace")
    try:
        for folder in (out / "tables", out / "figures"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    for name, content in files.items():
        write_whole(out / name, content, sync=False)  # made again in seconds
    return out / "report.html", analysis, tables


def as_numbers(analysis: Analysis) -> dict[str, Any]:
    """The report for programs: one entry per run, NaN as null."""

    def difference(value: Difference | None) -> dict[str, Any] | None:
        return None if value is None else {**asdict(value.interval), "p": value.p, "p_holm": value.p_holm}

    runs = [
        {
            "policy": row.run.label,
            "reconstruction": row.run.reconstruction or None,
            "budget": None if row.run.full else row.run.budget,
            "folder": row.run.folder.name,
            "average": asdict(row.average),
            "failed": row.failed,
            "tasks": {task: {"score": mean, "n": n} for task, (mean, n) in row.tasks.items()},
            "difference_to_full": difference(row.full),
            "difference_to_baseline": difference(row.baseline),
            "fidelity": {name: asdict(interval) for name, interval in row.fidelity.items()},
            "memory": row.run.metrics.get("memory") or {},
            "total_bytes": row.total_bytes,
            "total_share": row.total_share,
        }
        for row in analysis.rows
    ]
    study = analysis.study
    head = {
        "model": study.model,
        "baseline": study.baseline,
        "samples": study.scored,
        "summary": summary(analysis),
    }
    method = {"resamples": analysis.resamples, "seed": analysis.seed, "comparability": study.comparability}
    cleaned: dict[str, Any] = _no_nan({**head, **method, "warnings": list(study.warnings), "runs": runs})
    return cleaned


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _no_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(analysis: Analysis, tables: Sequence[Table], console: Console) -> None:
    """Warnings, the tables that fit a terminal, the summary."""
    for warning in analysis.study.warnings:
        console.print(f"note: {visible(warning)}", markup=False, style="yellow")
    for table in tables:
        if table.name == "comparison" or (table.name == "scores" and len(table.columns) <= 10):
            console.print(terminal(table))
    for line in summary(analysis):
        console.print(f"- {visible(line)}", markup=False, highlight=False)
