"""`LearningRateSearch` end to end: its answer, its evidence, and that it goes on after whatever stopped it."""

import csv
import gc
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings

import keras
import keras_tuner
import numpy as np
import pytest

import kopt
import kopt.tuner
from tests.conftest import BACKEND, FLOATX

pytestmark = pytest.mark.skipif(FLOATX != "float32", reason="a search is the same in any precision")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 2)).astype("float32")
Y = X @ np.array([[1.0], [-2.0]], "float32")
DATA = {"x": X, "y": Y, "validation_data": (X, Y), "batch_size": 64, "verbose": 0}
STEPS = DATA | {"x": np.tile(X, (20, 1)), "y": np.tile(Y, (20, 1)), "shuffle": False}  # gradient descent on all rows
LIMIT = 2 / (2 * np.linalg.eigvalsh(X.T @ X / len(X)).max())  # of gradient descent on this mean squared error
Search = kopt.tuner.LearningRateSearch


@pytest.fixture(autouse=True)
def few_objects():
    """A trial collects garbage: leave it nothing from before to look at."""
    gc.freeze()


def linear(learning_rate):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(kopt.SGD(learning_rate), loss="mse", run_eagerly=BACKEND == "tensorflow")
    return model


class Simulated(keras_tuner.HyperModel):
    """A model that is not trained: its score is known, and nan where the rate is too high."""

    def __init__(self, best=0.01, cliff=0.3, before=lambda rate: None):
        super().__init__()
        self.best, self.cliff, self.before = best, cliff, before

    def build(self, hp):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(kopt.SGD(kopt.tuner.learning_rate(hp, "sgd")), loss="mse")
        return model

    def fit(self, hp, model, *args, **kwargs):
        rate = hp.get("learning_rate")
        self.before(rate)
        chance = np.random.default_rng(hp.values["kopt/seed"]).normal()
        return float("nan") if rate > self.cliff else abs(np.log10(rate / self.best)) + 0.01 * chance


def simulated(directory, model=None, **given):
    """A search that takes a second, as far as it comes."""
    given = {"stages": [(4, 1), (2, 2)], "confirm": 2, "directory": str(directory)} | given
    search = Search(model or Simulated(), given.pop("objective", "loss"), **given)
    search.search(verbose=0)
    return search


def tried(search):
    return [{name: row[name] for name in ("kind", "learning_rate", "seed", "score")} for row in search.result.trials]


def weights_in(search):
    return sorted(path.parent.name for path in search_folder(search).glob("trial_*/*.weights.h5"))


def search_folder(search):
    return pathlib.Path(search.project_dir)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole search with real trainings, which several tests look at."""
    gc.freeze()
    search = Search(linear, stages=[(4, 1), (3, 2)], confirm=2, directory=str(tmp_path_factory.mktemp("done")))
    search.search(**STEPS, epochs=2)
    return search


def test_the_answer_and_its_evidence(done):
    result = done.result
    assert result.is_complete
    assert LIMIT / 10 < done.best_learning_rate < LIMIT
    assert done.best_learning_rate <= done.stable_max
    assert np.sqrt(done.stable_max * done.cliff) == pytest.approx(LIMIT, rel=0.1)
    assert done.cliff / done.stable_max <= 1.2
    assert done.interval[0] <= done.best_learning_rate <= done.interval[1]
    assert done.best_batch_size is None
    kinds = [row["kind"] for row in result.trials]
    assert kinds[:5] == ["range test", *["stage 1"] * 4]
    assert kinds[-2:] == ["confirm"] * 2
    assert {row["status"] for row in result.trials} == {"COMPLETED"}
    seeds = [{row["seed"] for row in result.trials if (row["kind"] == "confirm") == is_it} for is_it in (False, True)]
    assert len(seeds[0]) == 2  # one for each stage
    assert len(seeds[1]) == 2
    assert not seeds[0] & seeds[1]
    confirmed = [row["score"] for row in result.trials
                 if row["kind"] == "confirm" and row["learning_rate"] == result.learning_rate]  # fmt: skip
    assert result.score == pytest.approx(np.mean(confirmed))
    (record,) = result.range_tests
    assert record.diverged_at > LIMIT


def test_diverged_trials_have_a_finite_penalty(done):
    """KerasTuner's score of a trial; what is shown has no score there."""
    trials = done.oracle.get_best_trials(99)
    bad = [trial.score for trial in trials if trial.metrics.get_last_value("kopt_diverged")]
    assert bad
    assert np.isfinite(bad).all()
    assert min(bad) > max(trial.score for trial in trials if trial.score not in bad)
    assert all(row["score"] is None for row in done.result.trials if row["diverged"])


