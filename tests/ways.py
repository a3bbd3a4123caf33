"""What the tests of the ways to run a rule share: variables of many sizes, and the plain way to compare with."""

import keras
import numpy as np

from kopt.optimizers import execution, lists, slabs
from tests.training import numpy

SHAPES = {"large": (130, 131), "a": (2, 3), "b": (5,), "larger": (65, 262), "c": ()}  # large: more than slabs.SMALL


def variables():
    rng = np.random.default_rng(0)
    return [keras.Variable(rng.normal(size=shape).astype("float32"), name=name) for name, shape in SHAPES.items()]


def stream(steps=20, spoilt=False):
    rng = np.random.default_rng(1)
    gradients = [[rng.normal(size=shape).astype("float32") for shape in SHAPES.values()] for _ in range(steps)]
    if spoilt:
        gradients[3][0][1, 1] = np.nan
        gradients[7][1][0, 0] = np.inf
    return gradients


def spied(monkeypatch):
    """The names of the ways that are taken."""
    taken, ways, step = set(), execution._way, lists.Group.update

    def way(*arguments):
        chosen, key = ways(*arguments)
        taken.add(chosen.__name__)
        return chosen, key

    monkeypatch.setattr(execution, "_way", way)
    monkeypatch.setattr(lists.Group, "update", lambda *arguments: (taken.add("lists"), step(*arguments)))
    return taken


def plainly(monkeypatch):
    """From here on every variable has slots of its own and is updated in the plain way."""
    monkeypatch.setattr(execution, "_way", lambda *_: (execution.plain, None))
    monkeypatch.setattr(
        lists, "update", lambda _, variables, gradients, shared: list(zip(variables, gradients, strict=True))
    )
    monkeypatch.setattr(slabs, "layout", lambda *_: [])


def close(ours, theirs, tolerance=2e-6):
    """A few units in the last place, after 20 steps of which each may differ by one."""
    for a, b in zip(numpy(ours), numpy(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 0.5)
