"""`minimize` and `minimize_fn`: every method, what they return, what they refuse."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import kopt
from kopt.objective import objective_of
from kopt.optimizers.named import SOLVERS
from kopt.optimizers.quasi_newton import search
from kopt.solve.models import METHODS
from kopt.solve.newton import factored, steihaug
from kopt.solve.squares import LevenbergMarquardt, Residuals, jacobian_of
from tests.conftest import BACKEND, FLOATX
from tests.training import numpy

X = np.linspace(-1, 1, 40, dtype=FLOATX)[:, None]
Y = np.sin(3 * X)


def network(*hidden, **compiled):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((1,)), *(hidden or (layers.Dense(5, "tanh"),)), layers.Dense(1)])
    model.compile(**({"loss": "mse"} | compiled))
    return model


def loss_of(model):
    return model.evaluate(X, Y, batch_size=len(X), verbose=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_down(method):
    model = network()
    before = loss_of(model)
    history = kopt.minimize(model, X, Y, method, max_evals=60, chunk=20, verbose=0, gtol=0, ftol=0)
    losses, evaluations = history.history["loss"], history.history["evaluations"]
    assert losses[-1] < 0.1 * before
    assert (np.diff(losses) <= 0).all()
    assert evaluations[0] <= 20
    assert evaluations[-1] <= 60
    assert loss_of(model) == pytest.approx(losses[-1], rel=1e-3)
    assert int(model.optimizer.iterations) == 0


def test_minimize_and_fit_are_one_method():
    ours, fitted = network(), network(optimizer=kopt.LBFGS(check_noise=False))
    kopt.minimize(ours, X, Y, max_evals=7, verbose=0)  # later the roundings lead apart
    fitted.fit(X, Y, batch_size=len(X), shuffle=False, epochs=7, verbose=0)
    for one, other in zip(numpy(ours.variables), numpy(fitted.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-3)


class Added(layers.Layer):
    """A penalty that only a call shows."""

    def call(self, x):
        self.add_loss(0.01 * ops.sum(ops.square(x)))
        return x


class Scaled(keras.Sequential):
    factor = 1.0

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.factor * ops.mean(ops.square(y - y_pred))


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing")
@pytest.mark.parametrize("method", ["lbfgs", "lm", "newton-cg"])
def test_what_was_compiled_serves_the_next_call(method):
    model = network()
    kopt.minimize(model, X, Y, method, max_evals=3, verbose=0)
    compiled = model._kopt_objective.programs
    kept = dict(compiled)
    kopt.minimize(model, X, 2 * Y, method, max_evals=3, verbose=0)
    assert compiled == kept


def test_what_was_compiled_does_not_outlive_what_it_was_compiled_of():
    """A frozen weight, a loss, an attribute that the loss reads: all as if it were the first call."""
    model = Scaled([keras.Input((1,)), layers.Dense(3, "tanh"), layers.Dense(1)])
    model.compile()
    first = model.get_weights()

    def first_loss():
        history = kopt.minimize(model, X, Y, max_evals=1, verbose=0)
        return history.history["loss"][0]

    before = first_loss()
    model.factor = 3.0
    assert first_loss() == pytest.approx(3 * before, rel=1e-5)
    model.layers[0].trainable = False
    first_loss()
    model.layers[0].set_weights([0 * part for part in first[:2]])
    model.layers[1].set_weights([0 * part for part in first[2:]])
    assert first_loss() == pytest.approx(3 * np.mean(Y**2), rel=1e-5)

    model = network()
    before = loss_of(model)
    kopt.minimize(model, X, Y, max_evals=1, verbose=0)
    model.compile(loss="mae")
    history = kopt.minimize(model, X, Y, max_evals=1, verbose=0)
    assert history.history["loss"][0] == pytest.approx(loss_of(model), rel=1e-5)
    assert history.history["loss"][0] != pytest.approx(before, rel=1e-2)


class Brief(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return ops.mean(ops.square(y - y_pred))


def test_weights_that_a_callback_changes_are_not_taken_up():
    class Meddle(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.layers[-1].kernel.assign(ops.full((5, 1), 99.0))

    model = network()
    history = kopt.minimize(model, X, Y, max_evals=30, chunk=10, callbacks=Meddle(), verbose=0)
    assert loss_of(model) == pytest.approx(history.history["loss"][-1], rel=1e-4)


@pytest.mark.parametrize("method", ["lbfgs", "newton", "newton-cg"])
def test_inputs_that_are_huge(method):
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile(loss="mse")
    history = kopt.minimize(model, 1e12 * X, 1e12 * X, method, verbose=0).history
    assert history["loss"][-1] < 1e12


def test_a_compute_loss_that_is_not_told_whether_it_trains():
    model = Brief([keras.Input((1,)), layers.Dense(1)])
    model.compile()
    kopt.minimize(model, X, 2 * X, verbose=0)
    np.testing.assert_allclose(numpy([model.layers[-1].kernel])[0], 2, rtol=1e-3)


@pytest.mark.parametrize("method", ["lbfgs", "newton-cg", "lm"])
def test_a_start_that_is_not_finite_is_told(method):
    model, y = network(), np.where(X > 0.9, np.nan, Y)
    before = numpy(model.variables)
    history = kopt.minimize(model, X, y, method, verbose=0)
    assert (history.status, history.history["evaluations"]) == ("nonfinite", [1])
    assert np.isnan(history.history["loss"]).all()
    for one, other in zip(before, numpy(model.variables), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows", [10, 200])
def test_a_jacobian_by_rows_and_by_columns(rows):
    """By rows where there are fewer of them than weights, 16, and else by columns."""
    model = network()
    x = np.linspace(-1, 1, rows, dtype=FLOATX)[:, None]
    objective = objective_of(model)
    residuals = Residuals(objective)
    found, jacobian = jacobian_of(residuals)(objective.vector(), objective.tensors(x, np.sin(3 * x)))
    vector, near = ops.convert_to_numpy(objective.vector()), 1e-2 if FLOATX == "float32" else 1e-4
    assert tuple(jacobian.shape) == (rows, len(vector))

    def moved(step):
        return ops.convert_to_numpy(
            residuals(ops.convert_to_tensor(vector + step), objective.tensors(x, np.sin(3 * x)))
        )

    columns = [(moved(near * e) - moved(-near * e)) / (2 * near) for e in np.eye(len(vector), dtype=FLOATX)]
    np.testing.assert_allclose(ops.convert_to_numpy(jacobian).T, columns, atol=2e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(found), moved(0), rtol=1e-4, atol=1e-6)


def linear(**compiled):
    """A model that is linear in its weights, so that its loss is a parabola."""
    return network(layers.Dense(1, use_bias=False, trainable=False, kernel_initializer="ones"), **compiled)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_newton_needs_one_step_on_a_parabola(method):
    model = linear()
    history = kopt.minimize(model, X, 2 * X + 1, method, max_evals=10, verbose=0, ftol=0)
    assert history.status == "gradient"
    assert history.history["iterations"][-1] <= (1 if method == "newton" else 5)


def test_newton_converges_quadratically():
    """Once the error is small, the next one is no more than a constant times its square."""
    model = linear(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    y = (X + 0.4 * np.sin(20 * X) > 0).astype(FLOATX)
    history = kopt.minimize(model, X, y, "newton", max_evals=12, chunk=1, verbose=0, gtol=1e-12, ftol=0)
    norms = np.array(history.history["gradient_norm"])
    floor = 1e-6 if FLOATX == "float32" else 1e-13
    small = [(a, b) for a, b in itertools.pairwise(norms) if floor < b and a < 1e-2]
    assert len(small) >= 2
    assert all(b < 100 * a**2 for a, b in small), norms


def test_a_saddle_is_left():
    """At zero weights the gradient of a product is zero almost, and the Hessian indefinite."""

    class Product(keras.Model):
        def __init__(self):
            super().__init__()
            self.w = self.add_weight(shape=(2,), initializer="zeros")
            self.w.assign([2e-2, 1e-2])
            self.built = True

        def call(self, x):
            return x * self.w[0] * self.w[1]

    for method in ("newton", "newton-cg", "lbfgs"):
        model = Product()
        model.compile(loss="mse")
        history = kopt.minimize(model, X, -X, method, max_evals=80, verbose=0)
        assert history.history["loss"][-1] < 1e-4, method


def test_a_factor_of_a_matrix_that_is_not_positive():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(6, 6))
    matrix = matrix + matrix.T
    factor, shift = factored(matrix, 0.0)
    assert shift > -np.linalg.eigvalsh(matrix).min()
    np.testing.assert_allclose(factor @ factor.T, matrix + shift * np.eye(6), atol=1e-9)
    positive = matrix @ matrix
    factor, shift = factored(positive, 0.0)
    assert shift == 0
    np.testing.assert_allclose(factor, np.linalg.cholesky(positive))


@pytest.mark.parametrize("radius", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("definite", [True, False])
def test_steihaugs_step_is_as_good_as_cauchys(definite, radius):
    """Within the radius, and at least as low as the best point along the gradient; Newton's step where that fits."""
    random = np.random.default_rng(1)
    matrix = random.normal(size=(5, 5))
    matrix = matrix @ matrix.T + np.eye(5) if definite else matrix + matrix.T
    g = random.normal(size=5) * 1e-4
    step, promised = steihaug(lambda v: matrix @ v, g, radius)
    assert np.linalg.norm(step) <= radius * (1 + 1e-9)
    assert promised == pytest.approx(-(g @ step + step @ matrix @ step / 2), rel=1e-6)
    lengths = np.linspace(0, radius / np.linalg.norm(g), 10001)
    along = lengths * (g @ g) - lengths**2 / 2 * (g @ matrix @ g)
    assert promised >= along.max() * (1 - 1e-6)
    if definite and radius == 100:
        np.testing.assert_allclose(step, -np.linalg.solve(matrix, g), rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("seed", [1, 2])
def test_least_squares_equal_scipys(seed):
    least_squares = pytest.importorskip("scipy.optimize", reason="scipy comes with scikit-learn").least_squares
    x, start = np.linspace(-1, 1, 40), 0.7 * np.random.default_rng(seed).normal(size=10)

    def residuals(w):
        return (np.tanh(x[:, None] * w[:3] + w[3:6]) @ w[6:9] + w[9] - np.sin(3 * x)) / np.sqrt(len(x))

    def linearized(w):
        bent = np.tanh(x[:, None] * w[:3] + w[3:6])
        slope = (1 - bent**2) * w[6:9]
        return residuals(w), np.hstack([slope * x[:, None], slope, bent, np.ones((40, 1))]) / np.sqrt(len(x))

    ours = LevenbergMarquardt(start, search.Rules(gtol=0, ftol=0), residuals, linearized)
    ours.go(200)
    theirs = 2 * least_squares(residuals, start, method="lm", max_nfev=20000, xtol=1e-15, ftol=1e-15, gtol=1e-15).cost
    assert ours.state.search.loss <= theirs * 1.05


def test_least_squares_with_weights_and_penalties():
    weight = np.linspace(0.5, 2, len(X)).astype(FLOATX)
    model, twin = (network(layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(1e-3))) for _ in range(2))
    one = kopt.minimize(model, X, Y, "lm", sample_weight=weight, max_evals=100, verbose=0)
    other = kopt.minimize(twin, X, Y, "lbfgs", sample_weight=weight, max_evals=400, verbose=0)
    assert one.history["loss"][-1] <= other.history["loss"][-1] * 1.1


