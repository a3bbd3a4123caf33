"""Every rule against NumPy from the paper and against a library that we did not write, in both precisions."""

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
from hypothesis import example, given
from keras import ops

import kopt
from tests import oracles
from tests.catalog import OPTIMIZERS
from tests.conftest import FLOATX

every_row = pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
TOLERANCE = 1e-11 if FLOATX == "float64" else 2e-5
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


@every_row
@pytest.mark.parametrize("decay", [{}, {"l2": 0.05}, {"weight_decay": 0.05}], ids=["plain", "l2", "weight_decay"])
def test_equals_the_paper(row, decay):
    # Where l2 is all the gradient there is, an adaptive rule carries the weight through zero again and again, and each
    # pass multiplies the rounding error whoever computes it: under l2 every weight gets noise.
    stream = gradients(even="l2" in decay)
    start = START.astype(FLOATX).astype("float64")
    changes = oracles.run(row.oracle, start, stream, **row.hypers(**decay))
    paper, moved = start + np.cumsum(changes, 0), np.cumsum(np.abs(changes), 0)
    ulp = 2 * np.spacing(np.maximum.accumulate(np.abs(paper), 0).astype(FLOATX)).astype("float64")
    for i, ours in enumerate(trained(row.make(**decay), stream)):  # each weight by itself: its way, and 2 ulp a step
        assert (np.abs(ours - paper[i]) <= TOLERANCE * moved[i] + np.cumsum(ulp, 0)[i]).all()


def pure(row, stream, dtype):
    """The rule by itself, on plain tensors, as a user would call it."""
    optimizer = row.make()
    optimizer.build([])
    rule, state = optimizer.rule, [np.full(8, s.initial, dtype) for s in optimizer.slots]
    arguments = optimizer.rule_arguments(optimizer.arguments())
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


@every_row
@given(stream=STREAMS)
@example(stream=gradients().tolist())
@example(stream=np.ones((50, 8)).tolist())
def test_rule_alone_on_hard_gradients(row, stream):
    stream = np.array(stream, FLOATX)
    changes = oracles.run(row.oracle, np.zeros(8), stream, **row.hypers(weight_decay=0.0))
    largest = np.maximum.accumulate(np.abs(changes), 0)  # of each weight by itself, up to this step
    for i, ours in enumerate(pure(row, stream, FLOATX)):
        assert (np.abs(ours + changes[i]) <= TOLERANCE * largest[i] + TINY).all()
        assert ours.dtype == FLOATX


def test_nesterov_looks_ahead():
    """Sutskever's method asks for the gradient at x + m v; one stored point must walk where that point walks."""
    curvature, a, m = np.array([1.0, 20.0]), 0.01, 0.9
    for form in ("velocity", "gradient", "average"):
        x, v, w = np.ones(2), np.zeros(2), keras.Variable(np.ones(2), dtype=FLOATX)
        optimizer = kopt.SGD(a, momentum=m, nesterov=True, form=form)
        for _ in range(50):
            rate, share = (a, 1 - m) if form == "average" else (a, 1.0)
            step = 1.0 if form == "velocity" else -rate  # what one unit of v moves x by
            g = curvature * (x + step * m * v)
            optimizer.apply([ops.convert_to_tensor(curvature, FLOATX) * w], [w])
            v = m * v + (-rate * g if form == "velocity" else share * g)
            x = x + step * v
            np.testing.assert_allclose(ops.convert_to_numpy(w), x + step * m * v, rtol=1e-4, atol=1e-6)


double = pytest.mark.skipif(FLOATX != "float64", reason="compared in float64, where a difference of form would show")


@double
@every_row
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_equals_torch(row, l2):
    torch = pytest.importorskip("torch", reason="torch is installed for `make test-torch` only")
    if row.torch is None:
        pytest.skip(row.differs)
    if l2 and "weight_decay" in row.arguments:
        pytest.skip("torch's AdamW has no coupled decay")
    w = torch.tensor(START, requires_grad=True)
    theirs = row.torch(torch.optim, [w], **({"weight_decay": l2} if l2 else {}))
    stream = gradients(even=bool(l2))
    ours = trained(row.make(l2=l2), stream)
    for mine, g in zip(ours, stream, strict=True):
        w.grad = torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(mine, w.detach().numpy(), rtol=1e-10, atol=1e-13)


@double
@every_row
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
        np.testing.assert_allclose(mine, w, rtol=1e-10, atol=1e-13)


CARRIED_OVER = [  # the table in recipes/update_rules.md: torch's defaults, and kopt's spelling of them
    (lambda optim, p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True), lambda: kopt.SGD(0.1, 0.9, True, "gradient")),
    (lambda optim, p: optim.SGD(p, 0.1, weight_decay=0.1), lambda: kopt.SGD(0.1, l2=0.1)),
    (lambda optim, p: optim.Adam(p), lambda: kopt.Adam(epsilon=1e-8)),
    (lambda optim, p: optim.Adam(p, weight_decay=0.1), lambda: kopt.Adam(epsilon=1e-8, l2=0.1)),
    (lambda optim, p: optim.AdamW(p), lambda: kopt.AdamW(epsilon=1e-8)),
    (lambda optim, p: optim.RMSprop(p), lambda: kopt.RMSprop(0.01, rho=0.99, epsilon=1e-8)),
    (lambda optim, p: optim.Adagrad(p), lambda: kopt.Adagrad(epsilon=1e-10)),
]


@double
@pytest.mark.parametrize(("there", "here"), CARRIED_OVER, ids=range(len(CARRIED_OVER)))
def test_settings_of_torch_carry_over(there, here):
    torch = pytest.importorskip("torch", reason="torch is installed for `make test-torch` only")
    w = torch.tensor(START, requires_grad=True)
    theirs, stream = there(torch.optim, [w]), gradients(even=True)
    for mine, g in zip(trained(here(), stream), stream, strict=True):
        w.grad = torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(mine, w.detach().numpy(), rtol=1e-10, atol=1e-13)
