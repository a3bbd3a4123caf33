"""Pictures: what is drawn is what the record holds."""

import keras
import numpy as np
import pytest

import kopt
import kopt.schedules as ks

matplotlib = pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")


@pytest.fixture(autouse=True)
def closed():
    yield
    matplotlib.pyplot.close("all")


def test_what_is_drawn_are_the_values():
    shown = [ks.StepDecay(0.5, every_epochs=2), kopt.callbacks.CosineDecay(), ks.OneCycle(0.2)]
    stock = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    ax = kopt.plot.schedule(*shown, stock, steps=40, steps_per_epoch=5, base=0.1)
    expected = [ks.StepDecay(0.5, every_epochs=2), ks.CosineDecay(), ks.OneCycle(0.2)]
    for line, schedule in zip(ax.lines, expected, strict=False):
        assert line.get_label() == repr(schedule)
        np.testing.assert_array_equal(line.get_ydata(), schedule.preview(40, steps_per_epoch=5, base=0.1))
    np.testing.assert_allclose(ax.lines[3].get_ydata(), 0.1 * 0.5 ** (np.arange(40) / 10), rtol=1e-6)
    assert len(ax.get_legend().get_texts()) == 4


def test_one_cycle_has_two_curves():
    cycle = kopt.callbacks.OneCycle(0.1)
    rate, momentum = kopt.plot.schedule(cycle, steps=50).lines
    np.testing.assert_array_equal(rate.get_ydata(), cycle.schedule.preview(50))
    assert momentum.get_ydata().min() == pytest.approx(0.85)


def test_a_record_in_given_axes(tmp_path):
    monitor = kopt.callbacks.RateMonitor()
    with pytest.raises(ValueError, match="that has seen a `fit`"):
        kopt.plot.schedule(monitor)
    monitor.set_state({"history": {"learning_rate": np.array([0.1, 0.2])}})
    figure, ax = matplotlib.pyplot.subplots()
    assert kopt.plot.schedule(monitor, ax=ax) is ax
    assert ax.get_ylabel() == "learning_rate"
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.1, 0.2])
    figure.savefig(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000


@pytest.mark.parametrize("shown", [[], ["cosine"], [0.1], [keras.callbacks.EarlyStopping()]])
def test_nothing_else_is_drawn(shown):
    with pytest.raises(ValueError, match=r"`shown` must be .* Received: shown="):
        kopt.plot.schedule(*shown)
    for bad in ({"steps": 0}, {"steps": 2.5}, {"steps_per_epoch": 0}, {"base": np.nan}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be "):
            kopt.plot.schedule(ks.CosineDecay(), **bad)