@pytest.mark.parametrize(
    ("compiled", "hidden", "says"),
    [
        ({"loss": "mae"}, lambda: (), "`method` must be another than 'lm' where the loss is not 'mse'"),
        (
            {},
            lambda: (layers.Dense(2, kernel_regularizer="l1"),),
            "`method` must be another than 'lm' beside penalties",
        ),
        (
            {},
            lambda: (layers.ActivityRegularization(0.5),),
            "`method` must be another than 'lm' where layers add penalties in their calls",
        ),
        (
            {},
            lambda: (Added(),),
            "`method` must be another than 'lm' where layers add penalties in their calls",
        ),
    ],
)
def test_what_is_no_sum_of_squares_is_refused(compiled, hidden, says):
    with pytest.raises(ValueError, match=says):
        kopt.minimize(network(*hidden(), **compiled), X, Y, "lm", verbose=0)


def test_callbacks_validation_and_metrics():
    seen = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((epoch, dict(logs))))
    model = network(metrics=["mae"])
    history = kopt.minimize(
        model, X, Y, max_evals=30, chunk=10, callbacks=[callback], validation_data=(X, Y), verbose=0
    )
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert history.epoch == [0, 1, 2]
    assert set(seen[0][1]) == {
        "loss", "gradient_norm", "step_size", "evaluations", "iterations", "mae", "val_loss", "val_mae",
    }  # fmt: skip
    for _, logs in seen:
        assert logs["val_loss"] == pytest.approx(logs["loss"], rel=1e-3)
    stop = keras.callbacks.EarlyStopping("loss", min_delta=9.0, patience=1)
    history = kopt.minimize(network(), X, Y, max_evals=200, chunk=10, callbacks=[stop], verbose=0)
    assert history.message == "a callback has stopped it"
    assert history.history["evaluations"][-1] <= 20


