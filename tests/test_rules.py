"""Every rule against NumPy from the paper and against a library that we did not write, in both precisions."""

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from hypothesis import given
from keras import ops

import kopt
from tests import oracles
from tests.catalog import OPTIMIZERS
from tests.conftest import FLOATX

pytestmark = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
TINY = 1e-30  # below it, float32 gradients may be flushed to zero


def gradients(steps=200, even=False):
    """Noise over many magnitudes, a column of zeros, one that changes sign, one that stops; or `even` noise."""
    g = np.random.default_rng(0).normal(size=(steps, 8))
    if not even:
        g *= np.array([1, 1, 1e3, 1e-3, 1e-6, 0, 1, 1])
        g[:, 6] = (-1.0) ** np.arange(steps)
        g[steps // 2 :, 7] = 0.0
    return g.astype(FLOATX)


START = np.linspace(-1, 1, 8)


def trained(optimizer, stream):
    variable = keras.Variable(START, dtype=FLOATX)
    path = []
    for g in stream:
        optimizer.apply([ops.convert_to_tensor(g)], [variable])
        path.append(variable.numpy().astype("float64"))
    return path


@pytest.mark.parametrize("decay", [{}, {"l2": 0.05}, {"weight_decay": 0.05}], ids=["plain", "l2", "weight_decay"])
def test_equals_the_paper(row, decay):
    # Where l2 is all the gradient there is, an adaptive rule carries the weight through zero again and again, and each
    # pass multiplies the rounding error whoever computes it: under l2 every weight gets noise.
    stream = gradients(even="l2" in decay)
    start = START.astype(FLOATX).astype("float64")
    changes = oracles.run(row.oracle, start, stream, **row.hypers(**decay))
    paper = start + np.cumsum(changes, 0)
    for steps, (ours, theirs) in enumerate(zip(trained(row.make(**decay), stream), paper, strict=True), 1):
        if FLOATX == "float64":
            assert np.abs(ours - theirs).max() <= 1e-11 * np.abs(theirs).max()
        else:  # of each step: 2e-5 of its largest entry, and two units in the last place of the weights
            ulp = np.spacing(np.abs([ours, theirs]).max().astype("float32"))
            allowed = 2e-5 * np.abs(changes[:steps]).max(1).sum() + 2 * steps * ulp
            assert np.abs(ours - theirs).max() <= allowed


def pure(row, stream, dtype):
    """The rule by itself, on plain tensors, as a user would call it."""
    optimizer = row.make()
    optimizer.build([])
    rule, state = optimizer.rule, [np.full(8, s.initial, dtype) for s in optimizer.slots]
    arguments = {name: getattr(optimizer, name) for name in optimizer._reads}
    w = np.zeros(8, dtype)
    for t, g in enumerate(stream, start=1):
        tensors = [ops.convert_to_tensor(x, dtype=dtype) for x in (g, w, *state)]
        step, *state = map(ops.convert_to_numpy, rule(*tensors, at=kopt.At(t=t, learning_rate=row.rate), **arguments))
        yield step


def size(exponent):
    return st.sampled_from([0.0, 1.0, -1.0, 1e-3, 10.0**exponent, -(10.0**exponent), 10.0**-exponent, 1e-40])


STREAMS = st.lists(
    st.lists(size(30 if FLOATX == "float64" else 18) | st.floats(-10, 10, width=32), min_size=8, max_size=8),
    min_size=1,
    max_size=6,
)


@given(stream=STREAMS)
def test_rule_alone_on_hard_gradients(row, stream):
    stream = np.array(stream, FLOATX)
    changes = oracles.run(row.oracle, np.zeros(8), stream, **row.hypers(weight_decay=0.0))
    tolerance = 1e-11 if FLOATX == "float64" else 2e-5
    for ours, theirs in zip(pure(row, stream, FLOATX), changes, strict=True):
        assert np.abs(ours + theirs).max() <= tolerance * np.abs(theirs).max() + TINY
        assert ours.dtype == FLOATX


@pytest.mark.skipif(FLOATX != "float64", reason="compared in float64, where a difference of form would show")
def test_equals_torch(row):
    torch = pytest.importorskip("torch", reason="torch is installed for `make test-torch` only")
    if row.torch is None:
        pytest.skip(row.differs)
    w = torch.tensor(START, requires_grad=True)
    theirs = row.torch(torch.optim, [w])
    stream = gradients()
    ours = trained(row.make(), stream)
    for mine, g in zip(ours, stream, strict=True):
        w.grad = torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(mine, w.detach().numpy(), rtol=1e-10)


@pytest.mark.skipif(FLOATX != "float64", reason="compared in float64, where a difference of form would show")
def test_equals_optax(row):
    optax = pytest.importorskip("optax", reason="optax is installed for `make test-jax` only")
    if row.optax is None:
        pytest.skip(row.differs)
    theirs, w = row.optax(optax), np.asarray(START)
    state = theirs.init(w)
    stream = gradients()
    for mine, g in zip(trained(row.make(), stream), stream, strict=True):
        updates, state = theirs.update(g, state, w)
        w = np.asarray(optax.apply_updates(w, updates))
        np.testing.assert_allclose(mine, w, rtol=1e-10)
