"""The recipes run, learn, and write what they say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests.conftest import BACKEND

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart(tmp_path, capsys):
    result = recipe("quickstart").main(["--smoke", "--rules", "momentum", "Adam", "--out", str(tmp_path)])
    assert [row["rule"] for row in result["table"]] == ["momentum", "Adam"]
    assert all(row["accuracy"] > 50 for row in result["table"])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "history.csv", "losses.png", "result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 2 * 60
    printed = capsys.readouterr().out
    assert "Adam" in printed
    assert "Next:" in printed


def test_quickstart_writes_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe("quickstart").main(["--smoke", "--rules", "SGD", "--quiet"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [["--seeds", "0"], ["--steps", "1"], ["--out", __file__], ["--check", "--rules", "Adam"], ["--rules", "Foo"]],
)
def test_quickstart_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("quickstart").main(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="whole trainings; the rules are the same on all backends")
def test_quickstart_claim():
    main = recipe("quickstart").main
    main(["--seeds", "1", "--quiet", "--check", "--rules", "SGD", "Adam"])
    with pytest.raises(SystemExit, match="no faster than SGD"):
        main(["--seeds", "1", "--steps", "5", "--quiet", "--check", "--rules", "SGD", "Adam"])


def test_polyak(tmp_path, capsys):
    result = recipe("polyak").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["polyak.png", "result.json"]
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]
    assert [row["arm"] for row in result["rows"]][-1] == "post hoc, chosen"
    assert "The last training, averaged afterwards" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="sixteen trainings; the averages are the same on all backends")
def test_polyak_claim():
    """Other eight seeds than the README's: better than the raw weights, both ways, and than Keras's average."""
    recipe("polyak").main(["--check", "--first-seed", "200"])


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--epochs", "1"], ["--check", "--seeds", "5"]])
def test_polyak_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("polyak").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_snapshot_ensemble(tmp_path, capsys):
    args = ["--smoke", "--out", str(tmp_path)]
    result = recipe("snapshot_ensemble").main(args)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["result.json", "snapshot_ensemble.png"]
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]
    assert [row["arm"] for row in result["rows"]][5::5] == ["snapshots", "5 tuned singles"]
    assert all(row["error"] < 60 for row in result["rows"])
    assert "against the best member" in capsys.readouterr().out


def test_snapshot_ensemble_corrects_for_many_comparisons():
    """Holm's procedure, over every arm but the snapshots themselves."""
    module, rng = recipe("snapshot_ensemble"), np.random.default_rng(0)
    errors = {"snapshots": 10 + rng.normal(size=12)}
    errors |= {f"{by:g}": errors["snapshots"] + by + rng.normal(size=12) for by in (0.1, 0.6, 1.0, -2.0)}
    rows = module.compare([{arm: {"error": values[i]} for arm, values in errors.items()} for i in range(12)])
    found = {row["arm"]: row for row in rows}
    raw = {arm: module.wilcoxon(errors[arm] - errors["snapshots"]).pvalue for arm in list(errors)[1:]}
    order = sorted(raw, key=raw.get)
    wanted = np.minimum(1, np.maximum.accumulate([raw[arm] * (4 - i) for i, arm in enumerate(order)]))
    np.testing.assert_allclose([found[arm]["p"] for arm in order], wanted)
    assert "p" not in found["snapshots"]
    assert found["1"]["margin"] == pytest.approx(np.mean(errors["1"] - errors["snapshots"]))
    assert found["-2"]["wins"] == (errors["-2"] > errors["snapshots"]).sum()


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="a hundred trainings; the ensembles are the same on all backends")
def test_snapshot_ensemble_claim():
    """On a few seeds that the page has not; the difference to the tuned single takes `--check` and its 30."""
    result = recipe("snapshot_ensemble").main(["--first-seed", "200", "--seeds", "12"])
    of = {row["arm"]: row for row in result["rows"]}
    assert of["tuned single"]["margin"] > 0
    for arm in ("step schedule", "single cycles", "last snapshot", "soup"):
        assert of[arm]["margin"] > 0
        assert of[arm]["p"] < 0.05
    assert of["5 tuned singles"]["margin"] < 0


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--epochs", "9"], ["--check", "--seeds", "5"], ["--check", "--regime", "clean"]]
)
def test_snapshot_ensemble_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("snapshot_ensemble").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def by_lbfgs(directory, *args):
    """What the recipe finds, and says; JAX has float64 in a process that began with it."""
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(RECIPES.parent)}
    command = [sys.executable, RECIPES / "lbfgs.py", "--out", directory, *args]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads((directory / "result.json").read_text()), said