def test_it_tells_how_it_goes(capsys):
    kopt.minimize(network(), X, Y, max_evals=20, chunk=10)
    out = capsys.readouterr().out
    assert "20/20" in out
    assert "minimize has ended after 20 evaluations: `max_evals` evaluations were not enough" in out
    kopt.minimize(network(), X, Y, max_evals=20, chunk=10, verbose=2)
    assert capsys.readouterr().out.count("gradient_norm") == 2
    kopt.minimize(network(), X, Y, max_evals=20, verbose=0)
    assert capsys.readouterr().out == ""


class Poisson(keras.Model):
    """u'' = f by a network: the loss is the model's own."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential([keras.Input((1,)), layers.Dense(6, "tanh"), layers.Dense(1)])

    def call(self, x):
        return self.body(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(y_pred - y)) + ops.mean(ops.square(self.body(ops.zeros((1, 1)))))


def test_a_loss_of_the_models_own():
    model = Poisson()
    model(X)
    history = kopt.minimize(model, X, Y, max_evals=60, verbose=0)
    assert history.history["loss"][-1] < 1e-2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "adam"}, "`method` must be one of 'lbfgs', .*'lm'. Received: method='adam'"),
        ({"max_evals": 0}, "`max_evals` must be an integer of 1 or more"),
        ({"chunk": 0}, "`chunk` must be an integer of 1 or more"),
        ({"memory": 0}, "`memory` must be an integer of 1 or more"),
        ({"nonsense": 1}, "`LBFGS` has no argument `nonsense`"),
        ({"method": "newton", "memory": 3}, "`memory` must be an argument of the method; these take 'gtol' and 'ftol'"),
        ({"method": kopt.LBFGS(), "gtol": 1.0}, "`gtol` must be an argument of the optimizer that `method` is"),
        ({"x": X[:3]}, "`y` must be of as many rows as `x`, and at least one: 3 rows. Received: y=\\(40, 1\\)"),
        ({"x": iter([X])}, "`x` must be an array with rows, .*Received: x='list_iterator'"),
        ({"validation_data": X}, r"`validation_data` must be \(x, y\) or \(x, y, sample_weight\)"),
        ({"validation_data": (X, Y[:3])}, "In `validation_data`: `y` must be of as many rows as `x`"),
        ({"callbacks": [kopt.callbacks.LineSearchMonitor()]}, "`callbacks` must be Keras's, or of your own"),
        ({"batch_size": 8}, "`batch_size` must be left out: all data are one batch"),
        ({"y": None}, "`y` must be the targets"),
        ({"verbose": 3}, "`verbose` must be 'auto', 0, 1 or 2"),
        ({"accumulate_steps": 2}, "`accumulate_steps` must be left out"),
        ({"method": kopt.LBFGS(accumulate_steps=2)}, "`method` must be an optimizer without `accumulate_steps`"),
    ],
)
def test_bad_arguments_are_refused(arguments, says):
    model = network()
    before = numpy(model.variables)
    with pytest.raises(ValueError, match=says):
        kopt.minimize(**({"model": model, "x": X, "y": Y, "verbose": 0} | arguments))
    for one, other in zip(before, numpy(model.variables), strict=True):
        np.testing.assert_array_equal(one, other)


def test_models_that_cannot_be_minimised_are_refused():
    with pytest.raises(ValueError, match="`model` must be a keras.Model"):
        kopt.minimize("model", X, Y)
    with pytest.raises(ValueError, match="`model` must be built"):
        kopt.minimize(keras.Sequential([layers.Dense(1)]), X, Y)
    with pytest.raises(ValueError, match="`model` must be compiled with a loss, or one with a `compute_loss`"):
        kopt.minimize(keras.Sequential([keras.Input((1,)), layers.Dense(1)]), X, Y)


class Sampled(keras.Sequential):
    """A model whose loss is taken on points that it draws."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        points = keras.random.uniform((8, 1), seed=self.points)
        return ops.mean(ops.square(self(points) - points))


