"""Optimizers on surfaces: real ones, compiled, from references that are not kopt's; what is drawn of them."""

import html.parser
import json

import keras
import numpy as np
import pytest
from keras import ops

import kopt
from kopt.landscape.surfaces import SURFACES
from kopt.landscape.words import TRIES
from kopt.plot.paths import COLOR_OF, _heads
from tests.conftest import BACKEND, FLOATX

trajectories = kopt.landscape.trajectories
TIGHT = 1e-12 if FLOATX == "float64" else 2e-5

IN_NUMPY = {  # the surfaces from their definitions
    "saddle": lambda x, y: x * x - y * y,
    "beale": lambda x, y: sum((c - x * (1 - y**i)) ** 2 for i, c in enumerate((1.5, 2.25, 2.625), 1)),
    "long_valley": lambda x, y: 5 * y * y + 0.1 * (np.hypot(1, x - 4) - 1),
    "rosenbrock": lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
    "himmelblau": lambda x, y: (x * x + y - 11) ** 2 + (x + y * y - 7) ** 2,
    "rastrigin": lambda x, y: sum(10 + v * v - 10 * np.cos(2 * np.pi * v) for v in (x, y)),
    "bowl": lambda x, y: np.einsum("i...,ij,j...", np.array([x, y]), BOWL, np.array([x, y])) / 2,
    "plateau": lambda x, y: -np.expm1(-(x * x + y * y) / 2),
}
IN_OPS = {name: surface.function for name, surface in SURFACES.items()}
TURN = np.array([[np.sqrt(3) / 2, 0.5], [-0.5, np.sqrt(3) / 2]])
BOWL = TURN.T @ np.diag([1.0, 100.0]) @ TURN


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces_are_those_of_the_papers(name):
    surface, view = SURFACES[name], np.array(SURFACES[name].view)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(view[:, :1], view[:, 1:], (2, 50))
    np.testing.assert_allclose(surface.values(x, y), IN_NUMPY[name](x, y), rtol=1e-4, atol=1e-4)
    for minimum in surface.minima:
        assert float(surface.values(*np.array(minimum)[:, None])[0]) == pytest.approx(surface.lowest, abs=1e-5)
    assert all(low < at < high for at, (low, high) in zip(surface.start, surface.view, strict=True))


def test_sgd_and_momentum_take_the_steps_of_the_paper():
    found = trajectories({"plain": kopt.SGD(0.01), "stock": keras.optimizers.SGD(0.01, momentum=0.9)}, "bowl", steps=20)
    w, v, points = np.array([[-4.0, 1.5]] * 2), np.zeros(2), [np.array([[-4.0, 1.5]] * 2)]
    for _ in range(20):
        gradient = w @ BOWL
        v = 0.9 * v - 0.01 * gradient[1]
        w = w + np.stack([-0.01 * gradient[0], v])
        points.append(w)
    for run, expected in zip(found.runs, np.swapaxes(points, 0, 1), strict=True):
        np.testing.assert_allclose(run.points, expected, rtol=TIGHT, atol=10 * TIGHT)
        np.testing.assert_allclose(run.losses, IN_NUMPY["bowl"](*expected.T), rtol=1e-3, atol=1e-3)
    assert [run.label for run in found.runs] == ["plain", "stock"]
    assert found.runs[0].learning_rate == pytest.approx(0.01)


def test_every_name_runs_and_optimizers_are_copied():
    given = kopt.Adam(0.1, beta_1=0.5)
    names = ["sgd=0.001", "momentum=0.001", "nesterov=0.001", "adagrad=0.1", "rmsprop=0.01", "adam=0.1", "adamw=0.1"]
    found = trajectories([*names, "lbfgs", "keras.Lion=0.01", given], "beale", steps=10)
    assert all(run.points.shape == (11, 2) and np.isfinite(run.points).all() for run in found.runs)
    assert all((run.points[0] == [1.0, 1.5]).all() and (run.points[1] != [1.0, 1.5]).all() for run in found.runs)
    labels = ["SGD", "momentum", "Nesterov", "Adagrad", "RMSprop", "Adam 1", "AdamW", "L-BFGS", "keras.Lion", "Adam 2"]
    assert [run.label for run in found.runs] == labels
    assert [run.is_search for run in found.runs] == [label == "L-BFGS" for label in labels]
    assert found.runs[7].learning_rate is None
    assert not given.built
    assert (found.runs[5].points[2] != found.runs[9].points[2]).any()  # its own beta_1


