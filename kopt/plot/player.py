"""A page that plays a moving picture: one file of HTML that loads nothing, with its script and its data within."""

import base64
import html
import json
import math
import re
from importlib import resources

import numpy as np

FINE = 4  # digits of a coordinate within the span of the map: a tenth of a pixel


def page(scene: dict) -> str:
    """The whole page. Equal scenes make equal pages.

    Args:
        scene: What is played. `title` and `caption` are text. `map` is the picture under the paths: `image`, the bytes
            of a PNG; `width` and `height`, in pixels; `left`, `top`, `right` and `bottom`, where in it the axes are;
            `x` and `y`, from where to where they reach. `runs` is a list, for each line a `label`, a `note` (its rate),
            a `color`, the `points`, as many `losses`, and an `end`, which says what became of it, or nothing. `loss` is
            the axis of the losses: `low`, `high`, a `label`, and `log`, whether it is logarithmic.
    """
    area = scene["map"]
    parts = {
        **{name: html.escape(scene[name]) for name in ("title", "caption")},
        **{name: str(int(area[name])) for name in ("width", "height")},
        "image": base64.b64encode(area["image"]).decode(),
        "scene": _json(_data(scene)),
    }
    template = resources.files("kopt.plot").joinpath("player.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda hole: parts[hole[1]], template)


def frame(scene: dict) -> str:
    """The page in a frame, for a notebook, which keeps its styles and its keys apart."""
    area = scene["map"]
    beside = 285 + 26 * len(scene["runs"])  # the losses and the legend, beside the map and its buttons
    height = max(round(500 * area["height"] / area["width"]) + 50, beside) + 115
    style = f"width: 100%; max-width: 1000px; height: {height}px; border: 0"
    title, inner = html.escape(scene["title"]), html.escape(page(scene))
    return f'<iframe title="{title}" style="{style}" sandbox="allow-scripts" srcdoc="{inner}"></iframe>'


def _data(scene) -> dict:
    """What the script reads: no more digits than are seen, and null where there is no finite number."""
    area = scene["map"]
    return {
        "map": {
            **{name: float(area[name]) for name in ("left", "top", "right", "bottom")},
            **{name: [float(end) for end in area[name]] for name in "xy"},
        },
        "runs": [
            {
                **{name: run[name] for name in ("label", "note", "color", "end")},
                "points": _points(run["points"], area["x"], area["y"]),
                "losses": [_seen(loss) for loss in _floats(run["losses"])],
            }
            for run in scene["runs"]
        ],
        "loss": {
            "log": bool(scene["loss"]["log"]),
            **{name: _seen(scene["loss"][name]) for name in ("low", "high")},  # as the losses, which may lie there
            "label": scene["loss"]["label"],
        },
    }


def _points(points, *spans) -> list:
    digits = [FINE - math.floor(math.log10(high - low)) for low, high in spans]
    return [
        [round(value, to) for value, to in zip(point, digits, strict=True)] if all(map(math.isfinite, point)) else None
        for point in _floats(points)
    ]


def _seen(loss) -> float | None:
    return float(f"{loss:.4g}") if math.isfinite(loss) else None


def _floats(values) -> list:
    return np.asarray(values, float).tolist()


def _json(data) -> str:
    """JSON that may stand in an element <script>, which ends at `</script` wherever that stands."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
