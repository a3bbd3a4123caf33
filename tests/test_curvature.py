"""How a loss bends, beside dense Hessians, formulas and SciPy."""

import keras
import numpy as np
import pytest
from keras import ops

from kopt import backends
from kopt.curvature import Run, _lanczos, curvature
from kopt.objective import Objective
from tests.conftest import BACKEND, FLOATX

IS_WIDE = FLOATX == "float64" and BACKEND == "tensorflow"  # some of Keras's operators round to float32 on the others
EPS = float(np.finfo("float64" if IS_WIDE else "float32").eps)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 4)).astype(FLOATX), RNG.normal(size=(40, 2)).astype(FLOATX)
ONE = np.ones((1, 1), FLOATX)


class Given(keras.Model):
    """The loss `w'Aw / 2 + b'w`, from a matrix or the diagonal of one."""

    def __init__(self, matrix, slope=0.0):
        super().__init__()
        self.matrix, self.slope = np.asarray(matrix, FLOATX), slope
        self.w = self.add_weight(shape=self.matrix.shape[:1], initializer="ones")
        self.built = True

    def call(self, x):
        return x

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        pairs = ops.square(self.w) if self.matrix.ndim == 1 else self.w[:, None] * self.w[None, :]
        return ops.sum(ops.convert_to_tensor(self.matrix) * pairs) / 2 + self.slope * ops.sum(self.w)


def given(matrix, eagerly=False, slope=0.0, **arguments):
    model = Given(matrix, slope)
    model.compile("sgd", run_eagerly=eagerly)
    return curvature(model, ONE, verbose=0, **arguments)


def net(*layers, loss="mse", inputs=4):
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    model.compile("sgd", loss=loss)
    return model


def mlp(**dense):
    return net(keras.layers.Dense(6, "tanh", **dense), keras.layers.Dense(2, **dense))  # 44 weights


def dense_eigenvalues(model, *data):
    objective = Objective(model, training=False)
    matrix = backends.compiled(objective.hessian)(objective.vector(), objective.tensors(*data))
    return np.linalg.eigvalsh(ops.convert_to_numpy(matrix).astype("float64"))


def check(found, exact):
    """The extremes are within their errors, and the share within its own."""
    largest, smallest, room = exact[-1], exact[0], 10 * EPS * np.abs(exact).max()
    assert abs(found.largest - largest) <= found.largest_error + room
    assert abs(found.smallest - smallest) <= found.smallest_error + room
    share, room = (exact < -found.precision - room).mean(), 4 * found.negative_share_error + 1e-9
    low, high = found.negative_share_bounds
    assert low - room <= share <= high + room
    assert np.isclose(found.weights.sum(), 1)
    assert (np.diff(found.eigenvalues) >= 0).all()


@pytest.mark.parametrize("steps", [20, 64])
def test_a_network(steps):
    model = mlp()
    exact = dense_eigenvalues(model, X, Y)
    found = curvature(model, X, Y, steps=steps, verbose=0)
    check(found, exact)
    scale = np.abs(exact).max()
    assert found.converged
    assert max(found.largest_error, found.smallest_error) <= 1.1e-3 * scale
    assert (found.size, found.products) == (44, 200 if steps == 20 else 44)
    assert (found.negative_share_error == 0) == (steps == 64)
    assert found.condition == "indefinite"
    assert found.precision < 200 * EPS * scale
    if steps == 64:
        np.testing.assert_allclose(found.eigenvalues, exact, atol=found.precision + 10 * EPS * scale)
        assert found.negative_share_bounds == (found.negative_share,) * 2


def test_too_few_steps_say_so():
    model = mlp()
    exact = dense_eigenvalues(model, X, Y)
    found = curvature(model, X, Y, steps=4, verbose=0)
    assert not found.converged
    assert "not converged" in str(found)
    for value, error in ((found.largest, found.largest_error), (found.smallest, found.smallest_error)):
        assert np.abs(exact - value).min() <= error
        assert exact[0] - found.precision <= value <= exact[-1] + found.precision


def test_the_extremes_are_those_of_scipy():
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="SciPy comes with scikit-learn")
    matrix = np.random.default_rng(1).normal(size=(120, 120))
    matrix += matrix.T
    found = given(matrix, steps=60, probes=2)
    theirs = linalg.eigsh(matrix, k=2, which="BE", return_eigenvectors=False)
    np.testing.assert_allclose([found.smallest, found.largest], np.sort(theirs), atol=1e-3 * np.abs(theirs).max())
    check(found, np.linalg.eigvalsh(matrix))