def test_lbfgs_comes_to_the_minimum_in_as_many_evaluations_as_minimize():
    (run,) = trajectories("lbfgs", "bowl", steps=40).runs
    x0 = np.array([-4.0, 1.5], FLOATX)
    seen = []

    def bowl(x):
        seen.append(x.astype("float64"))
        return 0.5 * x @ BOWL @ x, BOWL @ x

    kopt.minimize_fn(bowl, x0, gtol=0, ftol=0, max_evals=6)
    np.testing.assert_allclose(run.points[:6], seen[:6], rtol=1e-3, atol=1e-3)
    assert run.losses[-1] < 1e-6


def test_what_diverges_is_ended_at_its_step():
    found = trajectories(["sgd=0.021", "sgd=0.5", "sgd=0.001"], "bowl", steps=300)
    slow, fast, good = found.runs  # along the steep axis a step multiplies by 1 - 100 * rate
    beyond = [i for i, point in enumerate(slow.points) if (np.abs(point) > [50, 40]).any()]
    assert slow.diverged_at == beyond[0] > 10
    assert fast.diverged_at in (1, 2)
    assert good.diverged_at is good.left_at is None
    assert (slow.end, good.end) == (f"diverged at step {slow.diverged_at}", "")
    assert "diverged at step" in str(found)


def test_what_falls_for_ever_has_not_diverged():
    (run,) = trajectories("momentum=0.1", "saddle", steps=100).runs
    assert run.diverged_at is None
    assert run.left_at == run.last < 100
    assert (np.abs(run.points[: run.last]) <= 15).all()


def test_each_rule_without_a_rate_gets_as_many_tries():
    found = trajectories(["sgd", "adam", "momentum=0.001", "lbfgs"], "bowl", steps=50)
    sgd, adam, given, search = found.runs
    assert len(sgd.tried) == len(adam.tried) == TRIES
    assert given.tried == search.tried == {}
    assert sgd.learning_rate == pytest.approx(min(sgd.tried, key=sgd.tried.get))
    assert max(sgd.tried) >= 10 > 1e-5 >= min(sgd.tried)
    for rate, score in sgd.tried.items():  # by hand: the eigenvalues are 1 and 100
        if rate > 0.02:
            assert score == np.inf
    assert 0.002 < sgd.learning_rate < 0.02
    tuned = trajectories([kopt.SGD(1e-4), keras.optimizers.Adam(1e-5)], "bowl", steps=50, tune=7).runs
    assert [len(run.tried) for run in tuned] == [7, 7]
    assert [run.learning_rate for run in tuned] == pytest.approx([1e-3, 1.0])


def test_rates_are_found_where_nothing_is_known_of_the_surface():
    """Without a view and a lowest value, all tries of all optimizers say what is low."""
    found = trajectories(["sgd", "momentum"], IN_OPS["plateau"], start=(-2.8, 2.2), steps=100)
    assert all(run.losses[-1] < 1e-4 for run in found.runs)
    assert found.lowest == min(run.losses.min() for run in found.runs)
    assert all(len(run.tried) == TRIES for run in found.runs)


def test_a_view_with_holes_does_not_mislead():
    surface = lambda x, y: x - ops.log(x) + y**2  # noqa: E731
    rates = [
        trajectories("sgd", surface, start=(2, 1), view=((low, 3), (-1, 2)), steps=40).runs[0].learning_rate
        for low in (0.1, -1)
    ]
    assert rates[0] == rates[1] > 0.01


