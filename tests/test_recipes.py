"""The recipes run, learn, and write what they say."""

import importlib.util
import json
from pathlib import Path

import pytest

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
    with pytest.raises(SystemExit):
        recipe("quickstart").main(["--seeds", "0"])