def sampled():
    model = Sampled([keras.Input((1,)), layers.Dense(1)], name="sampled")
    model.points = keras.random.SeedGenerator(0)
    model.compile()
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: network(layers.Dropout(0.5)), "dropout"),
        (lambda: network(layers.Reshape((1, 1)), layers.LSTM(2, dropout=0.5)), "lstm_cell"),
        (
            lambda: network(layers.Reshape((1, 1, 1)), layers.RandomBrightness(0.5), layers.Flatten()),
            "random_brightness",
        ),
        (sampled, "sampled"),
    ],
)
def test_layers_that_draw_at_random_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=rf"`model` must be without layers that draw at random.*\['{name}'\]"):
        kopt.minimize(make(), X, Y)


def test_layers_that_could_draw_but_do_not_are_taken():
    kopt.minimize(network(layers.Dropout(0.0), layers.Reshape((1, 1)), layers.LSTM(2)), X, Y, max_evals=1, verbose=0)


# minimize_fn


def parabola(x):
    return sum(ops.sum((part - 3) ** 2) for part in x.values()), {name: 2 * (part - 3) for name, part in x.items()}


def test_structures_of_tensors():
    x0 = {"a": ops.zeros((2, 2)), "b": keras.Variable([1.0])}
    found = kopt.minimize_fn(parabola, x0)
    assert found.success
    assert set(found.x) == set(found.jac) == {"a", "b"}
    assert tuple(found.x["a"].shape) == (2, 2)
    np.testing.assert_allclose(ops.convert_to_numpy(found.x["a"]), 3, rtol=1e-5)
    np.testing.assert_allclose(numpy([x0["b"]])[0], 1.0)