def test_nothing_is_far_without_a_view():
    (run,) = trajectories("adam=5", lambda x, y: ((x - 500) / 100) ** 2 + y**2, start=(1, 1), steps=200).runs
    assert run.end == ""
    assert run.losses[-1] < 0.1


def test_tries_of_a_line_search_are_not_divergence():
    for surface in ("rosenbrock", "himmelblau"):
        (run,) = trajectories("ssbroyden", surface).runs
        assert run.end == ""
        assert run.losses[-1] < 1e-6


def test_a_gradient_that_is_not_finite_ends_a_run_everywhere():
    (run,) = trajectories(kopt.SGD(100.0, nonfinite="raise"), "beale", steps=30).runs
    assert run.diverged_at < 5


def branching(x, y):
    return x * x + y * y if x > 0 else 2 * x * x + y * y


BY_POINT = {
    "cond": lambda x, y: ops.cond(x > 0, lambda: x * x + y * y, lambda: 2 * x * x + y * y),
    "norm": lambda x, y: ops.sum(ops.square(ops.stack([x, y]))) + ops.where(x > 0, 0.0, 1.0) * x * x,
} | ({"branches": branching} if BACKEND == "torch" else {})


@pytest.mark.parametrize("name", BY_POINT)
def test_a_function_of_one_point_at_a_time(name):
    found = trajectories("sgd=0.1", BY_POINT[name], start=(1, 1), view=((-2, 2), (-2, 2)), steps=3)
    x, y = np.meshgrid(found.x, found.y)
    np.testing.assert_allclose(found.z, np.where(x > 0, 1, 2) * x**2 + y**2, rtol=1e-5, atol=1e-6)


def test_what_diverges_does_not_widen_the_view():
    found = trajectories(["sgd=1", "adam=0.1"], lambda x, y: 10 * x**2 + y**2, steps=50)
    assert found.runs[0].diverged_at is not None or found.runs[0].losses[-1] > 1e20
    assert all(np.ptp(span) < 10 for span in found.view)


def test_no_number_is_no_way_down():
    (run,) = trajectories("sgd=1", lambda x, y: ops.sqrt(x) + 0.1 * y**2, steps=5).runs
    assert run.losses[1] < run.losses[0]
    assert run.end == f"diverged at step {run.diverged_at}"


def test_the_last_step_counts():
    found = trajectories("sgd=0.1", lambda x, y: -x - y, steps=10)
    assert found.lowest < found.runs[0].losses[-1] == pytest.approx(-4.0)
    (run,) = (found := trajectories("sgd=0.1", lambda x, y: x**2 + y**2, start=(2, 1), steps=1)).runs
    (left, right), (bottom, top) = found.view
    assert left < run.points[1, 0] < 2 < right
    assert bottom < run.points[1, 1] < 1 < top


@pytest.mark.parametrize("tune", [3, 24, 40, 100])
def test_budgets_are_equal(tune):
    found = trajectories(["sgd", kopt.SGD(0.5, momentum=0.5)], "bowl", steps=2, tune=tune)
    assert [len(run.tried) for run in found.runs] == [tune, tune]


def test_schedules_stay_as_they_are():
    decay = kopt.schedules.ExponentialDecay(base=0.5, per="step", unit_steps=1, initial=0.01)
    (run,) = trajectories(kopt.SGD(decay), "bowl", steps=3, tune=5).runs
    w = np.array([-4.0, 1.5])
    for rate in (0.01, 0.005, 0.0025):
        w = w - rate * (w @ BOWL)
    np.testing.assert_allclose(run.points[-1], w, rtol=1e-4)
    assert run.learning_rate is None
    assert run.tried == {}


