"""The report in W&B: the same tables, figures and page, as a run of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.compare.analysis import Analysis
from src.report.formats import Table
from src.tracking.wandb import Tracking, WandbTracker


def track_report(mode: str, project: str, out: Path, analysis: Analysis, tables: Sequence[Table]) -> bool:
    """Log what `out` holds; False where W&B is off or did not start (src.tracking.wandb says why)."""
    study = analysis.study
    config = {
        "model": study.model,
        "policies": [study.shown(label) for label in study.labels],
        "budgets": study.budgets,
        "baseline": study.baseline,
        "comparability": study.comparability,
        "folders": [run.folder.name for run in study.runs],
    }
    tracking = Tracking(mode, project=project, tags=["report"])
    tracker = tracking.start(out, config, f"report {study.model}")
    if not isinstance(tracker, WandbTracker):
        return False
    tracker._attempt(lambda: _log(tracker, out, tables))
    tracker.finish({"average": None, "samples": study.scored, "failed": 0}, [])
    return True


def _log(tracker: WandbTracker, out: Path, tables: Sequence[Table]) -> None:
    import wandb

    values: dict[str, object] = {"samples": 0}
    for table in tables:
        names: list[str | int] = [f"{c.key or c.name} ({c.note})" if c.note else c.key or c.name for c in table.columns]
        rows: list[Any] = [[cell.text for cell in row] for row in table.rows]
        values[f"tables/{table.name}"] = wandb.Table(columns=names, data=rows)
    for picture in sorted((out / "figures").glob("*.png")):
        values[f"figures/{picture.stem}"] = wandb.Image(str(picture))
    page = (out / "report.html").read_text(encoding="utf-8")
    values["report"] = wandb.Html(page, inject=False)
    tracker._run.log(values)