def test_report_table_and_csv(done, tmp_path):
    result = done.result
    table = result.table().splitlines()
    assert len(table) == len(result.trials) + 1
    assert any(line.endswith("diverged") for line in table)
    text = done.report(tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == text
    assert f"Learning rate {result.learning_rate:.3g}" in text
    assert text.count("| stage 1 |") == 4
    result.to_csv(tmp_path / "trials.csv")
    with open(tmp_path / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == [row["learning_rate"] for row in result.trials]
    assert repr(result).startswith(f"<SearchResult of {len(result.trials)} trials: Learning rate ")
    assert str(result).splitlines()[0] == table[0]


def test_plot(done):
    picture = kopt.plot.search(done.result)
    labels = [line.get_label() for line in picture.axes[0].lines]
    assert f"answer: {done.best_learning_rate:.2g}" in labels
    assert "diverged" in labels
    assert picture.data["answer"] == done.best_learning_rate
    rows = [row for row in done.result.trials if row["kind"] == "stage 1" and not row["diverged"]]
    drawn = sorted((row["learning_rate"], row["score"]) for row in rows)
    np.testing.assert_array_equal(picture.data["stage 1"], drawn)
    np.testing.assert_array_equal(picture.axes[0].lines[0].get_xydata(), drawn)
    assert picture.data["diverged"].tolist() == [row["learning_rate"] for row in done.result.trials if row["diverged"]]


def test_models_and_hyperparameters(done):
    (hp,) = done.get_best_hyperparameters()
    assert hp.get("learning_rate") == done.best_learning_rate
    assert len(done.get_best_hyperparameters(3)) == 3
    model = done.build_best()
    assert float(model.optimizer.learning_rate) == pytest.approx(done.best_learning_rate)
    assert weights_in(done) == []


def test_once_more_trains_nothing(done, capsys):
    before = tried(done)
    done.search(**STEPS | {"verbose": 1}, epochs=2)
    assert tried(done) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"LearningRateSearch: goes on after {len(before)} trials"
    assert not any("stage 1:" in line for line in lines)


def test_a_compiled_model_is_copied(tmp_path):
    model = linear(0.5)
    before = model.get_weights()
    search = Search(model, "loss", stages=[(2, 1)], confirm=0, max_widen=0, range_test=False,
                    min_learning_rate=1e-3, max_learning_rate=0.1, directory=str(tmp_path))  # fmt: skip
    search.search(X, Y, batch_size=64, epochs=1, verbose=0)
    assert len(search.result.trials) == 2
    best = search.build_best()
    assert best is not model
    np.testing.assert_array_equal(best.get_weights()[0], before[0])  # weights and all
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert float(model.optimizer.learning_rate) == pytest.approx(0.5)
    for optimizer in (kopt.SGD(kopt.schedules.CosineDecay(initial=0.1)), keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.1, 10))):  # fmt: skip
        model.compile(optimizer, "mse")
        with pytest.raises(ValueError, match="`build` must be a model that is compiled .* its learning rate a number"):
            Search(model)
    with pytest.raises(ValueError, match="`build` must be a model that is compiled"):
        Search(keras.Sequential([keras.Input((2,))]))


@pytest.mark.parametrize("form", ["function", "lambda", "method", "more arguments"])
def test_functions_of_the_rate(form, tmp_path):
    class Models:
        def build(self, learning_rate):
            return linear(learning_rate)

    def more(learning_rate, units=1):
        return linear(learning_rate)

    build = {"function": linear, "lambda": lambda learning_rate: linear(learning_rate), "method": Models().build}
    search = Search(build.get(form, more), directory=str(tmp_path), max_learning_rate=3.0)
    assert (search.low, search.high) == (1e-6, 3.0)
    space = {hp.name: hp for hp in search.oracle.get_space().space}
    assert space["learning_rate"].sampling == "log"