@pytest.mark.parametrize(
    "surface", [lambda x, y: x**2 + 3 * y**2, lambda w: ops.sum(w * w * ops.convert_to_tensor([1.0, 3.0], w.dtype))]
)
def test_a_function_of_ones_own(surface):
    found = trajectories("sgd=0.1", surface, start=(2, -1), steps=30)
    assert found.surface.name == "a surface"
    np.testing.assert_allclose(found.runs[0].points[1], [1.6, -0.4], rtol=1e-5)
    np.testing.assert_allclose(found.z, found.x[None] ** 2 + 3 * found.y[:, None] ** 2, rtol=1e-4, atol=1e-5)
    (left, right), (bottom, top) = found.view  # all of the path is in it
    assert left < 0 < 2 < right
    assert bottom < -1 < 0 < top


BAD = [
    ({"optimizers": "adm"}, "`optimizers` must be of 'sgd', .* Received: optimizers='adm'"),
    ({"optimizers": []}, "`optimizers` must be a name, an optimizer"),
    ({"optimizers": [3]}, "`optimizers` must be a name, an optimizer.* Received: optimizers=3"),
    ({"optimizers": {"": "sgd"}}, "`optimizers` must be a non-empty string"),
    ({"optimizers": "keras.MultiOptimizer"}, "`optimizers` must be of 'sgd', "),
    ({"optimizers": keras.optimizers.LossScaleOptimizer(kopt.Adam())}, "`optimizers` must be without others in them"),
    ({"optimizers": keras.optimizers.SGD(lambda: 0.1)}, "`optimizers` must be such that a copy can be made"),
    ({"optimizers": "adam=fast"}, "behind '='. Received: optimizers='adam=fast'"),
    ({"optimizers": "adam="}, "`optimizers` must be with a finite number of 0 or more behind '='"),
    ({"optimizers": "keras.SGD=-1"}, "`optimizers` must be with a finite number of 0 or more behind '='"),
    ({"optimizers": "lbfgs="}, "`optimizers` must be without a rate where there is none"),
    ({"optimizers": "lbfgs=0.1"}, "`optimizers` must be without a rate where there is none"),
    ({"optimizers": "adam=-1"}, "`optimizers` must be with a finite number of 0 or more"),
    ({"surface": "beele"}, "`surface` must be one of 'saddle', .* Received: surface='beele'"),
    ({"surface": 3}, "`surface` must be one of"),
    ({"surface": lambda x, y: "high"}, "`surface` must be a function of two tensors, made of `keras.ops`"),
    ({"surface": lambda x, y: np.sin(x) + y**2}, "`surface` must be a function of two tensors, made of `keras.ops`"),
    ({"surface": lambda x, y: ops.log(x), "start": (0, 1)}, "`start` must be a point at which the loss"),
    ({"steps": 0}, "`steps` must be an integer of 1 or more"),
    ({"start": (1, 2, 3)}, "`start` must be two numbers"),
    ({"start": (9, 9)}, "`start` must be within the view"),
    ({"start": (1, np.nan)}, "`start` must be a finite number"),
    ({"view": ((1, 0), (0, 1))}, "`view` must be two pairs that rise"),
    ({"view": 3}, "`view` must be two pairs"),
    ({"tune": 2}, "`tune` must be an integer of 3 or more"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        trajectories(**{"optimizers": "sgd=0.1", "surface": "bowl", **bad})


def test_equal_runs_have_equal_numbers():
    first, second = (trajectories(["adam", "lbfgs"], "beale", steps=25) for _ in range(2))
    for one, other in zip(first.runs, second.runs, strict=True):
        np.testing.assert_array_equal(one.points, other.points)


# Drawn


matplotlib = pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")


@pytest.fixture(scope="module")
def record():
    return trajectories(["sgd=0.01", "momentum=0.5", "lbfgs"], "beale", steps=30)


def test_what_is_drawn_is_what_was_found(record, tmp_path):
    picture = kopt.plot.trajectories(record, save=[tmp_path / "a.png", tmp_path / "a.svg"])
    figure, data = picture
    assert picture.record is record
    on_map, losses = picture.axes
    names = ["SGD, rate 0.01", f"momentum, rate 0.5, diverged at step {record.runs[1].last}", "L-BFGS, line search"]
    assert [line.get_label() for line in losses.lines] == names
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    for run, line in zip(record.runs, losses.lines, strict=True):
        path = data[f"{run.label}/points"]
        np.testing.assert_array_equal(path, run.points[: run.last + 1])
        assert any(np.array_equal(one.get_xydata(), path) for one in on_map.lines)
        assert len(line.get_ydata()) == run.last + 1
        assert line.get_color() == COLOR_OF[run.label]
    assert losses.get_yscale() == "log"
    assert (on_map.get_xlim(), on_map.get_ylim()) == record.view
    assert "not which one trains a network best" in figure.get_supxlabel()
    assert {"x", "y", "z"} < data.keys()
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "a.svg"))
    assert not matplotlib.pyplot.get_fignums()  # nothing is left open


