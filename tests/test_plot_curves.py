"""Pictures of trainings: what is read, what is drawn of it, and what is said."""

import keras
import numpy as np
import pytest

import kopt
from kopt import scores
from kopt.callbacks import report
from kopt.plot import runs

matplotlib = pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")

NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 24, 2))


def trained(*callbacks, epochs=3, **arguments):
    """The History of a small training."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile(kopt.SGD(0.1), loss="mse", metrics=["mae"])
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks), **arguments)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


def drawn(ax):
    """The lines that have points, by what the legend calls them."""
    return {line.get_label(): line for line in ax.lines if len(line.get_xdata()) > 1}


def written(tmp_path, text, name="run.csv"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


# What is read


def test_what_keras_writes_is_read(tmp_path):
    """A History, its dict and its files are the same, with `validation_freq` and a later first epoch."""
    files = [str(tmp_path / name) for name in ("comma.csv", "semicolon.csv")]
    logs = [keras.callbacks.CSVLogger(file, separator) for file, separator in zip(files, ",;", strict=True)]
    given = {"validation_data": (X, Y), "validation_freq": 3, "initial_epoch": 2}
    history = trained(*logs, epochs=7, **given)
    of_history, *of_files = (runs.read("runs", one) for one in (history, *files))
    assert of_history["loss"].epochs.tolist() == [3, 4, 5, 6, 7]
    assert of_history["val_mae"].epochs.tolist() == [3, 6]
    assert of_history["val_mae"].values.tolist() == history.history["val_mae"]
    for other in of_files:
        assert other.keys() == of_history.keys()
        for metric, curve in of_history.items():
            np.testing.assert_array_equal(other[metric].epochs, curve.epochs)
            np.testing.assert_allclose(other[metric].values, curve.values, rtol=1e-6)
    assert "validation, epochs guessed" in labels(kopt.plot.history(history, metrics="mae").axes[0])
    assert "validation" in labels(kopt.plot.history(files[0], metrics="mae").axes[0])
    assert runs.read("runs", history.history)["loss"].epochs.tolist() == [1, 2, 3, 4, 5]  # a dict has no epochs


def test_files_of_trainings_that_were_killed(tmp_path):
    """An epoch that was trained again counts once; a cut line does not; `NA` is no number, `nan` is one."""
    text = "epoch,loss,words,val_loss\n0,2.0,a,NA\n1,nan,b,1.5\n1,1.0,b,1.25\n2,inf,c,NA\n3,0.5,"
    found = runs.read("runs", written(tmp_path, text))
    assert found.keys() == {"loss", "val_loss"}
    assert found["loss"].epochs.tolist() == [1, 2, 3]
    assert found["loss"].values.tolist() == [2.0, 1.0, INF]
    assert (found["val_loss"].epochs.tolist(), found["val_loss"].values.tolist()) == ([2], [1.25])


@pytest.mark.parametrize("text", ["", "loss\n1.0\n", "epoch,loss\n", "epoch,loss\none,2.0\n", "epoch,loss\n0,NA\n"])
def test_other_files_are_refused(tmp_path, text):
    for file in (written(tmp_path, text), str(tmp_path / "none.csv"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"(?s)`runs` must be trainings.* Received: runs=") as error:
            kopt.plot.history(file)
        assert repr(file) in str(error.value)


WRONG = [[], [{}], [{"a": []}], [{"loss": []}], [{"loss": "high"}], [3], [[1.0, 2.0]], [{"a": [{"loss": [1.0]}, 3]}]]


@pytest.mark.parametrize("wrong", [*WRONG, [{1: [{"loss": [1.0]}]}], [{"loss": [1.0]}, {"a": [{"loss": [1.0]}]}]])
def test_other_runs_are_refused(wrong):
    with pytest.raises(ValueError, match=r"(?s)`runs` must be .* Received: runs="):
        kopt.plot.history(*wrong)


@pytest.mark.parametrize("is_range", [False, True])
def test_bands_are_of_the_runs_there_are(is_range):
    """Beside NumPy, epoch by epoch: of the finite numbers of runs that have ended at different epochs."""
    tables = RNG.normal(size=(5, 9))
    lengths, table = [9, 9, 7, 5, 2], np.full((5, 9), NAN)
    tables[0, 3], tables[1, 8] = NAN, INF
    curves = [runs.Curve(np.arange(1, n + 1), row[:n]) for row, n in zip(tables, lengths, strict=True)]
    for row, curve in zip(table, curves, strict=True):
        row[curve.epochs - 1] = curve.values
    band = runs.band(curves, is_range)
    for place, column in enumerate(table.T):
        there = column[np.isfinite(column)]
        wanted = [len(there), there.mean(), NAN, NAN]
        if is_range and len(there) > 1:
            wanted[2:] = there.min(), there.max()
        elif not is_range and len(there) > 2:
            wanted[2:] = there.mean() - there.std(ddof=1), there.mean() + there.std(ddof=1)
        found = [band.n[place], band.mean[place], band.low[place], band.high[place]]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert band.epochs.tolist() == list(range(1, 10))
    assert np.isnan(runs.band([runs.Curve(np.array([1]), np.array([NAN]))], is_range).mean[0])


def test_files_of_a_spreadsheet_are_read(tmp_path):
    (tmp_path / "x.csv").write_text("epoch,loss\n0,4.0\n", encoding="utf-8-sig")
    assert runs.read("runs", tmp_path / "x.csv")["loss"].values.tolist() == [4.0]


# history


def test_history_of_groups(tmp_path):
    many = [{"loss": [3.0 + i, 2.0, 1.0][: 3 - (i == 2)], "val_loss": [3.0, 2.5, 2.0 + i]} for i in range(3)]
    few = [{"loss": [2.0, NAN], "accuracy": [0.5, 0.6]}, {"loss": [1.0, 0.5], "accuracy": [0.7, 0.9]}]
    file = written(tmp_path, "epoch,loss\n0,4.0\n1,3.0\n")
    save = str(tmp_path / "pictures" / "x.png")
    picture = kopt.plot.history({"SGD": many, "Adam": few, "one": file}, metrics=["loss", "accuracy"], save=save)
    assert (tmp_path / "pictures" / "x.png").stat().st_size > 1000
    loss, accuracy = picture.axes
    assert labels(loss) == [
        "SGD: mean ± sd of 3", "Adam: mean and range of 2, 1 not finite", "one", "validation", "training"]  # fmt: skip
    assert labels(accuracy) == []
    assert (loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()) == ("loss", "training accuracy", "epoch")
    named = drawn(loss)
    assert [named[name].get_linestyle() for name in labels(loss)[:3]] == ["-", "--", "--"]
    np.testing.assert_array_equal(named["SGD: mean ± sd of 3"].get_ydata(), [3.0, 2.5, 3.0])
    np.testing.assert_allclose(picture.data["SGD val_loss high"], [3.0, 2.5, 4.0])
    assert picture.data["SGD loss n"].tolist() == [3, 3, 2]
    np.testing.assert_array_equal(picture.data["SGD loss low"], [3.0, 2.0, NAN])  # of two is no deviation
    np.testing.assert_array_equal(picture.data["Adam loss mean"], [1.5, 0.5])
    assert picture.data["one loss epochs"].tolist() == [1, 2]
    of_group = [line for line in loss.lines if line.get_color() == named["one"].get_color()]
    assert len(of_group) == 1
    cross = [line.get_xydata().tolist() for line in loss.lines if line.get_marker() == "x"]
    assert cross == [[[1.0, 2.0]]]  # where it was finite for the last time
    assert len(loss.collections) == 3


def test_history_of_seeds_and_of_one():
    seeds = [{"loss": [3.0, 2.0, 1.0 + i]} for i in range(4)] + [{"loss": [3.0, 2.0]}]
    for given in (seeds, [seeds]):
        (ax,) = kopt.plot.history(*given).axes
        assert labels(ax) == ["mean ± sd of 5, 4 to the end"]
    picture = kopt.plot.history(trained(validation_data=(X, Y)), metrics="mae")
    assert labels(picture.axes[0]) == ["validation", "training"]
    assert picture.data.keys() >= {"mae mean", "val_mae mean"}
    picture = kopt.plot.history({"loss": [3.0]})
    assert labels(picture.axes[0]) == []
    assert picture.axes[0].lines[1].get_marker() == "o"  # a line of one point is not seen
    figure = matplotlib.figure.Figure()
    ax = figure.subplots()
    assert kopt.plot.history(*seeds, ax=ax).figure is figure
    assert kopt.plot.history({"val_loss": [1.0, 2.0]}, metrics="val_loss").axes[0].get_ylabel() == "val_loss"


def test_metrics_that_nobody_has_are_refused():
    run = {"loss": [1.0], "val_mae": [2.0]}
    assert "val_mae mean" in kopt.plot.history(run, metrics=["loss", "mae"]).data
    with pytest.raises(ValueError, match="of those that were recorded, loss, val_mae. Received: metrics='accuracy'"):
        kopt.plot.history(run, metrics=["loss", "accuracy"])
    for wrong in ((), "", 3, [None]):
        with pytest.raises(ValueError, match="`metrics` must be the name of a metric"):
            kopt.plot.history(run, metrics=wrong)
    with pytest.raises(ValueError, match="`runs` must be at most 8 groups"):
        kopt.plot.history({str(i): run for i in range(9)})


def test_a_number_without_neighbors_is_a_dot():
    picture = kopt.plot.history({"loss": [3.0, NAN, 1.0, NAN, 2.0, 1.0]})
    dots = [line.get_xydata().tolist() for line in picture.axes[0].lines if line.get_marker() == "o"]
    assert dots == [[[1.0, 3.0], [3.0, 1.0]]]


# average


def test_average_of_a_fit():
    averaging = kopt.callbacks.PolyakAveraging(0.5, validate="both", validation_data=(X, Y))
    history = trained(averaging, validation_data=(X, Y))
    picture = kopt.plot.average(history, metric="mae")
    assert labels(picture.axes[0]) == [
        "training, raw weights", "validation, raw weights", "validation, averaged weights"]  # fmt: skip
    for line, name in zip(picture.axes[0].lines, ("mae", "val_mae", "val_averaged_mae"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), history.history[name])
        np.testing.assert_array_equal(picture.data[f"{name} mean"], history.history[name])
    seeds = [history, history.history, history]
    assert labels(kopt.plot.average(seeds).axes[0])[2] == "validation, averaged weights: mean ± sd of 3"


@pytest.mark.parametrize(("logged", "missing"), [(["loss"], "val_loss"), (["loss", "val_loss"], "val_averaged_loss")])
def test_average_of_other_fits_is_refused(logged, missing):
    run = {name: [2.0, 1.0] for name in logged}
    with pytest.raises(ValueError, match=rf"validate='both', .* so that it has `{missing}`. Received: history="):
        kopt.plot.average(run)
    with pytest.raises(ValueError, match=r"`history` must be trainings.* Received: history="):
        kopt.plot.average({"a": [run]})
    with pytest.raises(ValueError, match="`metric` must be "):
        kopt.plot.average(run, metric=None)


# rates


JUDGED = {
    "the row": ({0.001: [2.3, 2.2], 0.1: [1.5, 0.2], 1: [2.5, 2.0], 30: [9.0, NAN]},
                ["too low", "good", "too high", "diverged in epoch 2"]),
    "any order": ({1: [2.0, 2.0], 0.1: [2.0, 1.0], 0.01: [2.0, 1.5]}, ["too low", "good", "too high"]),
    "as good": ({1: [2.0, 1.019], 2: [2.0, 1.5], 3: [2.0, 1.0], 4: [2.0, 1.021]}, ["good", "good", "good", "too high"]),
    "of its own fall": ({1: [9.0, 1.03], 2: [2.0, 1.0]}, ["too low", "good"]),
    "the last tenth": ({1: [2.0] * 18 + [0.0, 2.0], 2: [2.0] * 18 + [1.5, 1.5]}, ["good", "too high"]),
    "the last number": ({1: [2.0] * 17 + [0.0, 2.0], 2: [2.0] * 17 + [1.5, 1.5]}, ["too low", "good"]),
    "seeds": ({1: [[2.0, 1.0], [2.0, 2.0]], 2: [[2.0, 1.2], [2.0, 1.2]]}, ["too low", "good"]),
    "some seeds": ({1: [[2.0, 0.1], [2.0, None]], 2: [2.0, 1.0]}, ["1 of 2 diverged in epoch 2", "good"]),
    "at different epochs": ({1: [2.0, 1.0], 2: [[INF], [1.0, 1.0, NAN]]}, ["good", "diverged in epochs 1 to 3"]),
    "all": ({1: [NAN], 2: [2.0, NAN]}, ["diverged in epoch 1", "diverged in epoch 2"]),
    "nothing falls": ({1: [1.0, 1.1], 2: [1.0, 1.2]}, ["good", "too high"]),
    "what was judged": ({1: {"loss": [1.0, 0.1]}, 2: {"loss": [1.0, 0.5]}}, ["good", "too high"]),
}  # fmt: skip


@pytest.mark.parametrize("case", JUDGED)
def test_rates_are_judged_by_their_curves(case):
    curves, wanted = JUDGED[case]
    picture = kopt.plot.rates(curves)
    assert picture.data["judgements"].tolist() == wanted
    assert picture.data["rates"].tolist() == sorted(curves)
    shown = [f"{rate:g}: {word}" for rate, word in zip(sorted(curves), wanted, strict=True)]
    assert labels(picture.axes[0]) == shown


def test_rates_are_drawn():
    curves = {0.01: [[2.0, 1.9], [2.2, 2.1]], 0.1: np.array([[2.0, 0.5], [2.0, 0.1]]), 5: [[1e30, 3.0], [5.0, NAN]]}
    picture = kopt.plot.rates(curves)
    (ax,) = picture.axes
    lines = drawn(ax)
    np.testing.assert_allclose(lines["0.1: good"].get_ydata(), [2.0, 0.3])
    np.testing.assert_allclose(picture.data["0.1 low"], [2.0, 0.1])
    np.testing.assert_allclose(picture.data["0.1 high"], [2.0, 0.5])
    assert lines["0.1: good"].get_linewidth() > lines["0.01: too low"].get_linewidth()
    assert ax.get_yscale() == "log"
    assert 20 < ax.get_ylim()[1] < 40  # ten times 2.2, and a little room
    cross = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "x"]
    assert cross == [[[2.0, 1.0]]]  # at the upper edge
    assert ax.get_legend().get_title().get_text() == "learning rate\n(2 seeds: mean, range)"
    brightness = [sum(matplotlib.colors.to_rgb(line.get_color())) for line in lines.values()]
    assert brightness == sorted(brightness)  # in the order of rates
    assert kopt.plot.rates({1: [1.0, -1.0], 2: [1.0, 0.0]}).axes[0].get_yscale() == "linear"


def test_rates_of_trainings(tmp_path):
    history = trained(epochs=2)
    file = written(tmp_path, "epoch,loss,mae\n0,9.0,9.0\n1,8.0,0.0\n")
    picture = kopt.plot.rates({0.1: [history, history.history], 1: file}, metric="mae")
    np.testing.assert_allclose(picture.data["0.1 mean"], history.history["mae"])
    assert picture.data["1 mean"].tolist() == [9.0, 0.0]
    with pytest.raises(ValueError, match="`metric` must be one of loss, mae. Received: metric='mse'"):
        kopt.plot.rates({0.1: history, 1: file}, metric="mse")
    with pytest.raises(ValueError, match="`metric` must be one that is the better the lower it is, as a loss"):
        kopt.plot.rates({0.1: history, 1: file}, metric="val_accuracy")
    with pytest.raises(ValueError, match="this one has recorded nothing"):
        kopt.plot.history(keras.callbacks.History())


@pytest.mark.parametrize(
    "wrong", [None, [1.0], {}, {1: [1.0]}, {0: [1.0], 1: [1.0]}, {"a": [1.0], 1: [1.0]}, {1: [], 2: [1.0]},
              {1: 3, 2: [1.0]}, {1: [[]], 2: [1.0]}, {1: [[1.0], 3], 2: [1.0]}, {1: "none.csv", 2: [1.0]}]
)  # fmt: skip
def test_other_curves_are_refused(wrong):
    with pytest.raises(ValueError, match=r"(?s)`curves` must be .* Received: curves="):
        kopt.plot.rates(wrong)


# snapshots


def results(members, judge, output=None):
    return {"output": output} | report.result(judge, members)


TRUE = RNG.integers(0, 3, 40)
MEMBERS = scores.softmax(RNG.normal(size=(4, 40, 3)) + 1.5 * np.eye(3)[TRUE])


def test_snapshots_of_classes():
    found = results(MEMBERS, scores.Classes(TRUE, 3))
    picture = kopt.plot.snapshots([found])
    together = [(MEMBERS[: k + 1].mean(0).argmax(-1) == TRUE).mean() for k in range(4)]
    each = [(one.argmax(-1) == TRUE).mean() for one in MEMBERS]
    named = MEMBERS.argmax(-1)
    np.testing.assert_allclose(picture.data["so_far"], together)
    np.testing.assert_allclose(picture.data["members"], each)
    np.testing.assert_allclose(picture.data["differences"], [[(a != b).mean() for b in named] for a in named])
    assert found["so_far"][-1] == found["ensemble"] | {"interval": found["interval"]}
    first, second = picture.axes
    best, curve, points = first.lines
    assert best.get_ydata()[0] == max(each)
    np.testing.assert_allclose(curve.get_xydata(), np.transpose([[1, 2, 3, 4], together]))
    np.testing.assert_allclose(points.get_ydata(), each)
    (bars,) = first.collections
    assert bars.get_segments()[1][:, 1].tolist() == list(scores.Classes(TRUE, 3).interval(MEMBERS[:2].mean(0)))
    in_cells = {text.get_position(): text.get_text() for text in second.texts}
    assert len(in_cells) == 12  # none on the diagonal
    assert in_cells[1, 2] == in_cells[2, 1] == f"{100 * (named[0] != named[1]).mean():.3g}"
    assert "% of rows" in second.get_title()


def test_snapshots_of_numbers_and_of_many():
    values, members = RNG.normal(size=(30, 2)), RNG.normal(size=(9, 30, 2))
    two = [results(MEMBERS, scores.Classes(TRUE, 3), "kind"), results(members, scores.Numbers(values), "size")]
    picture = kopt.plot.snapshots(two, output="size")
    first, second, beside = picture.figure.axes
    assert first.get_ylabel() == "rmse of size"
    assert (len(second.texts), beside in picture.axes) == (0, False)  # a scale in place of numbers
    rmse = [np.sqrt(np.square(members[: k + 1].mean(0) - values).mean()) for k in range(9)]
    np.testing.assert_allclose(picture.data["so_far"], rmse)
    assert first.lines[0].get_ydata()[0] == min(picture.data["members"])
    assert "intervals" not in picture.data
    assert kopt.plot.snapshots(two).axes[0].get_ylabel() == "accuracy of kind"
    assert kopt.plot.snapshots([results(members[:1], scores.Numbers(values))]).data["differences"].tolist() == [[0.0]]
    for wrong in ("age", 2, ["kind"]):
        with pytest.raises(ValueError, match="`output` must be None or one of 'kind', 'size'. Received: output="):
            kopt.plot.snapshots(two, output=wrong)
    with pytest.raises(ValueError, match="`output` must be None, for there is one output"):
        kopt.plot.snapshots([results(MEMBERS, scores.Classes(TRUE, 3))], output=0)


@pytest.mark.filterwarnings("ignore:The (members are|ensemble is)")
def test_snapshots_after_a_fit():
    snap = kopt.callbacks.SnapshotEnsemble(2, verbose=0)
    with pytest.raises(ValueError, match="`snap` must be one that has taken a snapshot.* Received: snap="):
        kopt.plot.snapshots(snap)
    trained(snap, epochs=2)
    with pytest.raises(ValueError, match="`snap` must be one that could judge .*: give `validation_data`.* Received: "):
        kopt.plot.snapshots(snap)
    snap = kopt.callbacks.SnapshotEnsemble(2, 0.5, validation_data=(X, Y), verbose=0)
    trained(snap, epochs=2)
    picture, again = kopt.plot.snapshots(snap), kopt.plot.snapshots(snap.results_)
    assert picture.data["members"].tolist() == again.data["members"].tolist()
    p = [model.predict(X, verbose=0) for model in snap.ensemble.models]
    wanted = np.sqrt(np.square(p[0] - p[1]).mean())
    np.testing.assert_allclose(picture.data["differences"], [[0, wanted], [wanted, 0]], rtol=1e-5)
    for wrong in (None, [], {}, [{"members": []}], snap.snapshots_):
        with pytest.raises(ValueError, match="`snap` must be a kopt.callbacks.SnapshotEnsemble, or its `results_`"):
            kopt.plot.snapshots(wrong)


# What all have in common


RECORD = kopt.RangeTest([0.1, 1.0], [1.0, 2.0], 1.0)
SEARCHED = kopt.tuner.SearchResult("loss", "min", None, None, None, None, None, None, None, [], [])
EVERY = {
    "history": ({"loss": [1.0]},),
    "average": ({"val_loss": [1.0], "val_averaged_loss": [1.0]},),
    "rates": ({1: [1.0], 2: [2.0]},),
    "rate_range": (RECORD,),
    "search": (SEARCHED,),
    "snapshots": ([results(MEMBERS, scores.Classes(TRUE, 3))],),
    "groups": ({"update_ratio/a": [0.0, 1e-3], "learning_rate": [0.1, 0.2]},),
    "schedule": (kopt.schedules.OneCycle(0.1),),
    "slice_1d": (kopt.landscape.Slice([0, 1], {"loss": [1, 2]}, [0, 1], "share of the way"),),
    "plane": (kopt.landscape.Plane([0, 1], [0, 1], {"loss": [[1, 2], [3, 4]]}, [[0, 0]], [0], "filter norms"),),
}


def test_every_picture_has_a_row():
    there = {name for name, value in vars(kopt.plot).items() if callable(value) and name != "Picture"}
    assert there - {"trajectories"} == EVERY.keys()  # which has a file of its own


@pytest.mark.parametrize("name", EVERY)
def test_every_picture_is_saved_drawn_into_axes_and_refuses(name, tmp_path):
    draw = getattr(kopt.plot, name)
    picture = draw(*EVERY[name], save=[tmp_path / "a.png", tmp_path / "b.svg"])
    again = draw(*EVERY[name], save=tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert (tmp_path / "b.svg").stat().st_size > 1000
    assert picture.data.keys() == again.data.keys()
    for key, array in picture.data.items():
        np.testing.assert_array_equal(array, again.data[key])
    axes = matplotlib.figure.Figure().subplots(1, len(picture.axes), squeeze=False)[0]
    assert draw(*EVERY[name], ax=axes).axes == list(axes)
    for argument, wrong in (("save", "x.txt"), ("save", 3), ("show", 1), ("ax", "axes")):
        with pytest.raises(ValueError, match=f"`{argument}` must be .* Received: {argument}="):
            draw(*EVERY[name], **{argument: wrong})
    with pytest.raises(ValueError, match="`save` must be "):
        draw(None, save="x.gif")  # before anything else
