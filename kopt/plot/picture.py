"""What every picture has in common: its axes, its colors, and files that are the same whenever they are written."""

import contextlib
import functools
import io
import os

import numpy as np

from kopt import checks

# What is told apart by the color-blind, too (Okabe and Ito), darkest first where it matters on white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
GOOD, BAD, QUIET, INK = "#009E73", "#D55E00", "#BBBBBB", "#000000"
LINES = ["-", "--", ":", "-."]  # when all colors are used
STILL, MOVING = (".png", ".svg", ".pdf", ".jpg"), (".gif", ".html")
DPI = 110
HANDLE = 6  # letters that the line and the space before a label of a legend take
SAME = {  # what would tell the files of two runs apart, by their ending
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".jpg": None,
}


class Picture:
    """A figure of matplotlib, and the arrays that it shows: `figure, data = picture`. Functions of `kopt.plot` make it.

    A notebook shows it. What moves can be saved as `.gif` and as `.html`, a page by itself that plays it, too.

    Args:
        axes: The axes that are drawn in.
        data: The arrays, by name.
        record: What was drawn.
        motion: What saves it as something that moves, if it does.

    Example:
        >>> import kopt
        >>> picture = kopt.plot.schedule(kopt.schedules.CosineDecay(), steps=3)
        >>> figure, data = picture
        >>> data["CosineDecay()"].round(2).tolist()
        [1.0, 0.75, 0.25]

    Attributes:
        figure: The figure, to change or to save in matplotlib's own ways.
        record: What was drawn, if drawing began with a computation, to be drawn again; otherwise None.
    """

    _style = None  # of matplotlib, in which it was drawn

    def __init__(self, axes, data: dict, record=None, motion=None):
        self.axes, self.data, self.record, self._motion = list(axes), data, record, motion

    @property
    def figure(self):
        return figure_of(self.axes[0])

    def __iter__(self):
        return iter((self.figure, self.data))

    def save(self, *files) -> None:
        """Write it to files; how is said by the ending of each."""
        for file in _checked("files", files, self._motion is not None):
            os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
            ending = os.path.splitext(file)[1].lower()
            with _styled(self._style):
                self._motion.save(file, ending) if ending in MOVING else _write(self.figure, file, ending)

    def _repr_png_(self):
        file = io.BytesIO()
        with _styled(self._style):
            _write(self.figure, file, ".png")
        return file.getvalue()

    def _repr_html_(self):
        if self._motion is None:
            return None
        with _styled(self._style):
            return self._motion.frame()

    def __repr__(self):
        return f"<Picture of {', '.join(map(str, self.data))}>"


def figure_of(ax):
    """The whole figure, not the part of it that axes may be in."""
    return ax.figure.figure


def _write(figure, file, ending) -> None:
    with imported().rc_context({"svg.hashsalt": "kopt", "svg.fonttype": "none"}):
        figure.savefig(file, dpi=DPI, format=ending[1:], metadata=SAME[ending])