def test_metric_to_maximise(tmp_path):
    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, activation="sigmoid")])
        rate = hp.Float("learning_rate", 1e-3, 1.0, sampling="log")
        model.compile(kopt.SGD(rate), "binary_crossentropy", metrics=["accuracy"], run_eagerly=BACKEND == "tensorflow")
        return model

    search = Search(build, "val_accuracy", stages=[(3, 2)], confirm=1, range_test=False, directory=str(tmp_path),
                    max_widen=0)  # fmt: skip
    labels = (Y[:, 0] > 0).astype("float32")
    search.search(X, labels, validation_data=(X, labels), batch_size=16, epochs=2, verbose=0)
    result = search.result
    assert result.direction == "max"
    scores = {row["learning_rate"]: row["score"] for row in result.trials if row["kind"] == "stage 1"}
    confirmed = {row["learning_rate"] for row in result.trials if row["kind"] == "confirm"}
    assert max(scores.values()) in {scores.get(rate) for rate in confirmed}
    assert 0 <= result.score <= 1
    assert "val_accuracy 0." in result.verdict()[0] or "val_accuracy 1" in result.verdict()[0]


def test_batch_sizes(tmp_path, capsys):
    search = Search(linear, stages=[(2, 1), (2, 2)], confirm=1, range_test=False, batch_sizes=[16, 64], top=1,
                    min_learning_rate=1e-3, max_learning_rate=0.1, max_widen=0, directory=str(tmp_path))  # fmt: skip
    data = {name: value for name, value in DATA.items() if name != "batch_size"}
    with pytest.raises(ValueError, match="`batch_size` must be left out beside `batch_sizes`"):
        search.search(**DATA, epochs=2)
    search.search(**data | {"verbose": 1}, epochs=2)
    assert "LearningRateSearch: 1/7 stage 1: " in capsys.readouterr().out  # twice 2, then 2 of the better size, and 1
    sizes = {kind: {row["batch_size"] for row in search.result.trials if row["kind"] == kind}
             for kind in ("stage 1", "stage 2", "confirm")}  # fmt: skip
    assert sizes == {"stage 1": {16, 64}, "stage 2": {16}, "confirm": {16}}  # four times the steps
    assert search.best_batch_size == 16
    assert "batch" in search.result.table().splitlines()[0]
    assert "batch size 16" in search.result.verdict()[0]
    stage = kopt.plot.search(search.result).axes[0].lines[0]
    assert len(stage.get_xdata()) == 2  # of this size alone


@pytest.mark.parametrize("keep", ["best", "all"])
def test_kept_weights(keep, tmp_path):
    def build(learning_rate):
        model = keras.Sequential([keras.layers.Dense(1)])  # not built yet
        model.compile(kopt.Adam(learning_rate), loss="mse", run_eagerly=BACKEND == "tensorflow")
        return model

    search = Search(build, stages=[(3, 1)], confirm=1, top=1, range_test=False, max_widen=0, keep_weights=keep,
                    min_learning_rate=1e-3, max_learning_rate=0.1, directory=str(tmp_path))  # fmt: skip
    search.search(**DATA, epochs=1)
    best = search.oracle.get_best_trials()[0]
    if keep == "best":
        assert weights_in(search) == [f"trial_{best.trial_id}"]
    else:
        assert len(weights_in(search)) == len(search.result.trials)
    (model,) = search.get_best_models()
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(best.score, rel=1e-4)


def test_lines(tmp_path, capsys):
    search = Search(Simulated(), "loss", stages=[(4, 1), (2, 2)], confirm=2, directory=str(tmp_path))
    search.search(epochs=2)
    lines = capsys.readouterr().out.splitlines()
    said = [line.removeprefix("LearningRateSearch: ") for line in lines if line.startswith("LearningRateSearch: ")]
    assert said[0].startswith("1/10 stage 1: ")  # of 4, 2 and twice 2 that confirm, if no range widens
    assert ", 1 epoch, loss " in said[0]
    assert any("2 epochs" in line for line in said)
    assert any("loss diverged" in line for line in said)
    assert any("(best " in line for line in said)
    assert sum("confirm" in line for line in said) == 4
    assert lines[-len(search.result.verdict()) :] == search.result.verdict()
    assert "Search: Running Trial" not in "\n".join(lines)  # KerasTuner's own


def test_silent(tmp_path, capsys):
    simulated(tmp_path)
    assert capsys.readouterr().out == ""


