"""What all figures share: colours, markers, axes, and how they become files or inline SVG."""

import io
import re
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evals.visible import shortened

INK = "#010203"  # text and lines; becomes the page's own text colour in inline SVG
LOOK: Any = {  # for matplotlib.rc_context while figures are drawn; names are never formulas
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (8, 2)))


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()


def pdf(figure: Figure) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(out, format="pdf", metadata={"CreationDate": None})
    return out.getvalue()


def inline_svg(figure: Figure, name: str) -> str:
    """For a page: real text, the page's text colour, no background, ids that no other figure uses."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'href="#', f'href="#{name}-', text)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, none of pyplot's global state
    return figure


def series_style(i: int) -> dict[str, Any]:
    """Marker, dash and size of the i-th policy; hollow markers the second time round."""
    return {
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "markersize": 6,
        "linewidth": 1.6,
        "markerfacecolor": "none" if i >= len(COLOURS) else None,
    }


def plain_axes(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(axis=grid, color=INK, alpha=0.12, linewidth=0.7)


def plain_text(label: str) -> str:
    """A name that fits a picture; matplotlib leaves those that begin with an underscore out of legends."""
    return shortened(label.lstrip("_"))