def test_the_callback_sees_and_stops():
    seen = []

    def far(x):
        return float(np.sum((x - 3) ** 4)), 4 * (x - 3) ** 3

    found = kopt.minimize_fn(
        far, np.zeros(2), gtol=0, ftol=0, callback=lambda r: seen.append(r.fun) or np.bool_(len(seen) == 5)
    )
    assert len(seen) == found.nit == 5
    assert seen == sorted(seen, reverse=True)
    assert (found.status, found.message) == ("running", "`callback` has stopped it")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"value_and_grad": 3}, "`value_and_grad` must be a function"),
        ({"value_and_grad": lambda x: x}, "`value_and_grad` must be a function that returns value and gradient"),
        ({"value_and_grad": lambda x: (0.0, np.zeros(3))}, "`value_and_grad` must return a gradient in the structure"),
        ({"value_and_grad": lambda x: (x, x)}, "`value_and_grad` must be a function whose value is one number"),
        ({"x0": "here"}, "`x0` must be numbers"),
        ({"x0": np.zeros(0)}, "`x0` must be of one number or more"),
        ({"value_and_grad": lambda x: (None, x)}, "`value_and_grad` must be a function whose value is one number"),
        ({"value_and_grad": lambda x: (1.0, 1j * x)}, "`value_and_grad` must return a gradient .* It is of complex128"),
        ({"x0": []}, "`x0` must be of one number or more"),
        (
            {"x0": np.zeros(2, "float16")},
            "`x0` must be all arrays or all tensors, and all of float32 or all of float64",
        ),
        ({"method": "newton"}, "`method` must be one of 'lbfgs', 'bfgs', 'ssbfgs', 'ssbroyden'"),
        ({"max_evals": 0.5}, "`max_evals` must be an integer"),
        ({"callback": 3}, "`callback` must be a function or None"),
        ({"maxiter": 9}, "`maxiter` must be left out: the number of evaluations is `max_evals`"),
    ],
)
def test_bad_arguments_of_a_function_are_refused(arguments, says):
    given = {"value_and_grad": lambda x: (float(x @ x), 2 * x), "x0": np.zeros(2)} | arguments
    with pytest.raises(ValueError, match=says):
        kopt.minimize_fn(**given)