def imported():
    """matplotlib, or one sentence on how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("Pictures need matplotlib: `pip install kopt[plot]`") from None
    return matplotlib


def in_own_style(draw):
    """The function, whose own figures look the same whatever style is set; axes that are given keep theirs."""

    @functools.wraps(draw)
    def drawn(*given, **named):
        if named.get("ax") is not None:
            return draw(*given, **named)
        imported()
        with _styled("default"):
            picture = draw(*given, **named)
        picture._style = "default"
        return picture

    return drawn


@contextlib.contextmanager
def _styled(name):
    if name is None:
        yield
        return
    from matplotlib import style

    with style.context(name):
        yield


def saves(save, ax=None, show=False, moves: bool = False, counts=()) -> list[str]:
    """The files that `save=` names, if any; what cannot be drawn into or shown is refused before anything is done.

    `counts` are the numbers of axes that there may be, if that is known by now.
    """
    if ax is not None:
        given = axes_of(ax)
        if counts and len(given) not in counts:
            _refuse_axes(ax, counts)
    if checks.boolean("show", show) and ax is not None:
        checks.refuse("show", "False beside `ax`, whose figure is yours to show", show)
    imported()
    if save is None:
        return []
    return _checked("save", save if isinstance(save, (list, tuple)) else [save], moves)


def axes_of(ax) -> list:
    """The axes of matplotlib that are given: one, a list or an array of them."""
    given = [ax] if hasattr(ax, "plot") else list(np.ravel(np.asarray(ax, object)))
    if not given or not all(hasattr(one, "plot") for one in given):
        checks.refuse("ax", "axes of matplotlib, or a list of them", ax)
    if len({id(one) for one in given}) < len(given) or len({id(figure_of(one)) for one in given}) > 1:
        checks.refuse("ax", "different axes of one figure", ax)
    return given


def _refuse_axes(ax, counts):
    allowed = " or ".join("one of matplotlib's axes" if n == 1 else f"{n} axes of matplotlib" for n in counts)
    return checks.refuse("ax", allowed, ax)


def _checked(name, files, moves) -> list[str]:
    endings = STILL + MOVING * moves
    allowed = f"a path, or a list of them, that ends in {', '.join(endings[:-1])} or {endings[-1]}"
    if not moves:
        allowed += "; only what moves can be a .gif or .html" * any(str(f).lower().endswith(MOVING) for f in files)
    for file in files:
        if not isinstance(file, (str, os.PathLike)) or os.path.splitext(str(file))[1].lower() not in endings:
            checks.refuse(name, allowed, file)
    return [os.path.expanduser(file) for file in files]


def panels(ax, rows: int = 1, columns: int = 1, size=(7, 3.5), show: bool = False, **grid) -> list:
    """The axes to draw in: those that are given, or those of a new figure.

    A figure is no window: pyplot, which keeps one open, is asked only if it shall be shown.
    """
    if ax is not None:
        given = axes_of(ax)
        return given if len(given) == rows * columns else _refuse_axes(ax, [rows * columns])
    if show:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size, layout="constrained")
    else:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
    return list(np.ravel(figure.subplots(rows, columns, squeeze=False, **grid)))


def finished(axes, data, files, show, record=None, motion=None) -> Picture:
    """The picture, saved where that was asked for, and shown if that was."""
    picture = Picture(axes, {name: np.asarray(array) for name, array in data.items()}, record, motion)
    picture.save(*files)
    if show:
        from matplotlib import pyplot

        pyplot.show()
    return picture


def styles(count: int) -> list[dict]:
    """A color and a kind of line for each of so many curves, no two alike up to 32."""
    return [{"color": COLORS[i % len(COLORS)], "linestyle": LINES[i // len(COLORS) % len(LINES)]} for i in range(count)]


def plain(text: str) -> str:
    """A name in which `$` is a sign, as in a regular expression, and no mathematics begins."""
    return text.replace("$", r"\$")


def label_of(text: str) -> str:
    """A name as matplotlib shows it in a legend: it hides those with `_` in front, and fails on a `$` without sense."""
    from matplotlib.mathtext import MathTextParser

    text = f" {text}" if text.startswith("_") else text
    try:
        MathTextParser("path").parse(text)
    except ValueError:
        return plain(text)
    return text


def columns_of(labels, width: float, most: int = 4) -> int:
    """In how many columns a legend of these labels is no wider than so many letters."""
    for columns in range(min(most, len(labels)), 1, -1):
        rows = -(-len(labels) // columns)
        parts = [labels[start : start + rows] for start in range(0, len(labels), rows)]
        if sum(max(map(len, part)) + HANDLE for part in parts) <= width:
            return columns
    return 1


def tidy(ax, x: str, y: str, legend: str | None = None) -> None:
    """What the axes say, a grid, and a legend where no curve is: "beside" or "above"; none where there is no label."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if not ax.get_legend_handles_labels()[0]:
        return
    if legend == "beside":
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    elif legend == "above":
        columns = columns_of(ax.get_legend_handles_labels()[1], 100)
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, ncols=columns, fontsize=9)
