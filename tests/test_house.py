"""The house keeps its order: imports point downward, everything public has a row, a page and an example."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest

import kopt
from tests.catalog import OPTIMIZERS, PUBLIC
from tests.conftest import BACKEND

ROOT = Path(kopt.__file__).parent
TABLE = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT.parent / "CONTRIBUTING.md").read_text(), re.MULTILINE)
ROOMS = {  # room -> its row in the table: `optimizers/rule.py` is the room optimizers.rule, `callbacks/` is callbacks
    name.removesuffix(".py").strip("/").replace("/", "."): row
    for row, (_, names) in enumerate(TABLE)
    for name in re.findall(r"`(.+?)`", names)
}


def room(module: str) -> str:
    """The room that a module is in, the innermost where rooms are nested."""
    found = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    assert found, f"{module} has no row in the table of CONTRIBUTING.md"
    return max(found, key=len)


def modules():
    for file in sorted(ROOT.rglob("*.py")):
        yield file, ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_imports_point_downward():
    assert [level for level, _ in TABLE] == sorted(level for level, _ in TABLE)
    for file, module in modules():
        own = room(module)
        for source, name in imported(file):
            if source.split(".")[0] != "kopt":
                continue
            parts = [*source.split(".")[1:], name]
            path = ROOT / Path(*parts)
            if not path.with_suffix(".py").exists() and not (path / "__init__.py").exists():
                parts = parts[:-1]
            target = ".".join(parts) or "__init__"
            below = ROOMS[room(target)] < ROOMS[own]
            assert below or room(target) == own, f"{module} imports {target}, which is no lower"


def test_one_room_reaches_into_keras_and_few_name_backends():
    for file, module in modules():
        private = [source for source, _ in imported(file) if ".src" in source or source.startswith("tensorflow.python")]
        of_tuner = any(source.startswith("keras_tuner") for source in private)
        rooms = ("tuner.engine", "tuner.mends") if of_tuner else "_keras"
        assert not private or module.startswith(rooms), f"{module} imports {private}"
        if not module.startswith("_keras"):
            used = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
            theirs = {name for name in used if name.startswith("_") and not name.startswith("__")} & PRIVATE
            assert not theirs, f"{module} uses Keras's {theirs}"
        if module not in (
            "backends",
            "derivatives",
            "_keras.passes",
            "optimizers.kernels",
            "optimizers.lists",
            "optimizers.program",
        ):
            named = {source for source, _ in imported(file)} & {"tensorflow", "torch", "jax"}
            assert not named, f"{module} names {named}"


PRIVATE = {*dir(keras.optimizers.Optimizer(0.1)), *dir(keras.Variable(0.0))} - {"_held"}


def test_every_optimizer_has_a_row():
    optimizers = {c for c in PUBLIC.values() if isinstance(c, type) and issubclass(c, kopt.Optimizer)}
    assert optimizers - {kopt.Optimizer} == {row.cls for row in OPTIMIZERS}


def test_every_row_has_an_outside_reference_or_says_why_not():
    for row in OPTIMIZERS:
        assert row.torch or row.optax, f"{row.name} is compared with the oracle only"
        assert (row.torch and row.optax) or row.differs, f"{row.name} does not say why one of the two is missing"


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name):
    value = PUBLIC[name]
    doc = inspect.getdoc(value)
    assert doc, name
    if isinstance(value, type) and issubclass(value, (kopt.Optimizer, kopt.QuasiNewton)):
        own = [p for p in inspect.signature(value.__init__).parameters if p not in ("self", "common", "arguments")]
        for argument in own:
            assert f"    {argument}: " in doc, f"{name} does not document `{argument}`"
        if value not in (kopt.Optimizer, kopt.QuasiNewton):
            for part in ("When to use it:", "Args:", "Example:", "Reference:", "Differs from"):
                assert part in doc, f"{name} has no part {part!r}"
    elif value.__module__ != "kopt.optimizers.rule":
        for argument in inspect.signature(value).parameters:
            assert f"    {argument}: " in doc or f"    **{argument}: " in doc, f"{name} does not document `{argument}`"
        assert "Example:" in doc, f"{name} has no example"


def test_every_common_argument_is_documented_and_typed():
    base = importlib.import_module("kopt.optimizers.base")
    accepted = {"name", *kopt.Optimizer.declared()}
    assert accepted == base.Common.__annotations__.keys()
    for argument in accepted:
        assert f"    {argument}: " in inspect.getdoc(kopt.Optimizer)


def test_import_is_light():
    code = "import sys, keras; before = set(sys.modules); import kopt; print(*sys.modules.keys() - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {module.split(".")[0] for module in done.stdout.split()}
    assert "kopt" in added
    assert not added & {"keras_tuner", "matplotlib", "sklearn", "tensorflow", "torch", "jax"}


def test_import_works_without_tensorflow():
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow is the backend here; the other two processes run this")
    code = "import sys; sys.modules['tensorflow'] = None; import kopt; print(kopt.Adam(0.1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == "Adam(learning_rate=0.1)", done.stderr


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "kopt/__init__.py"
    assert f"## {kopt.__version__}" in (ROOT.parent / "CHANGELOG.md").read_text()