def test_what_has_the_same_color_has_other_dashes():
    names = ["keras.Lion=.01", "keras.Nadam=.01", "keras.Adamax=.125", "sgd=.01", "momentum=.01", "nesterov=.001"]
    picture = kopt.plot.trajectories([*names, "adagrad=.1", "rmsprop=.01", "adam=.1", "adamw=.1"], "bowl", steps=2)
    looks = [(line.get_color(), line.get_linestyle()) for line in picture.axes[1].lines]
    assert len(set(looks)) == 10
    assert looks[3:] == [(COLOR_OF[name], "-") for name in list(COLOR_OF)[:7]]
    assert picture.axes[1].lines[2].get_label() == "keras.Adamax, rate 0.125"


def test_long_and_odd_names_are_shown(tmp_path):
    names = {f"{i} {'a long name ' * i}": "sgd=0.01" for i in range(6)} | {"a $x_{ b$": "adam=0.1", "_c": "adam=0.2"}
    picture = kopt.plot.trajectories(names, "bowl", steps=3, save=tmp_path / "x.png")
    (legend,) = picture.figure.legends
    assert [text.get_text() for text in legend.get_texts()][-2:] == [r"a \$x_{ b\$, rate 0.1", " _c, rate 0.2"]
    assert legend.get_window_extent().x1 <= picture.figure.bbox.x1


def test_titles_and_edges(tmp_path):
    """A title without sense as mathematics; a grid with infinities; a start on the edge, from which it falls away."""
    draw = kopt.plot.trajectories
    draw("sgd=0.1", "bowl", steps=2, title=r"a $x_{ b$", save=[tmp_path / "x.png", tmp_path / "x.html"])
    assert r"<title>a $x_{ b$</title>" in (tmp_path / "x.html").read_text(encoding="utf-8")
    surface = lambda x, y: ops.log(ops.abs(x)) - 10 * y  # noqa: E731
    draw("sgd=0.1", surface, steps=9, start=(0.5, 0), view=((-1, 1), (-1, 1)), save=tmp_path / "x.png")
    draw("sgd=0.5", "saddle", start=(0, 0.1), view=((-1, 1), (-1, 0.1)), steps=20, save=tmp_path / "x.png")


def test_a_start_at_the_minimum_is_drawn(tmp_path):
    for surface in (lambda x, y: x**2 + y**2, lambda x, y: 0 * x + 1):
        picture = kopt.plot.trajectories("sgd=0.1", surface, start=(0, 0), steps=4, save=tmp_path / "x.png")
        assert picture.record.view == ((-1, 1), (-1, 1))
        assert picture.axes[1].get_yscale() == "linear"