def test_lbfgs(tmp_path):
    result, said = by_lbfgs(tmp_path, "--smoke")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["lbfgs.png", "result.json"]
    assert [row["method"] for row in result["rows"]] == ["L-BFGS, 10 pairs", "SSBroyden"]
    assert all(row["losses"][-1] < 0.5 for row in result["rows"])
    assert "After Adam, seed 0:" in said


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the methods are the same on all backends; on torch, half an hour")
def test_lbfgs_claim(tmp_path):
    """Self-scaled Broyden ends far below L-BFGS."""
    result, _ = by_lbfgs(tmp_path, "--seeds", "2", "--quiet", "--check")
    assert result["handed"]["Adam, then SSBroyden"] < 1e-2 * result["handed"]["Adam, then L-BFGS"]


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--evaluations", "9"], ["--out", __file__]])
def test_lbfgs_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("lbfgs").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_style_transfer(tmp_path, capsys):
    result = recipe("style_transfer").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["result.json", "style_transfer.png"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [row["optimizer"] for row in result["rows"]][:2] == ["L-BFGS", "Adam, rate 0.03"]
    assert all(np.isfinite(row["loss"]) for row in result["rows"])


@pytest.mark.parametrize("wrong", [["--evals", "1"], ["--size", "20"], ["--check", "--smoke"], ["--out", __file__]])
def test_style_transfer_refuses_before_it_begins(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("style_transfer").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_lr_search(tmp_path, capsys):
    result = recipe("lr_search").main(["--smoke", "--epochs", "2", "--out", str(tmp_path)])
    files = ["lr_search.png", "report.md", "result.json", "trials"]
    assert sorted(f.name for f in tmp_path.iterdir()) == files
    assert 1e-3 < result["learning_rate"] < 3
    assert result["losses"]["the answer"][-1] < result["losses"]["a hundredth"][-1]
    said = capsys.readouterr().out
    assert "Next:" in said
    recipe("lr_search").main(["--smoke", "--epochs", "2", "--out", str(tmp_path), "--quiet"])
    assert json.loads((tmp_path / "result.json").read_text())["learning_rate"] == result["learning_rate"]


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--seed", "-1"], ["--out", __file__]])
def test_lr_search_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("lr_search").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_rates(tmp_path, capsys):
    result = recipe("rates").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rates.png", "result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [(row["rate"], row["judged"]) for row in result["rows"]] == [
        (0.0003, "too low"), (0.1, "good"), (10.0, "too high")]  # fmt: skip
    assert "judged" in capsys.readouterr().out


def test_rates_say_what_does_not_hold():
    module = recipe("rates")
    right = {0.0003: [2.3, 2.2], 0.003: [2.2, 1.0], 0.1: [1.1, 0.02], 0.4: [1.0, 0.3], 10.0: [9.0, np.nan]}
    assert module.lost({rate: [losses] for rate, losses in right.items()}) == []
    for rate, wrong in ((0.0003, [2.2, 2.3]), (0.4, [1.2, 0.3]), (0.4, [1.0, 0.01]), (10.0, [9.0, 2.0])):
        assert len(module.lost({one: [losses] for one, losses in (right | {rate: wrong}).items()})) == 1


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="fifteen trainings; they are the same on all backends")
def test_rates_claim():
    """On other seeds than the docstring's."""
    recipe("rates").main(["--check", "--first-seed", "200", "--seeds", "3", "--quiet"])


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--first-seed", "-1"], ["--check", "--smoke"], ["--out", __file__]]
)
def test_rates_refuse_before_they_train(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("rates").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_landscapes(tmp_path, capsys):
    result = recipe("landscapes").main(["--smoke", "--quiet", "--out", str(tmp_path)])
    pictures = ["beale.gif", "beale.html", "long_valley.png", "planes.png"]
    pictures += ["result.json", "saddle.gif", "schedule.png", "slices.png"]
    assert sorted(f.name for f in tmp_path.iterdir()) == pictures
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert list(result["left"])[:2] == ["SGD", "momentum"]
    assert [len(heights) for heights in result["barriers"][0].values()] == [1, 1, 2]
    assert "the highest barrier" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="three trainings a seed; they are the same on all backends")
