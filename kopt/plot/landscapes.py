"""Pictures of a model's loss along lines and in planes of its weights."""

import keras
import numpy as np

from kopt import checks, landscape
from kopt.plot.picture import BAD, COLORS, INK, QUIET, Picture, finished, in_own_style, panels, saves, tidy

LEVELS = 12
WIDE = 30  # how many times the lowest loss the highest is for a logarithmic scale


@in_own_style
def slice_1d(model, x=None, y=None, *, metrics=None, ax=None, save=None, show: bool = False, **how) -> Picture:
    """Draw the loss of a model along a line of weights, with the points that it goes through, and the barriers.

    Args:
        model: A model, of which `kopt.landscape.slice_1d` finds the record, or a record to be drawn again.
        x: The inputs, or data with targets.
        y: The targets.
        metrics: What to draw, a name or a list, each in a panel. None: the loss, and the first metric if there is one.
        ax: The axes of matplotlib to draw in, as many as there are panels; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.
        **how: Others of `kopt.landscape.slice_1d`: `points`, `n`, `update_bn`, ...

    Returns:
        A `Picture`: `figure, data = picture`, and `picture.record` is the record.

    Example:
        >>> import kopt, numpy as np
        >>> positions = np.linspace(0, 1, 5)
        >>> record = kopt.landscape.Slice(
        ...     positions, {"loss": [1.0, 2.0, 3.0, 2.0, 0.0]}, [0, 1], "share of the way")
        >>> picture = kopt.plot.slice_1d(record)
        >>> picture.data["loss"].tolist()
        [1.0, 2.0, 3.0, 2.0, 0.0]
    """
    files, record = _begun(landscape.Slice, landscape.slice_1d, model, x, y, metrics, ax, save, show, how)
    names = _names(record, metrics, 2)
    axes = panels(ax, 1, len(names), (7 if len(names) == 1 else 4 * len(names) + 1, 3.4), show)
    for place, (name, one) in enumerate(zip(names, axes, strict=True)):
        _line(one, record, name, COLORS[place % len(COLORS)])
    data = {"positions": record.positions, **{name: record.values[name] for name in names}}
    return finished(axes, data | {"marks": record.marks, "barriers": record.barriers}, files, show, record)


@in_own_style
def plane(model, x=None, y=None, *, metrics=None, ax=None, save=None, show: bool = False, **how) -> Picture:
    """Draw the loss of a model in a plane of weights, with the points in it and the path from one to the next.

    The levels of the loss rise by equal factors above its lowest, so that the basin is seen; the highest tenth is one
    color.

    Args:
        model: A model, of which `kopt.landscape.plane` finds the record, or a record to be drawn again.
        x: The inputs, or data with targets.
        y: The targets.
        metrics: What to draw, a name or a list, each in a panel. None: the loss.
        ax: The axes of matplotlib to draw in, as many as there are panels; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf or .jpg.
        show: Whether to open a window.
        **how: Others of `kopt.landscape.plane`: `points`, `n`, `update_bn`, ...

    Returns:
        A `Picture`: `figure, data = picture`, and `picture.record` is the record.

    Example:
        >>> import kopt, numpy as np
        >>> x = y = np.linspace(-1, 1, 9)
        >>> record = kopt.landscape.Plane(
        ...     x, y, {"loss": x**2 + y[:, None] ** 2}, points=[[0, 0]], distances=[0], unit="filter norms")
        >>> picture = kopt.plot.plane(record)
        >>> picture.data["lowest"].tolist()
        [0.0, 0.0, 0.0]
    """
    files, record = _begun(landscape.Plane, landscape.plane, model, x, y, metrics, ax, save, show, how)
    names = _names(record, metrics, 1)
    axes = panels(ax, 1, len(names), (5.2 * len(names) + 0.8, 4.6), show)
    for name, one in zip(names, axes, strict=True):
        _map(one, record, name)
    data = {"x": record.x, "y": record.y, **{name: record.values[name] for name in names}}
    data |= {"points": record.points, "distances": record.distances, "lowest": record.lowest or [np.nan] * 3}
    return finished(axes, data, files, show, record)


def _begun(kind, compute, model, x, y, metrics, ax, save, show, how) -> tuple:
    """The files to write, and the record: the one that is given, or that of the model."""
    names = _metrics(metrics)
    files = saves(save, ax, show, counts=[len(names)] if names else [1, 2][: 1 + (kind is landscape.Slice)])
    if not isinstance(model, kind):
        if not isinstance(model, keras.Model):
            checks.refuse("model", f"a keras.Model, or a kopt.landscape.{kind.__name__}", model)
        if names:  # which are known once the model was evaluated
            data = {name: how[name] for name in ("batch_size", "sample_weight") if name in how}
            look = landscape.slice_1d(model, x, y, positions=[0.0], update_bn=False, verbose=0, **data)
            _names(look, names, 0)
        return files, compute(model, x, y, **how)
    for name, value in {"x": x, "y": y, **how}.items():
        if value is not None or name in how:
            checks.refuse(name, f"left out, where a {kind.__name__} is drawn again", value)
    return files, model