def test_all_diverge(tmp_path):
    search = Search(Simulated(cliff=0.0), "loss", stages=[(3, 1), (2, 2)], max_widen=1, directory=str(tmp_path))
    with pytest.warns(
        UserWarning, match="Every learning rate of stage 1 has diverged or failed.*No learning rate was found"
    ):
        search.search(epochs=2, verbose=0)
    assert search.best_learning_rate is None
    assert search.interval is None
    assert len(search.result.trials) == 5
    assert all(row["diverged"] for row in search.result.trials)
    assert search.cliff == min(row["learning_rate"] for row in search.result.trials)
    assert "No learning rate was found." in search.report()
    assert len(kopt.plot.search(search.result).axes[0].lines) == 1
    with pytest.raises(RuntimeError, match="There is no best model. Every learning rate of stage 1 has diverged"):
        search.build_best()


def test_a_model_that_is_nan_at_once(tmp_path):
    search = Search(linear, stages=[(2, 1)], max_widen=0, directory=str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search.search(X, Y * np.nan, validation_data=(X, Y * np.nan), epochs=1, verbose=0)
    assert any("Every learning rate" in str(one.message) for one in caught)
    assert search.best_learning_rate is None
    assert all(row["score"] is None for row in search.result.trials)


class StopError(Exception):
    pass


def stopping(number):
    """Raises before the training of a number."""
    count = iter(range(1000))

    def before(rate):
        if next(count) == number:
            raise StopError(f"at {rate}")

    return before


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trials and the result of a search that nothing interrupts."""
    search = simulated(tmp_path_factory.mktemp("whole"))
    return tried(search), search.result


@pytest.mark.parametrize("number", [0, 2, 5, 9, 12])
def test_goes_on_after_an_exception(number, tmp_path, whole):
    with pytest.raises(StopError, match="at "):
        simulated(tmp_path, Simulated(before=stopping(number)))
    assert len(list(tmp_path.glob("*/trial_*"))) == number + 1
    trained = []
    again = simulated(tmp_path, Simulated(before=trained.append))
    assert tried(again) == whole[0]
    assert again.result == whole[1]
    assert len(trained) == len(whole[0]) - number  # nothing twice, but the one that was interrupted


def test_interrupted_again_and_again(tmp_path, whole):
    """One trial each time."""
    for _ in range(len(whole[0])):
        try:
            simulated(tmp_path, Simulated(before=stopping(1)))
        except StopError:
            continue
    assert simulated(tmp_path).result == whole[1]


def test_the_same_search_goes_on_after_an_interrupt(tmp_path, whole):
    model = Simulated(before=stopping(3))
    search = Search(model, "loss", stages=[(4, 1), (2, 2)], confirm=2, directory=str(tmp_path))
    with pytest.raises(StopError):
        search.search(epochs=2, verbose=0)
    assert not search.result.is_complete
    assert search.best_learning_rate is None
    assert search.result.verdict() == ["The search has not ended."]
    with pytest.raises(RuntimeError, match="There is no best model"):
        search.build_best()
    search.search(epochs=2, verbose=0)
    assert search.result == whole[1]


def test_a_kill_between_the_metrics_of_a_trial_and_its_end(tmp_path, whole):
    search = simulated(tmp_path)
    path = search_folder(search) / "trial_0004" / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "RUNNING", "score": None}))
    trained = []
    assert simulated(tmp_path, Simulated(before=trained.append)).result == whole[1]
    assert len(trained) == 1


@pytest.mark.parametrize("lost", [["tuner0.json"], ["tuner0.json", "oracle.json"]])
def test_files_that_were_not_written_yet(lost, tmp_path, whole):
    """KerasTuner writes a trial, then its oracle, then its tuner."""
    folder = search_folder(simulated(tmp_path))
    for name in lost:
        (folder / name).unlink()
    again = simulated(tmp_path)
    assert again.result == whole[1]


def test_a_trial_that_has_a_folder_only(tmp_path, whole):
    with pytest.raises(StopError):
        simulated(tmp_path, Simulated(before=stopping(4)))
    (path,) = tmp_path.glob("*/trial_0004/trial.json")
    path.rename(path.with_name(f"trial.json.{os.getpid()}.tmp"))  # as a kill leaves it, before the oracle's file
    (path,) = tmp_path.glob("*/oracle.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ongoing_trials": {}}))
    assert simulated(tmp_path).result == whole[1]


@pytest.mark.parametrize("name", ["oracle.json", "tuner0.json", "trial_0003/trial.json"])
def test_a_torn_file_is_told(name, tmp_path):
    path = search_folder(simulated(tmp_path)) / name
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises(RuntimeError, match="A file in .* is damaged.*Give another `project_name`, or `overwrite=True`"):
        simulated(tmp_path)
    assert simulated(tmp_path, overwrite=True).result.is_complete


@pytest.mark.parametrize("other", [
    {"seed": 1}, {"stages": [(5, 1), (2, 2)]}, {"stages": [(4, 1), (2, 3)]}, {"confirm": 3}, {"objective": "val_loss"},
    {"batch_sizes": [8, 16]}, {"min_learning_rate": 1e-7}, {"max_learning_rate": 1.0},
], ids=str)  # fmt: skip
def test_other_arguments_in_the_same_folder_are_refused(other, tmp_path_factory, other_arguments):
    before = sorted(other_arguments.rglob("*"))
    with pytest.raises(
        ValueError, match="`overwrite` must be True, or `project_name` another one: trial 0.* is of a s"
    ):
        simulated(other_arguments, **other)
    assert sorted(other_arguments.rglob("*")) == before


@pytest.fixture(scope="module")
def other_arguments(tmp_path_factory):
    directory = tmp_path_factory.mktemp("other")
    simulated(directory)
    return directory


def test_other_batch_sizes_of_the_same_number_are_refused(tmp_path):
    simulated(tmp_path, batch_sizes=[8, 16])
    with pytest.raises(ValueError, match="trial 0000, at .* is of a search with other arguments"):
        simulated(tmp_path, batch_sizes=[16, 32])
    assert simulated(tmp_path, batch_sizes=[16, 32], project_name="another").best_batch_size in (16, 32)


def test_seeds(tmp_path):
    rates = [{row["learning_rate"] for row in simulated(tmp_path / str(seed), seed=seed, confirm=0).result.trials}
             for seed in (0, 1, 2)]  # fmt: skip
    assert not rates[0] & rates[1]
    assert not rates[1] & rates[2]
    assert {row["learning_rate"] for row in simulated(tmp_path / "again", confirm=0).result.trials} == rates[0]


def test_a_failing_range_test_shows_its_own_error(tmp_path):
    search = Search(linear, directory=str(tmp_path))
    wrong = X[:, :1]
    with pytest.raises(Exception, match="nput|hape|dim") as caught:  # in the words of Keras
        search.search(X, Y, validation_data=(wrong, Y), epochs=1, verbose=0)
    assert not isinstance(caught.value, keras_tuner.errors.FatalError)
    assert len(list(tmp_path.glob("*/trial_*"))) == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_a_build_that_raises(at_once, tmp_path):
    def build(hp):
        rate = kopt.tuner.learning_rate(hp, "sgd")
        if at_once or not (rate < 1e-3 or rate > 1):
            try:
                raise KeyError("the first")
            except KeyError as error:
                raise LookupError("my own") from error
        return linear(rate)

    with pytest.raises(LookupError, match="my own") as caught:
        Search(build, range_test=False, directory=str(tmp_path)).search(**DATA, epochs=1)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "build" in [entry.name for entry in caught.traceback]
    assert len(list(tmp_path.glob("*/trial_*"))) <= 9


def test_refusals(tmp_path):
    def search(build=Simulated(), objective="loss", **given):  # noqa: B008
        return Search(build, objective, directory=str(tmp_path), **given)

    def plain(hp):
        return linear(0.1)

    def ignores(hp):
        model = linear(kopt.tuner.learning_rate(hp))
        model.compile("sgd", loss="mse")
        return model

    for low, high in ((1.0, 0.1), (0.1, 0.1)):
        with pytest.raises(ValueError, match=r"`max_learning_rate` must be greater than `min_learning_rate`"):
            search(min_learning_rate=low, max_learning_rate=high)
    with pytest.raises(ValueError, match="`min_learning_rate` must be a finite number greater than 0"):
        search(min_learning_rate=0)
    with pytest.raises(ValueError, match=r"`build` must be a function that asks for kopt.tuner.learning_rate\(hp\)"):
        search(plain)
    with pytest.raises(ValueError, match="`build` must be a function whose optimizer has the learning rate"):
        search(ignores).search(**DATA, epochs=1)
    for objective in (None, ["loss", "val_loss"], 3):
        with pytest.raises(ValueError, match="`objective` must be the name of one metric"):
            search(objective=objective)
    with pytest.raises(ValueError, match="Could not infer optimization direction"):
        search(objective="mine")
    for stages in ([], [(1,)], [(0, 1)], [(1, 1.5)], 3, [(1, 2, 3)], [(3, 2), (2, 1)]):
        with pytest.raises(ValueError, match="`stages` must be a list of pairs: .* below those before"):
            search(stages=stages)
    with pytest.raises(ValueError, match="`epochs` must be given"):
        search().search(X, Y)
    with pytest.raises(ValueError, match="`initial_epoch` must be left out"):
        search().search(X, Y, epochs=1, initial_epoch=1)
    for name in ("x", "validation_data"):
        with pytest.raises(ValueError, match=f"`{name}` must be data that can be read again.*no generator"):
            search().search(**DATA | {name: (batch for batch in [(X, Y)])}, epochs=1)
    with pytest.raises(RuntimeError, match="There is no result before `search`"):
        search().best_learning_rate  # noqa: B018
    assert not list(tmp_path.glob("*/trial_*"))


@pytest.mark.parametrize("returned", [None, {"other": 1.0}, "text"])
def test_what_a_fit_must_return(returned, tmp_path):
    class Odd(Simulated):
        def fit(self, hp, model, *args, **kwargs):
            return returned

    with pytest.raises(ValueError, match="`fit` must return a History, the objective, or a dict with 'loss'"):
        simulated(tmp_path, Odd())


def test_an_objective_that_is_not_logged(tmp_path):
    search = Search(linear, stages=[(2, 3)], range_test=False, directory=str(tmp_path))
    count = []

    class Count(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            count.append(epoch)

        def __deepcopy__(self, memo):
            return self

    with pytest.raises(
        ValueError, match="`objective` must be one of what the training logs: loss; give `validation_da"
    ):
        search.search(X, Y, epochs=3, verbose=0, callbacks=[Count()])
    assert count == [0]  # at the first epoch


def test_a_training_that_explodes_slowly_ends_early(tmp_path):
    """Few batches an epoch, a loss that stays finite: three epochs in a row are enough."""
    epochs = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            epochs.append((float(self.model.optimizer.learning_rate), epoch, logs["loss"]))

        def __deepcopy__(self, memo):
            return self

    low = LIMIT * 2
    search = Search(linear, stages=[(1, 12)], confirm=0, range_test=False, max_widen=0, directory=str(tmp_path),
                    min_learning_rate=low, max_learning_rate=low * 1.1)  # fmt: skip
    with pytest.warns(UserWarning, match="Every learning rate"):
        search.search(**DATA, epochs=12, callbacks=[Count()])
    assert all(np.isfinite(loss) for *_, loss in epochs)
    assert max(epoch for _, epoch, _ in epochs) < 8


CHILD = """
import sys, time
from tests.test_tuner_search import Simulated, simulated, tried
search = simulated(sys.argv[1], Simulated(before=lambda rate: time.sleep(0.02)))
print(tried(search), search.best_learning_rate)
"""


def in_a_child(directory, after=None):
    """Run a search in a process of its own, and kill it some seconds after its folder has appeared."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(directory)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, **pipe, env=os.environ | {"PYTHONPATH": os.getcwd()})
    if after is not None:
        begun = time.monotonic()
        while not list(directory.glob("*/oracle.json")) and child.poll() is None and time.monotonic() < begun + 120:
            time.sleep(0.005)
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
    out, error = child.communicate(timeout=300)
    assert child.returncode in (0, -signal.SIGKILL), error
    return None if child.returncode else out.splitlines()[-1]


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_goes_on_after_a_kill(kills, tmp_path, whole):
    """At any moment: in a training, while a file is written."""
    chance = random.Random(kills)
    for _ in range(kills):
        in_a_child(tmp_path, after=chance.uniform(0, 0.4))
    assert simulated(tmp_path).result == whole[1]


def test_a_policy_of_precision_is_kept(tmp_path):
    """KerasTuner clears the session before each trial, and with it the policy."""
    before, seen = keras.config.dtype_policy(), []

    class Seen(Simulated):
        def build(self, hp):
            seen.append(keras.config.dtype_policy().name)
            return super().build(hp)

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        simulated(tmp_path, Seen())
        assert set(seen) == {"mixed_bfloat16"}
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy(before)


def test_a_batch_size_of_the_users_own(tmp_path):
    class Own(Simulated):
        def build(self, hp):
            hp.Choice("batch_size", [8, 16])
            return super().build(hp)

    assert simulated(tmp_path, Own()).result.is_complete


def test_a_range_that_was_edited_is_another_search(tmp_path):
    class Other(Simulated):
        def build(self, hp):
            hp.Float("learning_rate", 1e-6, 1e-4, sampling="log")
            return super().build(hp)

    simulated(tmp_path)
    with pytest.raises(ValueError, match="`overwrite`"):
        simulated(tmp_path, Other())


def test_epochs_beside_stages(tmp_path):
    search = Search(Simulated(), "loss", stages=[(2, 1)], directory=str(tmp_path))
    with pytest.raises(ValueError, match="`epochs` must be left out.*Received: epochs=50"):
        search.search(epochs=50)


def test_a_low_range_and_many_rows_for_validation(tmp_path):
    """An accuracy that no rate has changed: on all rows, as `fit` has it."""
    x = np.random.default_rng(1).normal(size=(3000, 2)).astype("float32")
    y = (x[:, 0] > 0).astype("int64")

    def build(learning_rate):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(kopt.SGD(learning_rate), loss, metrics=["accuracy"])
        return model

    given = {"min_learning_rate": 1e-9, "max_learning_rate": 1e-7, "range_test": False, "max_widen": 1}
    search = Search(build, "val_accuracy", stages=[(3, 1)], confirm=0, directory=str(tmp_path), **given)
    search.search(x[:64], y[:64], validation_data=(x, y), batch_size=64, verbose=0)
    assert search.result.notes[0] == "From 1e-09 to 1e-07 none has moved the model: up to 1e-05."


def test_the_best_trials_are_no_range_tests(done):
    kinds = {trial.hyperparameters.values["kopt/kind"] for trial in done.oracle.get_best_trials(99)}
    assert "range test" not in kinds
    assert "confirm" in kinds


def test_another_model_or_other_data_are_refused(tmp_path):
    simulated(tmp_path)

    class Wider(Simulated):
        def build(self, hp):
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
            model.compile(kopt.SGD(kopt.tuner.learning_rate(hp, "sgd")), loss="mse")
            return model

    with pytest.raises(ValueError, match=r"`overwrite` must be True.*here is a search with model=.*overwrite=False"):
        simulated(tmp_path, Wider())
    with pytest.raises(ValueError, match="here is a search with explode=3.0, not 5.0"):
        simulated(tmp_path, explode=5.0)
    search = Search(Simulated(), "loss", stages=[(4, 1), (2, 2)], confirm=2, directory=str(tmp_path))
    with pytest.raises(ValueError, match="here is a search with x=None, not"):
        search.search(x=X, verbose=0)


def test_callbacks_of_a_search(tmp_path):
    search = Search(linear, stages=[(1, 1)], confirm=0, range_test=False, max_widen=0, directory=str(tmp_path))
    for wrong in (3, [kopt.callbacks.LearningRateFinder()], ["early"]):
        with pytest.raises(
            ValueError, match="`callbacks` must be .*without `LearningRateFinder`. Received: callbacks="
        ):
            search.search(**DATA, callbacks=wrong)
    search.search(**DATA, callbacks=keras.callbacks.EarlyStopping())
    assert search.result.is_complete


@pytest.mark.parametrize("wrong", [3, "/dev/null/x"])
def test_a_directory_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="`directory` must be"):
        Search(linear, directory=wrong)


def test_batch_sizes_want_arrays(tmp_path):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return X[:8], Y[:8]

    search = Search(linear, batch_sizes=[8, 16], directory=str(tmp_path))
    with pytest.raises(ValueError, match="`batch_sizes` must be None beside data that come in batches"):
        search.search(Batches(), validation_data=(X, Y), epochs=1)


def test_all_rates_alike_are_told(tmp_path):
    """A callback sets the rate, whatever the search says."""
    fixed = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.05)
    search = Search(linear, stages=[(3, 1)], confirm=0, range_test=False, max_widen=0, directory=str(tmp_path))
    search.search(**DATA, callbacks=[fixed])
    assert any("does a callback set the rate?" in note for note in search.result.notes)
