"""A picture that moves: as a GIF, and as a page that plays it."""

import io

import numpy as np

from kopt.plot import player
from kopt.plot.picture import figure_of

FRAMES = 72  # at most, besides the last, which stays
MILLISECONDS, LAST = 60, 2000
SHADES = 200  # colors of a GIF, besides those of the lines
GIF_DPI = 84


class Motion:
    """The lines of a picture, growing step by step.

    Args:
        axes: Where the paths are, and where the losses are.
        paths: What is drawn there, as `paths.drawn_paths` returns it.
        scene: A function that makes what the page plays.
    """

    def __init__(self, axes, paths, scene):
        self.axes, self.paths, self.scene = axes, paths, scene
        self.heights = [path.line.get_ydata().copy() for path in paths]

    def save(self, file, ending) -> None:
        if ending == ".html":
            with open(file, "w", encoding="utf-8", newline="\n") as page:
                page.write(player.page(self.scene()))
            return
        frames = self.frames()
        first, *others = _with_one_palette(frames, [path.on_map.get_color() for path in self.paths])
        times = [MILLISECONDS] * (len(frames) - 1) + [LAST]
        first.save(file, format="GIF", save_all=True, append_images=others, duration=times, loop=0, optimize=True)

    def frame(self) -> str:
        return player.frame(self.scene())

    def steps(self) -> list[int]:
        """The step that each frame shows."""
        last = max(path.last_seen for path in self.paths)
        return sorted({round(step) for step in np.linspace(0, last, min(last, FRAMES) + 1)})

    def frames(self) -> list:
        """The picture after each of those steps, as arrays; what does not move is drawn once."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = figure_of(self.axes[0])
        kept, dpi, layout = figure.canvas, figure.dpi, figure.get_layout_engine()
        lines = [line for path in self.paths for line in (path.on_map, path.head, path.line)]
        canvas = FigureCanvasAgg(figure)
        try:
            figure.set_dpi(GIF_DPI)
            for line in lines:
                line.set_animated(True)
            canvas.draw()  # lays out the axes, for the last time
            figure.set_layout_engine("none")
            still, found = canvas.copy_from_bbox(figure.bbox), []
            for step in self.steps():
                canvas.restore_region(still)
                self._show(step)
                for line in lines:
                    line.axes.draw_artist(line)
                found.append(np.array(canvas.buffer_rgba())[..., :3])
            return found
        finally:
            for line in lines:
                line.set_animated(False)
            self._show(max(path.run.last for path in self.paths))
            figure.set_layout_engine(layout)
            figure.set_dpi(dpi)
            figure.set_canvas(kept)

    def _show(self, step) -> None:
        for path, heights in zip(self.paths, self.heights, strict=True):
            now = min(step, path.run.last)
            path.on_map.set_data(*path.points[: now + 1].T)
            path.head.set_data(*path.heads[now : now + 1].T)
            path.line.set_data(np.arange(now + 1), heights[: now + 1])


def in_few_colors(file) -> bytes:
    """A PNG of a third of the size, which nobody can tell from the one in the file."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def _with_one_palette(frames, colors) -> list:
    """The frames in the same few colors, so that what does not move stays the same."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    exact = [[round(255 * part) for part in to_rgb(color)] for color in ["white", "black", *colors]]
    shades = Image.fromarray(frames[-1]).quantize(SHADES, dither=Image.Dither.NONE).getpalette()[: 3 * SHADES]
    palette = np.array(exact + np.reshape(shades, (-1, 3)).tolist(), "int16")
    every = np.indices((32, 32, 32), "int16") * 255 // 31  # all colors, in 5 bits each
    cells = every.reshape(3, -1).T[:, None]
    nearest = np.abs(cells - palette).sum(-1).argmin(1).astype("uint8").reshape(32, 32, 32)
    found = []
    for frame in frames:
        image = Image.fromarray(nearest[tuple(np.moveaxis(frame >> 3, -1, 0))], "P")
        image.putpalette(palette.astype("uint8").tobytes())
        found.append(image)
    return found
