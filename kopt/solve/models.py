"""The loss of a model minimised outside of `fit`, with its callbacks, validation and history."""

import time

import keras
import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt.callbacks.base import Callback
from kopt.objective import objective_of, rows_of
from kopt.optimizers.named import SOLVERS
from kopt.optimizers.quasi_newton import machine, noise, search
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton
from kopt.optimizers.quasi_newton.space import space_of
from kopt.solve.functions import MESSAGES, compiled_chunks, optimizer_of
from kopt.solve.newton import Newton, TrustRegion
from kopt.solve.squares import LevenbergMarquardt, Residuals, jacobian_of

METHODS = (*SOLVERS, "newton", "newton-cg", "lm")
MATRIX = 2000  # weights up to which "newton" makes a matrix of them; "lm" of the fewer of weights and residuals
ENTRIES = 10**8  # that the Jacobian of "lm" may have


def minimize(
    model,
    x,
    y=None,
    method="lbfgs",
    *,
    sample_weight=None,
    max_evals: int = 1000,
    chunk: int = 50,
    validation_data=None,
    callbacks=None,
    verbose="auto",
    **options,
) -> keras.callbacks.History:
    """Minimise the loss of a model on all data at once, much faster than `fit` where the model is small.

    The loss is the one of `compile` with all penalties, or of a `compute_loss` of the model's own; layers act as in
    training. The whole loop is compiled and runs on the device in chunks of evaluations; each counts as an epoch for
    callbacks, validation and the history that is returned. When it ends the model has the best point that was found,
    never a worse one than at the start; its optimizer is not touched. To compile takes seconds, once: the next call on
    the same model, with data of the same shapes, begins at once.

    Args:
        model: A model that is built and compiled with a loss. A `train_step` of its own is not used: override
            `compute_loss`, or use `fit` with `kopt.LBFGS`.
        x: The inputs, as for `fit`: an array, or several.
        y: The targets.
        method: "lbfgs"; "bfgs", "ssbfgs", "ssbroyden" for up to some thousand weights; "newton" with the whole Hessian,
            for up to 2000; "newton-cg", a trust region and products of the Hessian, for any number; "lm", Levenberg's
            and Marquardt's, for up to 2000 weights or numbers in `y`, and a loss of "mse". Or an optimizer such as
            `kopt.SSBroyden(gtol=0)`. "newton", "newton-cg" and "lm" work in the host's memory between evaluations.
        sample_weight: A weight for each row, as for `fit`.
        max_evals: How many evaluations of the loss to make at most. Hessians and their products do not count.
        chunk: How many of them are an epoch to callbacks, validation and history.
        validation_data: `(x, y)` or `(x, y, sample_weight)`; the logs get `val_` metrics after each chunk.
        callbacks: Keras's callbacks, or your own. They are told of epochs only; `model.stop_training` ends the
            minimisation. Weights that they change are not taken up.
        verbose: 0 for nothing, 1 for a progress bar, 2 for a line for each chunk; "auto" is 1.
        **options: Arguments of the optimizer, as `gtol`, `ftol`, `memory`. A tolerance of 0 switches it off, as you
            will want for many digits.

    Returns:
        A `History`: `loss`, at the best point, `gradient_norm`, its largest entry there, `step_size` (as a multiple of
            the direction; of "newton-cg" and "lm" a length), `evaluations` and `iterations` for each chunk, and the
            metrics of `compile`. Its `status` and `message` say why it has ended.

    Example:
        >>> import keras, kopt, numpy as np
        >>> keras.utils.set_random_seed(0)
        >>> x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> history = kopt.minimize(model, x, np.sin(3 * x), max_evals=200, verbose=0)
        >>> history.history["loss"][-1] < 1e-3
        True
    """
    max_evals, chunk = checks.count(1)("max_evals", max_evals), checks.count(1)("chunk", chunk)
    if verbose not in ("auto", 0, 1, 2):
        checks.refuse("verbose", "'auto', 0, 1 or 2", verbose)
    verbose = 1 if verbose == "auto" else int(verbose)
    callbacks, validation_data = _checked_callbacks(callbacks), _checked_validation(validation_data)
    if not isinstance(method, QuasiNewton):
        method = checks.one_of(*METHODS)("method", method)
    for name in ("batch_size", "epochs", "validation_split", "shuffle"):
        if name in options:
            checks.refuse(name, "left out: all data are one batch, `max_evals` times", options[name])
    rows_of(x, y, sample_weight)
    objective = objective_of(model)
    if y is None and type(model).compute_loss is keras.Model.compute_loss and model.loss is not None:
        checks.refuse("y", "the targets that the loss of `compile` compares with", y)
    data = objective.tensors(x, y, sample_weight)
    look = objective.looked_at(data)
    noise.check_model(model, "minimize", noise.random_layers(model) or look.drawing, "are not updated meanwhile")
    is_compiled, run = bool(objective.programs), _run(objective, data, look, method, options)
    if is_compiled:
        run.go(1)
        if not np.isclose(float(run.state.search.loss), look.loss, rtol=1e-3):  # the loss reads what was changed since
            objective.programs.clear()
            run = _run(objective, data, look, method, options)
    listed = keras.callbacks.CallbackList(
        callbacks, add_history=True, add_progbar=False, model=model, epochs=-(-max_evals // chunk), steps=1,
        verbose=verbose,
    )  # fmt: skip
    report = Report(model, max_evals, verbose)
    model.stop_training = False
    listed.on_train_begin()
    for epoch in range(-(-max_evals // chunk)):
        listed.on_epoch_begin(epoch)
        run.go(min(max_evals, (epoch + 1) * chunk))
        objective.show(ops.convert_to_tensor(run.state.point))
        logs = _logs(run.state)
        if _keras.has_metrics(model):
            logs |= _evaluated(model, (x, y, sample_weight), "")
        if validation_data is not None:
            logs |= _evaluated(model, validation_data, "val_")
        listed.on_epoch_end(epoch, logs)
        report.tell(logs)
        if model.stop_training or run.state.search.status != search.RUNNING:
            break
    objective.show(ops.convert_to_tensor(run.state.point))
    history = model.history
    history.status = search.STATUS[int(run.state.search.status)]
    history.message = "a callback has stopped it" if model.stop_training else MESSAGES[history.status]
    report.end(logs, history.message)
    listed.on_train_end(logs)
    return history


def _checked_callbacks(callbacks) -> list:
    listed = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks or [])
    for one in listed:
        if isinstance(one, Callback):
            allowed = "Keras's, or of your own: `minimize` has no training steps, in which kopt's callbacks work"
            checks.refuse("callbacks", allowed, type(one).__name__)
    return listed


def _checked_validation(given):
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or not 1 <= len(given) <= 3:
        checks.refuse("validation_data", "(x, y) or (x, y, sample_weight)", type(given).__name__)
    try:
        given = keras.utils.unpack_x_y_sample_weight(tuple(given))
        rows_of(*given)
        return given
    except ValueError as error:
        raise ValueError(f"In `validation_data`: {error}") from error


class Compiled:
    """A quasi-Newton method in compiled loops; on torch, which has none, one evaluation after another."""

    def __init__(self, objective, data, optimizer):
        self.data, start = data, objective.vector()
        optimizer.check_size(objective.size)
        method, rules = optimizer.method(), optimizer.rules()._replace(check_noise=False)

        def evaluated(state, data, m):
            loss, gradient = objective.value_and_gradient(state.trial, data)
            return machine.advanced(state, state.trial, m.number(loss), gradient, method, rules, m)

        self.evaluated, self.space = evaluated, space_of(start)
        self.state = machine.begun(method, start, self.space)
        self.loop = None
        if backends.BACKEND != "torch":
            key = type(optimizer), *optimizer.arguments().items()
            self.loop = objective.program(key, lambda: compiled_chunks(evaluated, start.dtype))

    def go(self, limit) -> None:
        if self.loop:
            state = self.loop(self.state, limit, self.data)
            numbers = map(np.asarray, map(ops.convert_to_numpy, state.search))
            self.state = state._replace(search=search.Search(*(number.item() for number in numbers)))
            return
        while self.state.search.status == search.RUNNING and self.state.search.evaluations < limit:
            self.state = self.evaluated(self.state, self.data, self.space)


def _run(objective, data, look, method, options):
    """The method, ready to make evaluations."""
    if isinstance(method, QuasiNewton) or method in SOLVERS:
        return Compiled(objective, data, optimizer_of(method, options))
    rules = search.Rules(**_tolerances(options))
    if method == "newton" and objective.size > MATRIX:
        checks.refuse("method", f"another than 'newton' for {objective.size} weights: 'lbfgs', 'newton-cg'", method)

    shapes = tuple(tuple(part.shape) for part in keras.tree.flatten(data) if part is not None)

    def on_host(name, function):
        compiled = objective.program((name, shapes), lambda: backends.compiled(function))

        def call(*vectors):
            with backends.unrecorded():
                found = compiled(*(ops.convert_to_tensor(v, objective.dtype) for v in vectors), data)
            return keras.tree.map_structure(lambda part: np.asarray(ops.convert_to_numpy(part)), found)

        return call

    start = np.array(ops.convert_to_numpy(objective.vector()))
    if method == "lm":
        residuals = Residuals(objective)
        run = LevenbergMarquardt(
            start, rules, on_host("residuals", residuals), on_host("jacobian", jacobian_of(residuals))
        )
        found = run.residuals(start)
        total = float(np.sum(found.astype("float64") ** 2))
        if look.has_added:
            checks.refuse("method", "another than 'lm' where layers add penalties in their calls", "lm")
        if not np.isclose(total, look.loss, rtol=1000 * run.m.eps, equal_nan=True):
            allowed = f"another than 'lm' for a loss of {look.loss:.6g} where the squares make {total:.6g}"
            checks.refuse("method", allowed, "lm")
        if min(found.size, start.size) > MATRIX or found.size * start.size > ENTRIES:
            allowed = f"another than 'lm' for {start.size} weights and {found.size} residuals: 'lbfgs', 'newton-cg'"
            checks.refuse("method", allowed, "lm")
        return run
    value_and_gradient = on_host("value_and_gradient", objective.value_and_gradient)
    if method == "newton":
        return Newton(start, rules, value_and_gradient, on_host("hessian", objective.hessian))
    return TrustRegion(start, rules, value_and_gradient, on_host("hessian_product", objective.hessian_product))


def _tolerances(options) -> dict:
    known = {"gtol": checks.nonnegative, "ftol": checks.either("auto", checks.nonnegative)}
    for name, value in options.items():
        if name not in known:
            allowed = "an argument of the method; these take " + " and ".join(map(repr, known))
            checks.refuse(name, allowed, value)
    return {name: known[name](name, value) for name, value in options.items()}


def _logs(state) -> dict:
    s = state.search
    return {
        "loss": float(s.loss),
        "gradient_norm": float(s.norm),
        "step_size": float(s.taken),
        "evaluations": int(s.evaluations),
        "iterations": int(s.iterations),
    }


def _evaluated(model, data, prefix) -> dict:
    """Metrics on all data at once; the loss of validation, too."""
    x, y, sample_weight = data
    found = model.evaluate(x, y, sample_weight=sample_weight, batch_size=rows_of(x), verbose=0, return_dict=True)
    return {prefix + name: value for name, value in found.items() if prefix or name != "loss"}


class Report:
    """What the user sees: a bar of the evaluations, or a line for each chunk."""

    def __init__(self, model, max_evals, verbose):
        self.verbose, self.max_evals, self.begun = verbose, max_evals, time.time()
        self.bar = keras.utils.Progbar(max_evals, verbose=1, unit_name="evaluation") if verbose == 1 else None

    def tell(self, logs) -> None:
        shown = {name: value for name, value in logs.items() if name not in ("evaluations", "iterations", "step_size")}
        if self.bar:
            self.bar.stateful_metrics = set(shown)
            self.bar.update(logs["evaluations"], list(shown.items()), finalize=False)
        elif self.verbose:
            numbers = " - ".join(f"{name}: {value:.4e}" for name, value in shown.items())
            print(f"{logs['evaluations']}/{self.max_evals} - {time.time() - self.begun:.0f}s - {numbers}")

    def end(self, logs, message) -> None:
        if self.bar and logs:
            shown = {name: logs[name] for name in self.bar.stateful_metrics}
            self.bar.target = logs["evaluations"]
            self.bar.update(logs["evaluations"], list(shown.items()), finalize=True)
        if self.verbose:
            print(f"minimize has ended after {logs['evaluations']} evaluations: {message}")
