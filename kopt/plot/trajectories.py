"""Pictures of optimizers on a surface of two weights: still, moving, and as a page that plays them."""

from kopt import checks, landscape
from kopt.plot.animation import Motion
from kopt.plot.paths import Losses, draw_map, drawn_paths, title_of
from kopt.plot.picture import Picture, columns_of, finished, in_own_style, panels, saves, tidy
from kopt.plot.scene import caption, scene

WIDTH = 135  # letters of a legend in a line


@in_own_style
def trajectories(
    optimizers,
    surface=None,
    *,
    steps: int | None = None,
    start=None,
    view=None,
    tune: int | None = None,
    title: str | None = None,
    ax=None,
    save=None,
    show: bool = False,
) -> Picture:
    """Run optimizers on a surface of two weights, and draw where they go and how the loss falls.

    A still picture, or one that moves: `save="beale.gif"`, and `save="beale.html"` for a page by itself with which to
    play and step. What diverges is drawn until then, and named with its step.

    A picture of two weights tells how a rule moves: what momentum, a long valley or a saddle does to it. It does not
    tell which rule trains a network best: there are no batches and no noise, and among millions of weights other things
    decide.

    Args:
        optimizers: Names, as in `["sgd", "momentum", "adam=0.1"]`, optimizers of Keras or kopt, or a dict of them from
            labels, as `kopt.landscape.trajectories` takes them; or what it has returned, to be drawn again.
        surface: "beale" if nothing is said, "saddle", "long_valley", "rosenbrock", "himmelblau", "rastrigin", "bowl",
            "plateau", a function of two tensors, or a `kopt.landscape.Surface`.
        steps: How many; by default what tells something on the surface.
        start: Where to begin, two numbers.
        view: What to show, `((left, right), (bottom, top))`.
        tune: Find every learning rate in so many tries. Without it, that is done, in 19, for names without a rate.
        title: Above the map.
        ax: Two axes of matplotlib to draw in, for the map and the losses; None makes a new figure.
        save: A path to write to, or several: .png, .svg, .pdf, .jpg, .gif or .html.
        show: Whether to open a window.

    Returns:
        A `Picture`, whose `record` is what `kopt.landscape.trajectories` returns. Its data are `x`, `y`, `z` of the map
        and `<label>/points`, `<label>/losses` of each optimizer.

    Example:
        >>> import kopt
        >>> picture = kopt.plot.trajectories(["momentum=0.003", "lbfgs"], "beale", steps=20)
        >>> [line.get_label() for line in picture.axes[1].lines]
        ['momentum, rate 0.003', 'L-BFGS, line search']
    """
    files = saves(save, ax, show, moves=True, counts=[2])
    title = checks.optional(checks.sentence)("title", title)
    asked = {"surface": surface, "steps": steps, "start": start, "view": view, "tune": tune}
    asked = {name: value for name, value in asked.items() if value is not None}
    if isinstance(optimizers, landscape.Trajectories):
        record = optimizers
        for name, value in asked.items():
            checks.refuse(name, "left out where a record is drawn again", value)
    else:
        record = landscape.trajectories(optimizers, **asked)
    title, losses = title_of(record) if title is None else title, Losses(record)
    axes = panels(ax, 1, 2, (9.6, 4.6), show)
    draw_map(axes[0], record, title)
    paths = drawn_paths(axes, record, losses)
    tidy(axes[1], "step", losses.label)
    axes[1].set(xlim=(0, max(path.last_seen for path in paths) or 1), yscale=losses.scale, ylim=losses.span())
    if ax is None:
        lines = [path.line for path in paths]
        columns = columns_of([line.get_label() for line in lines], WIDTH)
        look = {"ncols": columns, "frameon": False, "fontsize": 9, "handlelength": 1.5}
        axes[0].figure.legend(handles=lines, loc="outside upper left", **look)
        axes[0].figure.supxlabel(caption(record), fontsize=8, color="#555555", x=0.01, ha="left")
    else:
        axes[1].legend(frameon=False, fontsize=8)
    data = {"x": record.x, "y": record.y, "z": record.z}
    for path in paths:
        data |= {f"{path.run.label}/points": path.points, f"{path.run.label}/losses": path.losses}
    return finished(axes, data, files, show, record, Motion(axes, paths, lambda: scene(record, paths, losses, title)))