@pytest.mark.skipif(BACKEND == "torch", reason="torch's tensors have values in a function")
def test_a_function_that_cannot_be_compiled_is_told_why():
    with pytest.raises((TypeError, NotImplementedError)) as raised:
        kopt.minimize_fn(lambda x: (float(np.sum(np.asarray(x))), 2 * x), ops.zeros(3))
    assert "Give `x0` as a NumPy array" in raised.value.__notes__[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", SOLVERS)
def test_what_underflows_is_no_error(method, dtype):
    found = kopt.minimize_fn(lambda x: (np.sum(x**4), 4 * x**3), np.array([1, 2, 3], dtype), method, gtol=0, ftol=0)
    assert found.fun < 1e-12


def test_what_overflows_is_no_convergence():
    found = kopt.minimize_fn(lambda x: (1e21 * x @ x, 2e21 * x), np.ones(3, "float32"), ftol=0)
    assert found.fun < 1e-9


def test_a_function_that_writes_into_its_argument():
    def parabola(x):
        x -= 3
        return (x**2).sum(), 2 * x

    np.testing.assert_allclose(kopt.minimize_fn(parabola, np.zeros(2)).x, 3)


def test_a_start_that_is_not_finite_is_the_result():
    found = kopt.minimize_fn(lambda x: (np.sum(np.log(x)), 1 / x), -np.ones(2))
    assert (found.status, found.nfev, found.success) == ("nonfinite", 1, False)
    assert np.isnan(found.fun)


def test_integers_begin_as_floats():
    assert kopt.minimize_fn(lambda x: ((x - 2) ** 2, 2 * (x - 2)), 7).x == pytest.approx(2.0)
    assert kopt.minimize_fn(lambda x: (x @ x, 2 * x), np.array([3, 4])).fun < 1e-9
    assert kopt.minimize_fn(lambda x: (x @ x, 2 * x), [3, 4.5]).x.shape == (2,)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="what XLA cannot compile is TensorFlow's")
def test_what_xla_cannot_compile_is_compiled_without():
    import tensorflow as tf

    def both(x):
        value = tf.numpy_function(lambda v: np.sum(v**2).astype(v.dtype), [x], x.dtype)
        value.set_shape(())
        return value, 2 * x

    assert kopt.minimize_fn(both, tf.constant([1.0, 2.0])).fun < 1e-6
