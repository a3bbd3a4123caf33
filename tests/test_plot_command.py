"""`python -m kopt.plot`: what it writes, says and refuses."""

import csv
import subprocess
import sys

import pytest

import kopt.schedules as ks
from kopt.plot import expressions
from kopt.plot.__main__ import main

pytest.importorskip("matplotlib", reason="pictures come with the extra `plot`")


def test_trajectories(tmp_path, capsys):
    files = [str(tmp_path / f"x.{ending}") for ending in ("gif", "html", "png")]
    given = ["--optimizers", "sgd=0.01, adam=0.1,lbfgs", "--surface", "long-valley", "--steps", "12"]
    main(["trajectories", *given, "--start", "-3", "0.5", "--view", "-6", "6", "-2", "2", "-o", *files])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a long valley, 12 steps from (-3, 0.5)"
    assert [line.split()[0] for line in said[1:4]] == ["SGD", "Adam", "L-BFGS"]
    assert [line.split(": ")[0] for line in said[4:]] == files


def test_schedules_in_a_terminal_and_as_a_picture(tmp_path, capsys):
    text = "WarmUp(steps=5) >> CosineDecay(initial=0.1)"
    main(["schedule", text, "OneCycle", "--steps", "60"])
    said = capsys.readouterr().out.splitlines()
    expected = (ks.WarmUp(steps=5) >> ks.CosineDecay(initial=0.1)).sparkline(60)
    assert said == [text, expected, "OneCycle", ks.OneCycle().sparkline(60)]
    main(["schedule", text, "-o", str(tmp_path / "rates.png")])
    assert capsys.readouterr().out.startswith(str(tmp_path / "rates.png"))


def test_histories_of_one_name_are_one_band(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "a2", "b"):
        with open(f"{name}.csv", "w", newline="") as file:
            rows = [["epoch", "loss", "val_loss"], [0, 1.0, 1.5], [1, 0.5, 1.25]]
            csv.writer(file).writerows(rows)
    drawn = []
    monkeypatch.setattr("kopt.plot.history", lambda runs, **how: drawn.append((runs, how)))
    monkeypatch.setattr("os.path.getsize", lambda file: 5000)
    main(["history", "first=a*.csv", "b.csv", "--metrics", "loss,accuracy", "-o", "x.png"])
    assert drawn == [
        ({"first": ["a1.csv", "a2.csv"], "b": ["b.csv"]}, {"metrics": ["loss", "accuracy"], "save": ["x.png"]})
    ]
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "a1.csv").rename(tmp_path / "lr=0.1" / "a1.csv")
    main(["history", "adam=lr=0.1/a1.csv", "lr=0.1/*.csv", "-o", "x.png"])
    assert drawn[1][0] == {"adam": ["lr=0.1/a1.csv"], "lr=0.1/a1": ["lr=0.1/a1.csv"]}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    main(["history", "first=a*.csv", "b.csv", "-o", "x.png"])
    assert (tmp_path / "x.png").stat().st_size > 5000


WRITTEN = [
    "CosineDecay",
    "StepDecay(0.5, every_steps=200)",
    "0.1 * OneCycle(shape='linear')",
    "WarmUp(steps=5) >> CosineDecay(initial=0.1, steps=50)",
    "Staircase([3, 6], [0.1, 0.01])",
    "(WarmUp(steps=5) * CosineDecay(steps=10)).repeat(3).offset(steps=2).lasting(steps=9)",
    "Linear(0.5, 0.9, initial=None)",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_expressions_are_what_python_makes_of_them(text):
    expected = eval(text, vars(ks).copy())
    assert expressions.evaluated(text) == (expected() if isinstance(expected, type) else expected)


NOT_WRITTEN = [
    "", "0.1", "cosine", "Schedule()", "Linear(", "__import__('os')", "CosineDecay().preview(3)", "CosineDecay() + 1",
    "CosineDecay.__init__", "[CosineDecay()]", "CosineDecay(*[1])", "CosineDecay(**3)", "(0.5).repeat(2)",
    "[1].repeat(2)", "(lambda: 1)()", "CosineDecay(final=open('x'))", "CosineDecay() >> 3",
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_WRITTEN)
def test_nothing_else_is_evaluated(text):
    with pytest.raises(ValueError, match="`schedule` must be"):
        expressions.evaluated(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["trajectories", "--optimizers", "adm", "-o", "x.gif"], "`optimizers` must be of 'sgd', "),
        (["trajectories", "-o", "x.mp4"], "`save` must be a path"),
        (["trajectories"], "required: -o/--output"),
        (["schedule", "CosineDecay(final=2)"], "`final` must be a number in [0, 1]"),
        (["schedule", "StepDecay(0.5)"], "StepDecay(every_epochs=10) counts epochs: give `steps_per_epoch`, too"),
        (["schedule", "StepDecay(0.5, every=3)"], "unexpected keyword argument 'every'"),
        (["history", "nowhere.csv", "-o", "x.png"], "nowhere.csv"),
        ([], "required: COMMAND"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(wrong, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kopt.plot", "--help"], capture_output=True, text=True, check=True)
    for word in ("trajectories", "schedule", "history", "examples:"):
        assert word in done.stdout
