"""Pictures of schedules: what is drawn is what the fit would do."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import kopt
import kopt.callbacks as kc
import kopt.schedules as ks

matplotlib = pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")


@pytest.fixture(autouse=True)
def closed():
    yield
    assert not matplotlib.pyplot.get_fignums()  # no picture is a window


def test_what_is_drawn_are_the_values():
    shown = [ks.StepDecay(0.5, every_epochs=2), kc.CosineDecay(), ks.OneCycle(0.2)]
    stock = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    picture = kopt.plot.schedule(*shown, stock, steps=40, steps_per_epoch=5, base=0.1)
    expected = [ks.StepDecay(0.5, every_epochs=2), ks.OneCycle(0.2), ks.CosineDecay()]
    drawn = [picture.axes[0].lines[0], picture.axes[0].lines[1], picture.axes[1].lines[0]]
    for line, schedule in zip(drawn, expected, strict=True):
        assert line.get_label() == repr(schedule)
        np.testing.assert_array_equal(line.get_ydata(), schedule.preview(40, steps_per_epoch=5, base=0.1))
        np.testing.assert_array_equal(picture.data[repr(schedule)], line.get_ydata())
    np.testing.assert_allclose(picture.data["ExponentialDecay"], 0.1 * 0.5 ** (np.arange(40) / 10), rtol=1e-6)
    assert [ax.get_ylabel() for ax in picture.axes] == ["value", "learning rate"]
    assert picture.axes[0].get_legend().get_texts()[2].get_text() == "ExponentialDecay"


def test_one_cycle_has_two_curves():
    cycle = kc.OneCycle(0.1)
    picture = kopt.plot.schedule(cycle, steps=50)
    np.testing.assert_array_equal(picture.data["OneCycle: learning rate"], cycle.schedule.preview(50))
    assert picture.data["OneCycle: momentum"].min() == pytest.approx(0.85)
    assert [ax.get_ylabel() for ax in picture.axes] == ["learning rate", "momentum"]


def network():
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="low"), keras.layers.Dense(2)], name="base")
    return base, keras.Sequential([base, keras.layers.Dense(1, name="head")])


@pytest.mark.parametrize("by_pattern", [False, True])
def test_a_fit_is_drawn_as_it_runs(by_pattern):
    """The rates of a real fit, and of each group those that its multiplier makes of them."""
    base, model = network()
    key = "base" if by_pattern else base
    listed = [kc.WarmUp(epochs=1), kc.CosineRestarts(cycle_epochs=2), kc.MomentumAnneal(0.5, 0.9)]
    staged = kc.StagedUnfreeze([{"epoch": 0, "multipliers": {key: 0.0}},
                                {"epoch": 2, "multipliers": {key: 0.5}, "ramp_epochs": 1}])  # fmt: skip
    model.compile(kopt.SGD(0.2, momentum=0.5), loss="mse")
    monitor = kc.RateMonitor(["learning_rate", "momentum"])
    x = np.ones((6, 4))
    history = model.fit(x, np.ones(6), 1, epochs=5, verbose=0, callbacks=[*listed, staged, monitor]).history
    span = {"steps": 30, "steps_per_epoch": 6, "base": 0.2, "model": model if by_pattern else None}
    picture = kopt.plot.schedule([*listed, staged, keras.callbacks.TerminateOnNaN()], **span)
    np.testing.assert_allclose(picture.data["all others"], monitor.history["learning_rate"], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(picture.data["momentum"], monitor.history["momentum"], rtol=1e-5)
    ends = picture.data["base"][5::6] / picture.data["all others"][5::6]
    np.testing.assert_allclose(ends, history["multiplier/base"], rtol=1e-4, atol=1e-7)
    kept = kopt.plot.schedule(monitor)
    np.testing.assert_array_equal(kept.data["learning rate"], monitor.history["learning_rate"])
    assert [ax.get_ylabel() for ax in kept.axes] == ["learning rate", "momentum"]
    (track,) = kopt.plot.schedule(staged, **span).data.items()
    assert track[0] == "base"
    np.testing.assert_allclose(track[1][5::6], history["multiplier/base"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "turns"),
    [
        (ks.CosineRestarts(cycle_steps=10, growth=2), [10, 30]),
        (ks.CyclicalRate(1.0, cycle_steps=20, initial=0.1), [20, 40]),
        (ks.WarmUp(steps=5) >> ks.CosineDecay(initial=0.1), []),
        (ks.OneCycle(0.1), []),
        (ks.StepDecay(0.5, every_steps=10), []),
        (kc.SnapshotEnsemble(cycles=3, max_learning_rate=0.2), [20, 40]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_restarts_are_marked(schedule, turns):
    picture = kopt.plot.schedule(schedule, steps=60, steps_per_epoch=10)
    (found,) = [values for name, values in picture.data.items() if name.endswith("/restarts")] or [[]]
    assert list(found) == turns
    marks = [line for line in picture.axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in marks] == turns


def test_a_record_in_given_axes(tmp_path):
    from matplotlib.figure import Figure

    monitor = kc.RateMonitor()
    with pytest.raises(ValueError, match="that has seen a `fit`"):
        kopt.plot.schedule(monitor)
    monitor.set_state({"history": {"learning_rate": np.array([0.1, 0.2])}})
    ax = Figure().subplots()
    picture = kopt.plot.schedule(monitor, ax=ax, save=tmp_path / "new" / "rates.png")
    figure, data = picture
    assert picture.axes == [ax]
    assert figure is ax.figure
    assert ax.get_ylabel() == "learning rate"
    np.testing.assert_array_equal(data["learning rate"], ax.lines[0].get_ydata())
    assert (tmp_path / "new" / "rates.png").read_bytes() == picture._repr_png_()
    assert picture._repr_html_() is None
    assert repr(picture) == "<Picture of learning rate>"
    with pytest.raises(ValueError, match=r"`files` must be .*; only what moves can be a .gif or .html. Received"):
        picture.save(tmp_path / "rates.gif")


def test_a_part_of_a_figure_saves_the_whole(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    left, _ = figure.subfigures(1, 2)
    picture = kopt.plot.schedule(ks.CosineDecay(), ax=left.subplots(), save=tmp_path / "x.png")
    assert picture.figure is figure


def test_a_window_opens_only_if_it_is_asked_for(monkeypatch):
    opened = []
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: opened.append(matplotlib.pyplot.get_fignums()))
    kopt.plot.schedule(ks.CosineDecay())
    assert not opened
    kopt.plot.schedule(ks.CosineDecay(), show=True)
    assert opened == [[1]]
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("shown", [[], ["cosine"], [0.1], [keras.callbacks.EarlyStopping()], [[]], [[0.1]]])
def test_nothing_else_is_drawn(shown):
    with pytest.raises(ValueError, match=r"`shown` must be .* Received: shown="):
        kopt.plot.schedule(*shown)


BAD = [
    {"steps": 0}, {"steps": 2.5}, {"steps_per_epoch": 0}, {"base": np.nan}, {"model": 3}, {"ax": 3},
    {"save": "rates"}, {"save": "rates.gif"}, {"save": ["rates.png", 3]}, {"show": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be "):
        kopt.plot.schedule(ks.CosineDecay(), **bad)


def test_what_a_fit_needs_is_asked_for():
    staged = kc.StagedUnfreeze({0: {"base": 0.0}})
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given for StagedUnfreeze"):
        kopt.plot.schedule([staged])
    with pytest.raises(ValueError, match="`model` must be given where StagedUnfreeze picks weights by pattern"):
        kopt.plot.schedule([staged], steps_per_epoch=10)
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given for SnapshotEnsemble"):
        kopt.plot.schedule(kc.SnapshotEnsemble())
    with pytest.raises(ValueError, match="`steps` must be 5 epochs of 10 at least. Received: steps=40"):
        kopt.plot.schedule(kc.SnapshotEnsemble(cycles=5), steps=40, steps_per_epoch=10)
    with pytest.raises(ValueError, match="such that only one gives `learning_rate` a value of its own"):
        kopt.plot.schedule([kc.OneCycle(0.1), kc.CyclicalRate(0.2, cycle_steps=10)])
    with pytest.raises(ValueError, match="a list with a callback that drives a number"):
        kopt.plot.schedule([keras.callbacks.TerminateOnNaN()])


def test_what_nobody_knows_before_is_not_left_out():
    halving = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    for unknown in (halving, keras.callbacks.ReduceLROnPlateau(), kc.LearningRateFinder()):
        with pytest.raises(ValueError, match="`shown` must be without what nobody knows before the fit"):
            kopt.plot.schedule([kc.WarmUp(steps=5), unknown])


def test_patterns_are_no_mathematics(tmp_path):
    _, model = network()
    staged = kc.StagedUnfreeze({0: {r"low/kernel$|head/\w+$": 0.1}})
    picture = kopt.plot.schedule([kc.WarmUp(steps=5), staged], steps=20, steps_per_epoch=5, model=model)
    picture.save(tmp_path / "x.png")
    assert r"low/kernel\$|head/\w+\$" in picture.data


def test_without_matplotlib_one_sentence_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import kopt\n"
        "try: kopt.plot.schedule(kopt.schedules.CosineDecay())\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Pictures need matplotlib: `pip install kopt[plot]`\n"
