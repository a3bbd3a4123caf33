"""What the player of a page needs of a picture of trajectories."""

import io

from kopt.plot.animation import in_few_colors
from kopt.plot.paths import draw_map
from kopt.plot.picture import panels

SHARP = 120  # dots per inch of the map


def caption(record) -> str:
    """What the picture tells, and what it does not."""
    lines = ["Two weights, no batches, no noise: how each rule moves, not which one trains a network best."]
    tuned = [run for run in record.runs if run.tried]
    if tuned:
        has_given = any(run.learning_rate is not None and not run.tried for run in record.runs)
        counts = " or ".join(map(str, sorted({len(run.tried) for run in tuned})))
        lines.append(f"{'Rates that were not given' if has_given else 'Each rate'}: the best of {counts}.")
    if searching := [run.label for run in record.runs if run.is_search]:
        lines.append(f"A step of {' and '.join(searching)} is an evaluation in a line search, which noise would break.")
    return "\n".join(part for part in (lines[0], " ".join(lines[1:])) if part)


def scene(record, paths, losses, title) -> dict:
    """The map as an image with the place of its axes, and the lines over it as numbers."""
    (ax,) = panels(None, size=(5.2, 4.6))  # as large as the page shows it
    draw_map(ax, record, "")
    file, figure = io.BytesIO(), ax.figure
    figure.savefig(file, dpi=SHARP)
    box, (width, height), scale = ax.get_window_extent(), figure.canvas.get_width_height(), SHARP / figure.dpi
    low, high = losses.span()
    return {
        "title": title,
        "caption": caption(record).replace("\n", " "),
        "map": {
            "image": in_few_colors(file),
            "width": round(width * scale),
            "height": round(height * scale),
            "left": box.x0 * scale,
            "right": box.x1 * scale,
            "top": (height - box.y1) * scale,
            "bottom": (height - box.y0) * scale,
            "x": list(record.view[0]),
            "y": list(record.view[1]),
        },
        "runs": [
            {
                "label": path.run.label,
                "note": "" if path.run.learning_rate is None else f"{path.run.learning_rate:g}",
                "color": path.on_map.get_color(),
                "points": path.points.tolist(),
                "losses": losses.shown(path.losses).tolist(),
                "end": path.run.end,
            }
            for path in paths
        ],
        "loss": {"log": losses.is_log, "low": low, "high": high, "label": losses.label},
    }
