"""How much of what one policy keeps another keeps too, at equal budget."""

from src.compare.analysis import Analysis, Row
from src.errors import Damaged, InputError
from src.report.formats import Column, Table, TableCell, number
from src.report.tables import BUDGET, POLICY
from src.retention.measures import overlap
from src.retention.store import Retention, load_retention


def overlap_table(analysis: Analysis) -> Table | None:
    """Jaccard overlap of the positions kept after the prompt, each pair at equal budget; None below two policies."""
    kept = {id(row): file for row in analysis.budgeted if (file := _kept(row)) is not None}
    labels = [name for name in analysis.study.labels if any(r.run.label == name for r in _with(analysis, kept))]
    rows: list[tuple[TableCell, ...]] = []
    known: dict[frozenset[int], TableCell] = {}  # both ways round it is the same
    for row in _with(analysis, kept):
        alike = {other.run.label: other for other in _with(analysis, kept) if other.run.budget == row.run.budget}
        cells = [_shared(kept, known, row, alike.get(label)) for label in labels]
        rows.append((TableCell(row.run.shown), TableCell(f"{row.run.budget:g}", row.run.budget), *cells))
    for file in kept.values():
        file.close()
    if len(labels) < 2:
        return None
    columns = (
        POLICY,
        BUDGET,
        *(Column(name, "% in common", key=f"overlap with {name}") for name in map(analysis.study.shown, labels)),
    )
    note = (
        "Positions that both keep / positions that either keeps, after the prompt; every sample, layer and head weighs "
        "the same. Forced windows count: two policies that keep the last half of their budget share that half."
    )
    if any(cell.text == "damaged" for row in rows for cell in row[2:]):
        note += " Damaged: retention.npz of one of the two; its run's command, launched again, computes what is lost."
    return Table("overlap", "What two policies keep in common", columns, tuple(rows), note=note)


def _with(analysis: Analysis, kept: dict[int, Retention]) -> list[Row]:
    return [row for row in analysis.budgeted if id(row) in kept]


def _kept(row: Row) -> Retention | None:
    """Exact positions, if the run recorded them."""
    if row.run.budget is None or not (row.run.folder / "retention.npz").exists():
        return None
    try:
        file = load_retention(row.run.folder)
    except InputError:  # src/report/contrasts.py says so
        return None
    if file.keys and not file.binned(file.keys[0]):
        return file
    file.close()
    return None


def _shared(
    kept: dict[int, Retention], known: dict[frozenset[int], TableCell], row: Row, other: Row | None
) -> TableCell:
    if other is None or other is row:
        return TableCell("–")
    pair = frozenset((id(row), id(other)))
    if pair not in known:
        try:
            share = 100 * overlap(kept[id(row)], kept[id(other)])["mean"]
            known[pair] = TableCell(number(share, 1), share)
        except Damaged:
            known[pair] = TableCell("damaged")
        except InputError:  # no sample in common, or only counts of some
            known[pair] = TableCell("–")
    return known[pair]