@pytest.mark.parametrize("steps", [5, 64])
def test_linear_regression(steps):
    x = np.concatenate([X, X**2], axis=1)  # 8 weights
    found = curvature(net(keras.layers.Dense(1, use_bias=False), inputs=8), x, Y[:, :1], steps=steps, verbose=0)
    exact = np.linalg.eigvalsh(2 * x.T.astype("float64") @ x / 40)
    check(found, exact)
    assert found.negative_share == 0
    if steps == 64:
        assert np.isclose(found.condition, np.linalg.cond(x.astype("float64")) ** 2, rtol=1e4 * EPS)
        assert np.isclose(found.condition, found.largest / found.smallest)


def test_a_softmax_has_weights_too_many():
    model = net(keras.layers.Dense(3, use_bias=False), loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    labels = np.eye(3)[np.random.default_rng(0).integers(0, 3, 40)]
    logits = X.astype("float64") @ ops.convert_to_numpy(model.trainable_variables[0]).astype("float64")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    blocks = p[:, :, None] * (np.eye(3) - p[:, None, :])
    exact = np.linalg.eigvalsh(np.einsum("na,nb,nij->aibj", X, X, blocks).reshape(12, 12) / 40)
    for steps in (10, 12):  # 4 of the 12 eigenvalues are 0: from a direction, there are 9
        found = curvature(model, X, labels, steps=steps, verbose=0)
        check(found, exact)
        assert found.condition == "singular"
        assert found.negative_share == 0


def same(found, condition):
    """Whether a condition number is this number, or this word."""
    return found == (condition if isinstance(condition, str) else pytest.approx(condition, rel=1e-3))


@pytest.mark.parametrize(
    ("diagonal", "condition"),
    [
        ([2.0, 1.0, 0.5], 4.0),
        ([2.0, 1.0, -0.5], "indefinite"),
        ([2.0, 1.0, 0.0], "singular"),
        (np.append(np.repeat([1.0, 1.5, 2.0], 10), 0.1), 20.0),
        (np.append(np.repeat([1.0, 1.5, 2.0], 10), -1.0), "indefinite"),
        (np.append(np.repeat([1.0, 1.5, 2.0], 10), 0.0), "singular"),
        (np.linspace(1e-3, 2, 100), "unknown"),  # so few steps cannot tell its smallest from 0
    ],
)
def test_the_condition_number(diagonal, condition):
    found = given(diagonal, steps=12, probes=2)
    assert same(found.condition, condition)
    assert found.smallest_error < 2 * found.precision or condition == "unknown"


@pytest.mark.parametrize(
    ("diagonal", "steps", "products", "condition"),
    [
        ([3.0], 1, 1, 1.0),
        ([-3.0], 64, 1, "indefinite"),
        (np.full(30, 2.5), 8, 10, 1.0),  # the identity: one product for each probe
        (np.full(30, -2.5), 8, 10, "indefinite"),
        (np.repeat([-2.0, 0.0, 5.0], 10), 8, 30, "indefinite"),
        (np.zeros(30), 8, 10, "singular"),
        (np.zeros(3), 64, 3, "singular"),
    ],
)
def test_few_different_eigenvalues(diagonal, steps, products, condition):
    found = given(diagonal, steps=steps, slope=1.0)
    diagonal, room = np.asarray(diagonal), 20 * EPS * np.abs(diagonal).max()
    check(found, np.sort(diagonal))
    assert abs(found.largest - diagonal.max()) <= room
    assert abs(found.smallest - diagonal.min()) <= room
    assert found.products == products
    assert found.converged
    assert same(found.condition, condition)
    low, high = found.negative_share_bounds
    assert low == high
    if diagonal.min() == diagonal.max():
        assert found.negative_share == pytest.approx(float(diagonal[0] < 0))
        assert found.negative_share_error < 1e-9


def test_the_standard_error_is_that_of_theory():
    """A random direction has a part in a space of dimension k of n that is Beta(k/2, (n - k)/2)."""
    diagonal = np.repeat([-1.0, -0.5, 1.0, 4.0], [20, 10, 50, 20])
    found = given(diagonal, steps=6, probes=200)
    theory = np.sqrt(2 * 0.3 * 0.7 / 102 / 200)
    assert abs(found.negative_share / 0.3 - 1) < 4 * theory / 0.3
    assert abs(found.negative_share_error / theory - 1) < 0.2
    trace = 100 * np.sum(found.eigenvalues * found.weights)
    assert abs(trace - diagonal.sum()) < 4 * np.sqrt(2 * np.sum(diagonal**2) / 200)


def test_the_standard_error_covers_other_seeds():
    diagonal = np.repeat([-1.0, 2.0], [12, 28])
    found = [given(diagonal, eagerly=True, steps=3, probes=8, seed=seed) for seed in range(16)]
    z = np.array([(one.negative_share - 0.3) / one.negative_share_error for one in found])
    assert abs(z.mean()) < 1
    assert 0.6 < np.sqrt(np.mean(z**2)) < 2  # of Student's t with 7 degrees of freedom it is 1.18
    assert len({one.negative_share for one in found}) == 16


def test_bounds_hold_for_every_direction_and_threshold():
    """What is in the direction below a number is known exactly, and lies between the bounds of every quadrature."""
    random = np.random.default_rng(3)
    for steps in (2, 5, 11):
        for exponent in (1, 5):
            eigenvalues = np.sort(random.normal(size=60) ** exponent)
            start = random.normal(size=60)
            start /= np.linalg.norm(start)
            run = _lanczos(lambda v, d=eigenvalues: d * v, start, steps, 1e-15, lambda done: None, 0)
            for bound in random.choice(eigenvalues, 20) + 1e-6:
                share, low, high = run.share_below(bound, 1e-12)
                assert low - 1e-9 <= np.sum(start[eigenvalues < bound] ** 2) <= high + 1e-9
                assert low <= share <= high


def test_no_eigenvalue_is_found_twice():
    """Lanczos without orthogonalisation finds outliers again and again."""
    eigenvalues, start = np.append(np.linspace(0, 1, 200), [50, 100]), np.random.default_rng(4).normal(size=202)
    start /= np.linalg.norm(start)
    run = _lanczos(lambda v: eigenvalues * v, start, 90, 1e-15, lambda done: None, 0)
    np.testing.assert_allclose(run.nodes[run.nodes > 2], [50, 100])
    np.testing.assert_allclose(run.weights[run.nodes > 2], start[-2:] ** 2)
    assert run.noise < 1e-12


def test_an_eigenvalue_is_not_shared_out():
    settled = Run(np.array([-1.0, 0.0, 1.0]), np.array([0.25, 0.5, 0.25]), np.zeros(3), 0.0)
    assert settled.share_below(-1e-6, 1e-6) == (0.25, 0.25, 0.25)
    vague = Run(settled.nodes, settled.weights, np.ones(3), 0.0)
    share, low, high = vague.share_below(-0.5, 1e-6)
    assert (low, high) == (0.0, 0.75)
    assert np.isclose(share, (0.125 + 0.5) / 2)
    assert vague.share_below(-2, 1e-6) == (0.0, 0.0, 0.25)
    assert vague.share_below(2, 1e-6) == (1.0, 0.75, 1.0)


def test_a_dense_spectrum_has_honest_bounds():
    diagonal = np.random.default_rng(2).normal(size=300) ** 3  # many are almost 0
    found = given(diagonal, steps=24)
    check(found, np.sort(diagonal))
    low, high = found.negative_share_bounds
    assert low < found.negative_share < high
    assert "by the steps" in str(found)


@pytest.mark.parametrize("batch_size", [40, 16, 7])
def test_batches_are_the_whole(batch_size):
    model = mlp(kernel_regularizer=keras.regularizers.L2(0.01))
    weights = np.random.default_rng(0).uniform(0, 2, 40).astype(FLOATX)
    exact = dense_eigenvalues(model, X, Y, weights)
    found = curvature(model, X, Y, weights, batch_size=batch_size, steps=44, verbose=0)
    np.testing.assert_allclose(found.eigenvalues, exact, atol=found.precision + 10 * EPS * exact[-1])
    assert found.products == 44


def test_penalties_count():
    def found(regularizer):
        layer = keras.layers.Dense(1, use_bias=False, kernel_regularizer=regularizer)
        return curvature(net(layer), X, Y[:, :1], verbose=0)

    with_penalty, without = found(keras.regularizers.L2(0.5)), found(None)
    np.testing.assert_allclose(with_penalty.eigenvalues, without.eigenvalues + 1, rtol=100 * EPS)


def test_any_structure_of_inputs_and_no_targets():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((2,), name="b")}
    outputs = keras.layers.Dense(1, use_bias=False)(keras.layers.Concatenate()([inputs["a"], inputs["b"]]))
    model = keras.Model(inputs, [outputs, outputs])
    model.compile("sgd", loss=["mse", "mse"])
    joined = np.concatenate([X, Y], axis=1).astype("float64")
    data = {"a": X, "b": ops.convert_to_tensor(Y)}
    for batch_size in (None, 20):
        found = curvature(model, data, [Y[:, :1], Y[:, 1:]], batch_size=batch_size, verbose=0)
        np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(4 * joined.T @ joined / 40), rtol=1e4 * EPS)