def _names(record, metrics, most) -> list[str]:
    """What to draw, by name."""
    known = [name for name, values in record.values.items() if values.ndim == record.loss.ndim]
    if metrics is None:
        return ["loss", *(name for name in known if not name.endswith("loss"))][:most]
    names = _metrics(metrics)
    if not set(names) <= set(known):
        checks.refuse("metrics", f"some of {', '.join(map(repr, known))}", metrics)
    return names


def _metrics(metrics) -> list[str] | None:
    """The names that are asked for, if any are."""
    which = "the name of a metric, or a list of them"
    return checks.optional(checks.one_or_several(checks.sentence, which))("metrics", metrics)


def _line(ax, record, name, color) -> None:
    positions, values = record.positions, record.values[name]
    finite = np.isfinite(values)
    ax.plot(positions, np.where(finite, values, np.nan), color=color)
    ax.plot(positions[~finite], np.full((~finite).sum(), 0.97), "x", color=BAD, transform=ax.get_xaxis_transform())
    if not finite.all():
        ax.text(0.5, 0.9, "x: not finite", color=BAD, ha="center", transform=ax.transAxes)
    marked = np.isin(positions, record.marks)
    ax.plot(positions[marked], np.where(finite, values, np.nan)[marked], "o", color=INK, markersize=5)
    seen = values[finite]
    if len(seen) and 0 < seen.min() * WIDE < seen.max():
        ax.set_yscale("log")
    if name == "loss":
        for leg in range(len(record.marks) - 1):
            _barrier(ax, record, leg)
    ax.locator_params(axis="x", nbins=8)
    tidy(ax, _axis(record), name)


def _axis(record) -> str:
    if record.unit == "points passed":
        return "position: a point at each integer"
    return record.unit if record.unit == "share of the way" else f"along a random direction ({record.unit})"


def _barrier(ax, record, leg) -> None:
    """The straight line between two points, and how high the loss rises above it."""
    height, (positions, loss, straight) = record.barriers[leg], record.leg(leg)
    if not 0 < height < np.inf:
        return
    ax.plot(positions, straight, linestyle=":", color=INK)
    top = int(np.argmax(loss - straight))
    ends = (positions[top], straight[top]), (positions[top], loss[top])
    ax.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0})
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom", "bbox": box}
    ax.annotate(f"barrier {height:.3g}", ends[1], **where)
    ax.margins(y=0.15)


def _map(ax, record, name) -> None:
    from matplotlib.colors import BoundaryNorm

    values, is_loss = record.values[name], name == "loss"
    levels = _levels(values, is_loss)
    how = {"norm": BoundaryNorm(levels, 256, extend="max"), "extend": "max"} if is_loss else {}
    shown = ax.contourf(record.x, record.y, np.ma.masked_invalid(values), levels, cmap="cividis", **how)
    ax.figure.colorbar(shown, ax=ax, format="%.3g", ticks=levels[::2], shrink=0.9).set_label(name)
    ax.set_facecolor(QUIET)
    _path(ax, record)
    notes = []
    if is_loss and record.lowest is not None:
        ax.plot(*record.lowest[:2], "*", color="white", markeredgecolor=INK, markersize=11, clip_on=False, zorder=4)
        notes.append(f"\N{BLACK STAR} lowest {record.lowest[2]:.3g}")
    if record.distances.any():
        notes.append(f"points up to {record.distances.max():.2g} off the plane")
    if not np.isfinite(values).all():
        notes.append("gray: not finite")
    ax.set_title("; ".join(notes), fontsize="medium", loc="left")
    ax.set_xlabel(f"first direction ({record.unit})")
    ax.set_ylabel(f"second direction ({record.unit})")
    ax.locator_params(nbins=7)
    ax.set_aspect("equal")


def _levels(values, rises) -> np.ndarray:
    """The borders of the colors: even ones, or of a loss such that its rise above the lowest grows by equal factors."""
    seen = values[np.isfinite(values)]
    low, high = (seen.min(), seen.max()) if len(seen) else (0.0, 1.0)
    if not high > low:
        return np.array([low, low + max(1e-12, 1e-6 * abs(low))])
    if not rises or not len(seen):
        return np.linspace(low, high, LEVELS)
    above = seen - low
    most = np.quantile(above, 0.9) or above.max()
    least = max(np.quantile(above[above > 0], 0.02), most * 1e-3)
    return low + np.append(0, np.geomspace(least, most, LEVELS) if least < most else most)


def _path(ax, record) -> None:
    """The points, with their numbers where these do not cover each other, and the way from one to the next."""
    points, labeled = record.points, []
    for color, width in ((INK, 3.0), ("white", 1.4)):  # the edges let it be seen on any color
        ax.plot(*points.T, "-" if len(points) > 1 else "", color=color, linewidth=width)
    ax.plot(*points.T, "o", color="white", markeredgecolor=INK, markersize=5)
    least = 0.06 * np.ptp(record.x)
    for number in [0, len(points) - 1, *range(1, len(points) - 1)]:
        if all(np.linalg.norm(points[number] - points[other]) > least for other in labeled):
            labeled.append(number)
            ax.plot(*points[number], "o", color="white", markeredgecolor=INK, markersize=13)
            how = {"ha": "center", "va": "center_baseline", "fontsize": 8, "color": INK}
            ax.text(*points[number], str(number + 1), **how)