def test_a_picture_is_the_same_in_any_style(record, tmp_path):
    kopt.plot.trajectories(record, save=[tmp_path / "a.png", tmp_path / "a.gif", tmp_path / "a.html"])
    with matplotlib.style.context("dark_background"):
        picture = kopt.plot.trajectories(record)
        picture.save(tmp_path / "b.png", tmp_path / "b.gif", tmp_path / "b.html")
        assert matplotlib.rcParams["axes.facecolor"] == "black"
    for ending in ("png", "gif", "html"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_a_home_folder_is_found(record, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kopt.plot.trajectories(record, save="~/x.png")
    assert (tmp_path / "x.png").exists()


def test_files_are_the_same_whenever_they_are_written(record, tmp_path):
    endings = "png", "svg", "pdf", "gif", "html"
    for name in "ab":
        kopt.plot.trajectories(record, save=[tmp_path / name / f"x.{ending}" for ending in endings])
    for ending in endings:
        first, second = (tmp_path / name / f"x.{ending}" for name in "ab")
        assert first.read_bytes() == second.read_bytes(), ending


def test_a_gif_grows_and_ends_with_the_whole(record, tmp_path):
    from PIL import Image

    kopt.plot.trajectories(record, save=tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as found:
        assert found.n_frames == 31
        assert found.info["loop"] == 0
        inks = []
        for place in (0, 15, 30):
            found.seek(place)
            inks.append(int((np.asarray(found.convert("L"))[60:, :] < 120).sum()))
    assert inks[0] < inks[1] < inks[2]
    assert (tmp_path / "x.gif").stat().st_size < 300_000


def test_a_picture_is_whole_again_after_it_has_moved(record, tmp_path):
    picture = kopt.plot.trajectories(record)
    picture.save(tmp_path / "before.png", tmp_path / "x.gif", tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()


class Script(html.parser.HTMLParser):
    """What lies in the element of a page that holds data."""

    text, inside = "", False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data):
        self.text += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


def test_a_page_plays_the_same_runs(record, tmp_path):
    kopt.plot.trajectories(record, title="<b>", save=tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    script = Script()
    script.feed(page)
    played = json.loads(script.text)
    assert [run["label"] for run in played["runs"]] == ["SGD", "momentum", "L-BFGS"]
    assert [run["note"] for run in played["runs"]] == ["0.01", "0.5", ""]
    assert played["runs"][1]["end"] == record.runs[1].end
    np.testing.assert_allclose(played["runs"][0]["points"], record.runs[0].points, atol=1e-3)
    assert "<b>" not in page
    assert kopt.plot.trajectories(record)._repr_html_().startswith("<iframe")


def test_heads_stay_in_view():
    view = ((0.0, 1.0), (0.0, 1.0))
    points = np.array([[0.5, 0.5], [0.5, 1.5], [9.0, 9.0], [0.2, 0.2], [np.nan, 0.0]])
    expected = [[0.5, 0.5], [0.5, 1.0], [0.5, 1.0], [0.2, 0.2], [0.2, 0.2]]
    np.testing.assert_allclose(_heads(points, view), expected)


def test_axes_of_ones_own_and_bad_files(record):
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)
    picture = kopt.plot.trajectories(record, ax=axes, title="mine")
    assert picture.axes == list(axes)
    assert axes[0].get_title(loc="left") == "mine"
    for bad in ({"ax": 3}, {"ax": []}, {"ax": axes[0]}, {"ax": axes, "show": True}):
        with pytest.raises(ValueError, match=r"`ax` must be (2 )?axes of matplotlib|`show` must be False beside `ax`"):
            kopt.plot.trajectories("adam", "no surface", **bad)  # before anything else is looked at
    for bad in ("x.mp4", 3, ["x.png", "x"], ""):
        with pytest.raises(ValueError, match=r"`save` must be a path, or a list of them, that ends in .png, "):
            kopt.plot.trajectories("adam", "no surface", save=bad)  # before anything else is looked at
    with pytest.raises(ValueError, match="`show` must be True or False"):
        kopt.plot.trajectories(record, show="yes")
    with pytest.raises(ValueError, match="`steps` must be left out where a record is drawn again. Received: steps=3"):
        kopt.plot.trajectories(record, steps=3)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the pictures are the same on all backends")
def test_the_saddle_is_drawn_until_all_have_left(tmp_path):
    picture = kopt.plot.trajectories(["momentum=0.02", "adam=0.02"], "saddle")
    assert picture.axes[1].get_yscale() == "linear"
    assert 40 < picture.axes[1].get_xlim()[1] < 120
