"""The loss of a model minimised outside of `fit`, with its callbacks, validation and history."""

import time

import keras
import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt.objective import objective_of
from kopt.optimizers.quasi_newton import machine, noise, search
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton
from kopt.optimizers.quasi_newton.space import space_of
from kopt.solve.functions import MESSAGES, QUASI_NEWTON, compiled_chunks, optimizer_of
from kopt.solve.newton import LineSearch, TrustRegion
from kopt.solve.squares import LevenbergMarquardt, Residuals, jacobian_of

METHODS = (*QUASI_NEWTON, "newton", "newton-cg", "lm")
MATRIX = 2000  # weights up to which "newton" and "lm" make a matrix of them


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
    never a worse one than at the start; its optimizer is not touched.

    Args:
        model: A model that is built and compiled with a loss. A `train_step` of its own is not used: override
            `compute_loss`, or use `fit` with `kopt.LBFGS`.
        x: The inputs, as for `fit`: an array, or several.
        y: The targets.
        method: "lbfgs"; "bfgs", "ssbfgs", "ssbroyden" for up to some thousand weights; "newton" with the whole Hessian,
            for up to 2000; "newton-cg", a trust region and products of the Hessian, for any number; "lm", Levenberg's
            and Marquardt's, for up to 2000 weights or rows and a loss of "mse". Or an optimizer such as
            `kopt.SSBroyden(gtol=0)`. The last three work in the host's memory between evaluations.
        sample_weight: A weight for each row, as for `fit`.
        max_evals: How many evaluations of the loss to make at most.
        chunk: How many of them are an epoch to callbacks, validation and history.
        validation_data: `(x, y)` or `(x, y, sample_weight)`; the logs get `val_` metrics after each chunk.
        callbacks: Keras's callbacks. They are told of epochs only; `model.stop_training` ends the minimisation. Weights
            that they change are not taken up.
        verbose: 0 for nothing, 1 for a progress bar, 2 for a line for each chunk; "auto" is 1.
        **options: Arguments of the optimizer, as `gtol`, `ftol`, `memory`. A tolerance of 0 switches it off.

    Returns:
        A `History`: `loss`, at the best point, `gradient_norm`, its largest entry there, `step_size`, `evaluations` and
        `iterations` for each chunk, and the metrics of `compile`. Its `status` and `message` say why it has ended.

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
    verbose = 1 if verbose == "auto" else checks.count(0)("verbose", verbose)
    if not isinstance(method, QuasiNewton):
        method = checks.one_of(*METHODS)("method", method)
    objective = objective_of(model)
    data = objective.tensors(*_checked(x, y, sample_weight))
    loss, drawing = objective.looked_at(data)
    noise.check_model(model, "minimize", noise.random_layers(model) or drawing)
    is_compiled, run = bool(objective.programs), _run(objective, data, loss, method, options)
    if is_compiled:
        run.go(1)
        if not np.isclose(float(run.state.search.loss), loss, rtol=1e-3):  # the loss reads what was changed since
            objective.programs.clear()
            run = _run(objective, data, loss, method, options)
    listed = keras.callbacks.CallbackList(
        list(callbacks or []), add_history=True, add_progbar=False, model=model, epochs=-(-max_evals // chunk), steps=1,
        verbose=verbose,
    )  # fmt: skip
    report = Report(model, max_evals, verbose)
    model.stop_training, epoch = False, 0
    listed.on_train_begin()
    logs: dict = {}
    while run.state.search.status == search.RUNNING and run.state.search.evaluations < max_evals:
        listed.on_epoch_begin(epoch)
        run.go(min(max_evals, int(run.state.search.evaluations) + chunk))
        objective.show(ops.convert_to_tensor(run.state.point))
        logs = _logs(run.state) | _metrics(model, x, y, sample_weight, "") | _validated(model, validation_data)
        listed.on_epoch_end(epoch, logs)
        epoch += 1
        report.tell(logs)
        if model.stop_training:
            break
    history = model.history
    history.status = search.STATUS[int(run.state.search.status)]
    history.message = "a callback has stopped it" if model.stop_training else MESSAGES[history.status]
    report.end(logs, history.message)
    listed.on_train_end(logs)
    return history


def _checked(x, y, sample_weight) -> tuple:
    """Arrays of as many rows."""
    parts = [part for part in keras.tree.flatten((x, y, sample_weight)) if part is not None]
    counts = {part.shape[0] if len(getattr(part, "shape", ())) else None for part in parts}
    if not parts or None in counts or len(counts) > 1 or counts == {0}:
        allowed = "arrays with as many rows as `y` and `sample_weight`, all data at once (for batches, use `fit`)"
        checks.refuse("x", allowed, [getattr(part, "shape", type(part).__name__) for part in parts])
    return x, y, sample_weight


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


def _run(objective, data, loss, method, options):
    """The method, ready to make evaluations."""
    if isinstance(method, QuasiNewton) or method in QUASI_NEWTON:
        return Compiled(objective, data, optimizer_of(method, options))
    rules = search.Rules(**_tolerances(options))
    if method != "newton-cg" and objective.size > MATRIX and (method == "newton" or len(data[0]) > MATRIX):
        checks.refuse("method", f"another than {method!r} for {objective.size} weights: 'lbfgs', 'newton-cg'", method)

    def on_host(name, function):
        compiled = objective.program(name, lambda: backends.compiled(function))

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
        total = float(np.sum(run.residuals(start).astype("float64") ** 2))
        if not np.isclose(total, loss, rtol=1e-3, equal_nan=True):
            checks.refuse(
                "method", f"another than 'lm' for a loss of {loss:.4g} where the squares make {total:.4g}", "lm"
            )
        return run
    value_and_gradient = on_host("value_and_gradient", objective.value_and_gradient)
    if method == "newton":
        return LineSearch(start, rules, value_and_gradient, on_host("hessian", objective.hessian))
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


def _metrics(model, x, y, sample_weight, prefix) -> dict:
    """The metrics of `compile` on all data; the loss is known."""
    if not _keras.has_metrics(model):
        return {}
    found = model.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)
    return {prefix + name: value for name, value in found.items() if name != "loss"}


def _validated(model, validation_data) -> dict:
    if validation_data is None:
        return {}
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
    found = model.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)
    return {f"val_{name}": value for name, value in found.items()}


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
