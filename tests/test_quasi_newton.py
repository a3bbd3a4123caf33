"""The quasi-Newton methods by themselves: their search and what they remember, in every way that a step can run."""

import numpy as np
import pytest
from keras import ops

import kopt
from kopt.optimizers.quasi_newton import machine, search
from kopt.optimizers.quasi_newton.dense import Inverse, bfgs, ssbfgs, ssbroyden
from kopt.optimizers.quasi_newton.lbfgs import Recursion, times
from kopt.optimizers.quasi_newton.space import Traced, Values, space_of
from kopt.solve.functions import compiled_chunks
from tests.conftest import BACKEND, FLOATX
from tests.problems import PROBLEMS
from tests.profiles import function

METHODS = {"lbfgs": Recursion(5), "bfgs": Inverse(bfgs), "ssbfgs": Inverse(ssbfgs), "ssbroyden": Inverse(ssbroyden)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
NO_TOLERANCES = search.Rules(gtol=0, ftol=0)
START = np.array([-1.2, 1.0, -0.5, 0.8])


def rosenbrock(x):
    """The chained function of Rosenbrock, and its gradient."""
    a, b = x[1:] - x[:-1] ** 2, 1 - x[:-1]
    gradient = np.zeros_like(x)
    gradient[:-1], gradient[1:] = -400 * a * x[:-1] - 2 * b, gradient[1:] + 200 * a
    gradient[:-1] += np.append(0, 200 * a)[:-1] * (np.arange(len(x) - 1) > 0)
    return np.sum(100 * a**2 + b**2), gradient


def rosenbrock_tensors(x):
    a, b, zero = x[1:] - x[:-1] ** 2, 1 - x[:-1], ops.zeros_like(x[:1])
    gradient = ops.concatenate([-400 * a * x[:-1] - 2 * b, zero]) + ops.concatenate([zero, 200 * a])
    return ops.sum(100 * a**2 + b**2), gradient


def test_the_gradient_of_the_tests():
    x, near = START.copy(), 1e-6
    slopes = [(rosenbrock(x + near * e)[0] - rosenbrock(x - near * e)[0]) / (2 * near) for e in np.eye(4)]
    exact = ops.convert_to_numpy(rosenbrock_tensors(ops.convert_to_tensor(x, FLOATX))[1])
    np.testing.assert_allclose(exact, slopes, rtol=1e-4)


def both(x):
    value, gradient = rosenbrock_tensors(ops.convert_to_tensor(x, FLOATX))
    return float(value), np.array(ops.convert_to_numpy(gradient))


def path(method, rules=NO_TOLERANCES, function=both, start=START, most=200):
    """The states of a minimisation, one after each evaluation, with what was evaluated."""
    start = np.array(start, FLOATX)
    m = Values(start)
    state = machine.begun(method, start, m)
    with np.errstate(all="ignore"):
        while state.search.status == search.RUNNING and state.search.evaluations < most:
            value, gradient = function(state.trial)
            loss = float(value)
            before, state = state, machine.advanced(state, state.trial, loss, gradient, method, rules, m)
            yield before, loss, gradient, state


@pytest.mark.parametrize("problem", [None, *PROBLEMS[:18:3]], ids=lambda problem: getattr(problem, "name", "chained"))
@every_method
def test_each_accepted_step_meets_the_conditions(method, problem):
    steps, given = 0, {"function": function(problem, FLOATX), "start": problem.start} if problem else {}
    for before, loss, gradient, after in path(method, most=60, **given):
        s = before.search
        if s.phase != search.SEARCHING or after.search.iterations == s.iterations:
            continue
        steps += 1
        slope = float(gradient @ before.direction)
        wolfe = loss - s.loss <= 1e-4 * s.step * s.slope
        slack = search.SLACK * np.finfo(FLOATX).eps * abs(s.loss)
        nearly = slope <= (2 * search.DELTA - 1) * s.slope and loss - s.loss <= slack
        assert wolfe or nearly
        assert abs(slope) <= 0.9 * abs(s.slope)
        np.testing.assert_allclose(after.point, before.trial)
    assert steps > (2 if problem else 20)


def dense(pairs):
    """The inverse Hessian of L-BFGS as a matrix: Nocedal and Wright, (6.17), from the oldest pair on."""
    s, y = pairs[-1]
    h = np.eye(len(s)) * (s @ y) / (y @ y)
    for s, y in pairs:
        left = np.eye(len(s)) - np.outer(s, y) / (s @ y)
        h = left @ h @ left.T + np.outer(s, s) / (s @ y)
    return h


@pytest.mark.parametrize("known", range(1, 8))
def test_two_loops_are_the_dense_inverse(known):
    random = np.random.default_rng(known)
    curved = random.normal(size=(6, 6))
    curved = curved @ curved.T + np.eye(6)
    method, like = Recursion(5), np.zeros(6)
    m = Values(like)
    memory, s, pairs = method.empty(like, m), search.Search(), []
    for _ in range(known):
        step = random.normal(size=6)
        memory, learnt = method.learnt(memory, s, step, curved @ step, True, m)
        assert learnt
        s, pairs = s._replace(pairs=s.pairs + 1), [*pairs, (step, curved @ step)]
    g = random.normal(size=6)
    np.testing.assert_allclose(times(memory, s.pairs, g, 5, m), dense(pairs[-5:]) @ g, rtol=1e-10)


def test_bfgs_keeps_the_secant_equation_and_stays_positive():
    for scaling in (bfgs, ssbfgs, ssbroyden):
        kept = None
        for before, _, gradient, after in path(Inverse(scaling), most=25):
            if after.search.pairs > before.search.pairs and FLOATX == "float64":
                (kept,) = after.memory
                s, y = after.point - before.point, gradient - before.gradient
                np.testing.assert_allclose(kept @ y, s, rtol=1e-6, atol=1e-9)
                assert np.linalg.eigvalsh(kept).min() > 0
        assert kept is not None or FLOATX == "float32"


def test_bfgs_equals_scipys_formula():
    random = np.random.default_rng(0)
    s, y = random.normal(size=(2, 4))
    y = y if s @ y > 0 else -y
    h = np.eye(4) * (s @ y) / (y @ y)
    left = np.eye(4) - np.outer(s, y) / (s @ y)
    m = Values(s)
    (ours,), _ = Inverse(bfgs).learnt(Inverse(bfgs).empty(s, m), search.Search(), s, y, True, m)
    np.testing.assert_allclose(ours, left @ h @ left.T + np.outer(s, s) / (s @ y), rtol=1e-12)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing: its tensors have values")
@every_method
def test_a_traced_step_is_the_eager_one(method):
    start = ops.convert_to_tensor(START, FLOATX)
    rules, done = search.Rules(gtol=0, ftol=0), {}

    def evaluated(state, data, m):
        assert isinstance(m, Traced)
        loss, gradient = rosenbrock_tensors(state.trial)
        return machine.advanced(state, state.trial, loss, gradient, method, rules, m)

    compiled = compiled_chunks(evaluated, start.dtype)
    state = machine.begun(method, start, space_of(start))
    eager = list(path(method, most=12))
    for count in (1, 2, 5, 12):
        state = compiled(state, count)
        done[count] = ops.convert_to_numpy(state.point)
        last = eager[count - 1][3]
        np.testing.assert_allclose(done[count], last.point, rtol=1e-3 if FLOATX == "float32" else 1e-8)
        assert int(state.search.evaluations) == count
        assert int(state.search.iterations) == last.search.iterations


@every_method
def test_no_loss_only_gradients(method):
    rules = search.Rules(line_search="gradient", gtol=1e-4, ftol=0, is_blind=True)
    states = [state for *_, state in path(method, rules, lambda x: (0.0, both(x)[1]), most=300)]
    assert states[-1].search.status == search.GRADIENT
    assert both(states[-1].point)[0] < 1e-5


def test_a_point_that_is_not_finite_is_backed_off_from():
    def barrier(x):
        with np.errstate(all="ignore"):
            return float(x[0] - np.log(x[0])), np.array([1 - 1 / x[0]], x.dtype) if x[0] > 0 else np.array([np.nan])

    for start in (1e-3, 0.5, 30.0):
        found = kopt.minimize_fn(barrier, np.array([start], FLOATX))
        assert abs(found.x[0] - 1) < 1e-3
        assert np.isfinite(found.fun)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_first_step_finds_its_scale(scale):
    def parabola(x):
        return float(scale * np.sum((x - 3) ** 2)), scale * 2 * (x - 3)

    found = kopt.minimize_fn(parabola, np.zeros(3, FLOATX), gtol=1e-5 * scale)
    assert found.nfev <= 15
    np.testing.assert_allclose(found.x, 3, atol=1e-3)


def test_what_was_learnt_wrongly_is_forgotten():
    """A memory that points uphill, or nowhere: the search goes along the gradient."""
    method, m = Recursion(3), Values(np.zeros(4, FLOATX))
    *_, state = next(path(method, most=1))
    pair = state.gradient / np.linalg.norm(state.gradient)
    for product in (-1.0, 0.0, np.nan):
        poisoned = np.tile(pair, (3, 1)), np.tile(pair, (3, 1)), np.full(3, product, FLOATX)
        poisoned = state._replace(memory=poisoned, search=state.search._replace(pairs=3))
        with np.errstate(all="ignore"):
            assert not float(state.gradient @ method.direction(poisoned, m)) < 0
            aimed = machine.aimed(poisoned, True, method, m)
        assert (aimed.search.pairs, aimed.search.restarts) == (0, 1)
        np.testing.assert_allclose(aimed.direction, -pair, rtol=1e-6)


@every_method
def test_a_step_along_which_the_loss_is_concave_teaches_nothing(method):
    step = np.array([1.0, 2.0], FLOATX)
    m = Values(step)
    for turn in (-step, np.array([2.0, -1.0], FLOATX), 0 * step):
        memory, learnt = method.learnt(method.empty(step, m), search.Search(), step, turn, True, m)
        assert not learnt
        assert all((part == 0).all() for part in memory)


def test_a_flat_loss_does_not_end_the_search_in_float32():
    """Logistic regression, ill-scaled: to a gradient of 1e-4, where the loss itself does not change any more."""
    random = np.random.default_rng(0)
    x = (random.normal(size=(400, 20)) * np.logspace(-1, 1, 20)).astype("float32")
    y = np.sign(x @ random.normal(size=20) / 5 + random.logistic(size=400)).astype("float32")

    def loss(w):
        margin = y * (x @ w)
        share = -y / (1 + np.exp(margin))
        return np.mean(np.logaddexp(0, -margin)) + np.float32(5e-5) * (w @ w), x.T @ share / 400 + np.float32(1e-4) * w

    found = kopt.minimize_fn(loss, np.zeros(20, "float32"), gtol=1e-4, ftol=0, max_evals=2000)
    assert found.status == "gradient", found


@pytest.mark.parametrize("tolerance", ["gtol", "ftol"])
def test_a_tolerance_of_zero_switches_it_off(tolerance):
    options = {"gtol": 0, "ftol": 0} | {tolerance: {"gtol": 1e-3, "ftol": 0.9}[tolerance]}
    found = kopt.minimize_fn(both, np.array(START, FLOATX), max_evals=300, **options)
    assert found.status == {"gtol": "gradient", "ftol": "loss"}[tolerance]
    found = kopt.minimize_fn(both, np.array(START, FLOATX), max_evals=300, gtol=0, ftol=0)
    assert found.status in ("running", "stuck", "gradient")  # the gradient may be exactly zero


def network(w):
    """The mean squared error of a network of eight hidden units on a sine, and its gradient."""
    x = np.linspace(-1, 1, 40, dtype=w.dtype)[:, None]
    hidden = np.tanh(x * w[:8] + w[8:16])
    error = hidden @ w[16:24] + w[24] - np.sin(3 * x[:, 0])
    back = (1 - hidden**2) * w[16:24] * error[:, None] / 20
    gradient = np.concatenate([(back * x).sum(0), back.sum(0), hidden.T @ error / 20, [error.sum() / 20]])
    return np.mean(error**2), gradient.astype(w.dtype)


def test_a_network_is_as_good_as_by_scipy_at_equal_evaluations():
    """In the geometric mean over 200 starts: one alone is luck, to a factor of ten either way."""
    minimize = pytest.importorskip("scipy.optimize", reason="scipy comes with scikit-learn").minimize
    evaluations, ratios = 60, []
    options = {"maxfun": evaluations, "maxiter": evaluations, "ftol": 0, "gtol": 0}
    for seed in range(200):
        start, losses = (np.random.default_rng(seed).normal(size=25) / 2).astype(FLOATX), []

        def noted(w, losses=losses):
            value, gradient = network(w.astype(FLOATX))
            losses.append(float(value))
            return losses[-1], gradient.astype("float64")

        minimize(noted, start.astype("float64"), jac=True, method="L-BFGS-B", options=options)
        ours = kopt.minimize_fn(network, start, max_evals=evaluations, gtol=0, ftol=0)
        ratios.append(np.log(ours.fun / min(losses[:evaluations])))
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert np.mean(ratios) < 2 * error, np.exp([np.mean(ratios), error])


def test_logistic_regression_to_the_optimum_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is an extra")
    if FLOATX == "float32":
        pytest.skip("the optimum to 1e-6 needs float64")
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 8)) * np.logspace(-1, 1, 8)
    y = (x @ random.normal(size=8) / 5 + random.logistic(size=300) > 0) * 2.0 - 1
    reference = linear_model.LogisticRegression(C=1.0, fit_intercept=False, tol=1e-12, max_iter=10000).fit(x, y)

    def loss(w):
        margin = y * (x @ w)
        share = -y / (1 + np.exp(margin))
        return np.sum(np.logaddexp(0, -margin)) + w @ w / 2, x.T @ share + w

    for method in METHODS:
        found = kopt.minimize_fn(loss, np.zeros(8), method, gtol=1e-9, ftol=0)
        np.testing.assert_allclose(found.x, reference.coef_[0], rtol=1e-6, atol=1e-6)