def test_landscapes_claim():
    """On a seed that the README has not."""
    recipe("landscapes").main(["--check", "--quiet", "--first-seed", "200", "--seeds", "1"])


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--first-seed", "-1"], ["--check", "--smoke"], ["--out", __file__]]
)
def test_landscapes_refuses_before_it_begins(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("landscapes").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_pictures_are_small_enough_for_a_page():
    for file in (RECIPES / "pictures").iterdir():
        assert file.stat().st_size < 300_000, file.name


def test_momentum_anneal(tmp_path, capsys):
    result = recipe("momentum_anneal").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["momentum_anneal.png", "result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [row["momentum"] for row in result["rows"]] == ["0.9", "0.5 to 0.99"]
    assert "decaying rate" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="two thousand small trainings; they are the same on all backends")
def test_momentum_anneal_claim():
    """On other seeds than the docstring's; the third setting takes as long as these."""
    settings = ["--settings", "constant rate", "decaying rate"]
    recipe("momentum_anneal").main(["--check", "--first-seed", "300", *settings])


def test_batch_size(tmp_path, capsys):
    result = recipe("batch_size").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["batch_size.png", "result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    by_rule = {row["rule"]: row["rate"] / result["rows"][0]["rate"] for row in result["rows"] if row["size"] == 512}
    assert (by_rule["constant"], by_rule["square root"], by_rule["linear"]) == (1, 4, 16)
    assert "equal epochs" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="seven hundred trainings; they are the same on all backends")
def test_batch_size_claim():
    """On other seeds than the docstring's."""
    recipe("batch_size").main(["--check", "--first-seed", "300", "--budgets", "equal epochs"])


@pytest.mark.parametrize("name", ["momentum_anneal", "batch_size"])
@pytest.mark.parametrize(
    "wrong", [["--seeds", "0"], ["--first-seed", "5"], ["--check", "--smoke"], ["--out", __file__]]
)
def test_sweeps_refuse_before_they_train(name, wrong, capsys):
    with pytest.raises(SystemExit):
        recipe(name).main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_regularizers(tmp_path, capsys):
    result = recipe("regularizers").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["regularizers.png", "result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [row["arm"] for row in result["rows"]] == ["none", "Dropout", "SVM", "logistic regression"]
    assert all(0.5 < one["AUROC, mean of 20"] <= 1 for one in result["mc_predict"])
    assert "mc_predict" in capsys.readouterr().out


def test_regularizers_train_each_seed_by_itself():
    """The network of an arm is compiled once; what a seed comes to hangs on no other that was trained before it."""
    module = recipe("regularizers")
    both, _ = module.train("DropConnectDense", 0.5, [7, 8], 10)
    alone, _ = module.train("DropConnectDense", 0.5, [8], 10)
    assert both[1] == alone[0]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="48 trainings; the layers are the same on all backends")
def test_regularizers_claim():
    """On other seeds than the docstring's."""
    recipe("regularizers").main(["--check", "--first-seed", "200", "--arms", "DropBlock2D", "Dropout"])


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--first-seed", "5"], ["--check", "--smoke"], ["--arms", "none"]])
def test_regularizers_refuse_before_they_train(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("regularizers").main(wrong)
    assert wrong[0] in capsys.readouterr().err


def unreachable(*arguments, **named):
    raise AssertionError("the network was touched")


def test_transfer_images(tmp_path, monkeypatch, capsys):
    """The smoke never touches the network, and says that its figures are of no pretrained weights."""
    monkeypatch.setattr("socket.socket.connect", unreachable)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", unreachable)
    monkeypatch.setattr(keras.applications, "MobileNetV2", unreachable)
    result = recipe("transfer_images").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["result.json", "transfer_images.png"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [row["plan"] for row in result["rows"]][2:] == ["scratch", "fine_tune"]
    assert not result["pretrained"]
    assert "NO PRETRAINED WEIGHTS" in capsys.readouterr().out


SMALL = ["--steps", "4", "--seeds", "1", "--per-class", "2", "--plans", "scratch", "fine_tune"]


def small_mobile_net(weights=None, input_shape=None, alpha=None, include_top=None, pooling=None):
    """In the place of MobileNetV2: what "imagenet" would fetch is all 0.1."""
    assert (alpha, include_top, pooling) == (0.35, False, "avg")
    layers = [keras.Input(input_shape), keras.layers.Conv2D(4, 3, 8), keras.layers.BatchNormalization()]
    body = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name="mobilenet")
    if weights == "imagenet":
        body.set_weights([0 * weight + 0.1 for weight in body.get_weights()])
    return body


def small_cifar():
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (40, 32, 32, 3)).astype("uint8"), np.arange(40).reshape(-1, 1) % 10), (None, None)


