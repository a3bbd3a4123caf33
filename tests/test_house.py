"""The house keeps its order: imports point downward, everything public has a row, a page and an example."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kopt
from tests.catalog import OPTIMIZERS

ROOT = Path(kopt.__file__).parent
LEVELS = [  # a room imports from lower levels, and from its own package; CONTRIBUTING.md says what lives where
    ["checks", "store", "_keras"],
    ["numerics"],
    ["schedules"],
    ["optimizers.rule"],
    ["optimizers.groups", "optimizers.gradients", "optimizers.state"],
    ["optimizers.execution"],
    ["optimizers.base"],
    ["optimizers", "ensemble", "layers", "curvature"],
    ["callbacks"],
    ["minimize", "finder", "fine_tune"],
    ["plot"],
    ["tuner"],
    ["kopt"],
]


def room(module: str) -> tuple[int, str]:
    """The level of a module and the room that it is in."""
    found = [(len(name), level, name) for level, names in enumerate(LEVELS) for name in names
             if module == name or module.startswith(f"{name}.")]  # fmt: skip
    assert found, f"{module} has no place in LEVELS"
    _, level, name = max(found)
    return level, name


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
    for file, module in modules():
        level, own = room("kopt" if module == "__init__" else module)
        for source, name in imported(file):
            if not source.startswith("kopt"):
                continue
            target = source.removeprefix("kopt").removeprefix(".")
            if (ROOT / target.replace(".", "/") / f"{name}.py").exists():
                target = f"{target}.{name}".removeprefix(".")
            below, other = room(target)
            assert below < level or own == other, f"{module} (level {level}) imports {target} (level {below})"


def test_only_one_file_reaches_into_keras():
    for file, module in modules():
        private = [source for source, _ in imported(file) if ".src" in source or source.startswith("tensorflow.python")]
        assert not private, f"{module} imports {private}"
        if module != "_keras":
            assert not [s for s, _ in imported(file) if s in ("tensorflow", "torch", "jax")], (
                f"{module} names a backend"
            )


def public():
    return {
        name: value for name, value in vars(kopt).items() if not name.startswith("_") and not inspect.ismodule(value)
    }


def test_every_optimizer_has_a_row():
    optimizers = {c for c in public().values() if isinstance(c, type) and issubclass(c, kopt.Optimizer)}
    assert optimizers - {kopt.Optimizer} == {row.cls for row in OPTIMIZERS}


def test_every_row_has_an_outside_reference_or_says_why_not():
    for row in OPTIMIZERS:
        assert (row.torch and row.optax) or row.differs, row.name


@pytest.mark.parametrize("name", public())
def test_everything_public_is_documented(name):
    value = public()[name]
    doc = inspect.getdoc(value)
    assert doc, name
    if isinstance(value, type) and issubclass(value, kopt.Optimizer):
        own = [p for p in inspect.signature(value.__init__).parameters if p not in ("self", "common", "arguments")]
        for argument in own:
            assert f"    {argument}: " in doc, f"{name} does not document `{argument}`"
        if value is not kopt.Optimizer:
            for part in ("When to use it:", "Args:", "Example:", "Reference:", "Differs from"):
                assert part in doc, f"{name} has no part {part!r}"


def test_every_common_argument_is_documented_and_typed():
    base = importlib.import_module("kopt.optimizers.base")
    accepted = {*base._KERAS, *kopt.Optimizer.declared()}
    assert accepted == base.Common.__annotations__.keys()
    for argument in accepted:
        assert f"    {argument}: " in inspect.getdoc(kopt.Optimizer)


def test_import_is_light():
    code = "import sys, keras; before = set(sys.modules); import kopt; print(*sys.modules.keys() - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {module.split(".")[0] for module in done.stdout.split()}
    assert "kopt" in added
    assert not added & {"keras_tuner", "matplotlib", "sklearn", "tensorflow", "torch", "jax"}


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "kopt/__init__.py"
    assert f"## {kopt.__version__}" in (ROOT.parent / "CHANGELOG.md").read_text()