def test_the_loss_is_that_of_evaluate():
    plain = net(keras.layers.Dense(3, "tanh"), keras.layers.Dense(1))
    layers = [
        keras.layers.Dropout(0.5),
        keras.layers.Dense(3, "tanh"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1),
    ]
    dropped = net(*layers)
    dropped.set_weights(plain.get_weights())
    one, other = (curvature(model, X, Y[:, :1], verbose=0) for model in (plain, dropped))
    np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
    normalized = net(keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1))
    whole, batches = (curvature(normalized, X, Y[:, :1], batch_size=b, verbose=0) for b in (None, 10))
    np.testing.assert_allclose(batches.eigenvalues, whole.eigenvalues, atol=100 * EPS * whole.largest)


def test_nothing_of_the_model_changes():
    model = net(keras.layers.Dense(6, "tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2),
                keras.layers.Dense(2))  # fmt: skip
    model.compile("adam", loss="mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [ops.convert_to_numpy(variable).copy() for variable in variables]
    curvature(model, X, Y, steps=6, probes=2, verbose=0)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_a_seed_gives_the_same_again():
    first, again, other = (given(np.linspace(-1, 2, 30), steps=6, seed=seed) for seed in (1, 1, 2))
    assert first.negative_share == again.negative_share != other.negative_share
    assert str(first) == str(again)


def test_narrow_computations_are_seen_as_noise():
    model = mlp(dtype="mixed_bfloat16")
    for steps in (20, 64):
        found = curvature(model, X, Y, steps=steps, verbose=0)
        assert 1e-4 < found.precision / found.largest < 0.5


@pytest.mark.skipif(BACKEND == "jax" and FLOATX == "float32", reason="JAX has float64 only where all may be of it")
def test_float64():
    layers = keras.Input((4,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")
    model = keras.Sequential(layers)
    model.compile("sgd", loss=keras.losses.MeanSquaredError(dtype="float64"))
    x = X.astype("float64") * [1, 1e-2, 1e-4, 1e-5 if BACKEND == "tensorflow" else 1e-4]
    found = curvature(model, x, Y[:, :1].astype("float64"), verbose=0)
    assert np.isclose(found.condition, np.linalg.cond(x) ** 2, rtol=1e-4)
    assert found.precision < (1e-13 if BACKEND == "tensorflow" else 1e-9) * found.largest  # Keras rounds to float32


def test_progress_and_table(capsys):
    model = mlp()
    capsys.readouterr()
    found = curvature(model, X, Y, steps=10, probes=3)
    printed = capsys.readouterr().out
    assert "30/30" in printed
    assert "/product" in printed
    assert printed.count("\n") == 1
    curvature(model, X, Y)
    assert "44/44" in capsys.readouterr().out
    given(np.ones(20), steps=8, probes=3)
    assert not capsys.readouterr().out
    assert str(found).splitlines()[0] == "Hessian of 44 weights, from 30 products"
    table = str(given([4.0, 2.0]))
    assert [line.split("  ")[-1].split(" ±")[0].strip() for line in table.splitlines()[1:]] == ["4", "2", "0", "2"]
    assert "eigenvalues" not in repr(found)


def unbuilt():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    return model


def infinite():
    model = mlp()
    model.set_weights([np.full_like(value, np.nan) for value in model.get_weights()])
    return model


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("steps", {"steps": value}) for value in (0, 1.5, "2", None, True)),
        *(("probes", {"probes": value}) for value in (1, -3, 2.0)),
        *(("tolerance", {"tolerance": value}) for value in (0, 1, -1e-3, float("nan"), "1e-3", None)),
        *(("seed", {"seed": value}) for value in (-1, 0.5, None)),
        *(("verbose", {"verbose": value}) for value in (2, "auto", None, 0.0)),
        *(("batch_size", {"batch_size": value}) for value in (0, 2.5, "all")),
        *(("x", {"x": value}) for value in (None, "x", 1.0, [], iter([X]), X[:0], [[1.0, 2.0]])),
        *(("y", {"y": value}) for value in (1.0, "y", [1.0, 2.0])),
        ("y", {"y": Y[:7]}),
        ("y", {"x": X[:7]}),
        ("sample_weight", {"sample_weight": np.ones(3)}),
        ("sample_weight", {"sample_weight": 2.0}),
        *(("model", {"model": value}) for value in (None, keras.layers.Dense(1), unbuilt, infinite)),
        ("model", {"model": lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])}),
    ],
)
def test_what_is_refused(name, arguments):
    arguments = {"model": mlp, "x": X, "y": Y, "verbose": 0, **arguments}
    model = arguments.pop("model")
    model = model() if callable(model) and not isinstance(model, keras.layers.Layer) else model
    with pytest.raises(ValueError, match=rf"(?s)^`{name}` must be .* Received: {name}="):
        curvature(model, **arguments)