def test_transfer_images_with_what_is_fetched(monkeypatch, capsys):
    module = recipe("transfer_images")
    monkeypatch.setattr(keras.applications, "MobileNetV2", small_mobile_net)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", small_cifar)
    result = module.main(SMALL)
    assert result["pretrained"]
    assert result["source"] == "CIFAR-10"
    assert "96 x 96" in capsys.readouterr().out
    body = module.Body(offline=False, epochs=1)
    assert all((weight == np.float32(0.1)).all() for weight in body.model(2)[0].get_weights())
    assert not all((weight == np.float32(0.1)).all() for weight in body.model(2, fresh=True)[0].get_weights())


def test_transfer_images_where_nothing_can_be_fetched(monkeypatch, capsys):
    def fails(*arguments, **named):
        raise OSError("URL fetch failure\nand much more")

    monkeypatch.setattr(keras.applications, "MobileNetV2", fails)
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fails)
    result = recipe("transfer_images").main([*SMALL, "--check"])
    said = capsys.readouterr().out
    assert not result["pretrained"]
    assert "MobileNetV2 cannot be had: OSError: URL fetch failure\n" in said
    assert "CIFAR-10 cannot be had: OSError: URL fetch failure\n" in said
    assert "the claim was not checked" in said


def test_transfer_images_of_ones_own(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, first in (("cats", 0), ("dogs", 128)):
        (tmp_path / name).mkdir()
        for i in range(4):
            image = rng.integers(first, first + 128, (20, 30, 3))
            keras.utils.save_img(tmp_path / name / f"{i}.png", image, scale=False)
    module, own = recipe("transfer_images"), ["--data", str(tmp_path), "--offline"]
    assert module.main([*own, *SMALL])["source"].endswith("cats, dogs")
    monkeypatch.setattr(module, "Body", lambda *arguments, **named: SimpleNamespace(size=32))
    with pytest.raises(SystemExit, match="less than the 4 images of the smallest class"):
        module.main([*own, "--per-class", "4"])


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--steps", "1"], ["--data", __file__], ["--out", __file__]])
def test_transfer_images_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("transfer_images").main(wrong)


def test_transfer_digits(tmp_path, capsys):
    result = recipe("transfer_digits").main(["--smoke", "--out", str(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "result.json", "transfer_digits.png"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    methods = ["pixels, logistic", "pixels, SVM", "scratch", "one-rate", "fine-tune", "features, logistic"]
    assert [row["method"] for row in result["rows"]] == methods
    assert "fine-tune is better by" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["loop", "new-classes"])
def test_transfer_digits_keeps_what_it_tunes_on_out_of_every_test(task):
    """Balanced labels; no image is used twice by a seed, and none to tune on is tested."""
    digits = recipe("transfer_digits").digits
    tested, classes = digits(task, [100, 101], False), 2 if task == "loop" else 5
    tuned = digits(task, range(3), True)
    for seed in (0, 1):
        seen = {part: {image.tobytes() for image in tested[part][0][:, seed]} for part in range(3)}
        assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
        others = {image.tobytes() for part in tuned[1:] for image in part[0][:, seed]}
        assert not others & (seen[1] | seen[2])
        for labels in (10, 20, 50):
            assert set(np.bincount(tested[1][1][:labels, seed])) == {labels // classes}


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="hundreds of trainings; they are the same on all backends")
def test_transfer_digits_claim():
    """On other draws than the docstring's."""
    recipe("transfer_digits").main(["--check", "--first-seed", "200", "--plan", "one-rate", "fine-tune", "--quiet"])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--seeds", "0"],
        ["--first-seed", "5"],
        ["--check", "--smoke"],
        ["--check", "--plan", "probe"],
        ["--task", "odd"],
        ["--out", __file__],
    ],
)
def test_transfer_digits_refuses_before_it_trains(wrong, capsys):
    with pytest.raises(SystemExit):
        recipe("transfer_digits").main(wrong)
    assert wrong[0] in capsys.readouterr().err


FENCES = re.compile(r"```python\n(.+?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "recipes/update_rules.md"])
def test_the_code_on_the_pages_runs(page, tmp_path, monkeypatch):
    """Each block goes on from the ones before it, with data for `x` and `y` and tensors for a rule."""
    monkeypatch.chdir(tmp_path)
    tensors = {name: keras.ops.ones(3) for name in "gwv"}
    scope = {"x": np.ones((8, 64), "float32"), "y": np.zeros(8, "int64"), **tensors}
    blocks = FENCES.findall((RECIPES.parent / page).read_text())
    assert blocks or page != "README.md"
    for block in blocks:
        exec(compile(block.replace("epochs=5", "epochs=1, verbose=0"), page, "exec"), scope)
