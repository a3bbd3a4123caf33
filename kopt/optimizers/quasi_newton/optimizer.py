"""The base of the quasi-Newton optimizers: one training step is one evaluation of loss and gradient.

Keras asks every optimizer to scale the loss before it is differentiated; that is where the loss is taken from. The
state lives in flat vectors, so that a method sees the whole model as one point.
"""

import warnings
from typing import TypedDict

import numpy as np
from keras import ops

from kopt import _keras, backends, checks
from kopt.optimizers import gradients, state
from kopt.optimizers.quasi_newton import machine, noise, search
from kopt.optimizers.quasi_newton.space import space_of
from kopt.optimizers.rule import Choice, Declared

_ALONE = "L-BFGS and its kin need the gradient of the very loss that is minimised"
_NOT_FOR = {  # what other optimizers take, and why these do not
    "learning_rate": "there is no learning rate: the line search finds each step",
    "lr": "there is no learning rate: the line search finds each step",
    "momentum": "what was learnt from earlier steps is in the directions already",
    "weight_decay": f"{_ALONE}: give the layers a `kernel_regularizer`",
    "clipnorm": _ALONE,
    "clipvalue": _ALONE,
    "global_clipnorm": _ALONE,
    "use_ema": "an average would be of points that the search tries",
    "loss_scale_factor": _ALONE,
    "gradient_accumulation_steps": "use `accumulate_steps`",
}
_RENAMED = {
    "history_size": "memory", "maxcor": "memory", "m": "memory", "memory_size": "memory", "tolerance_grad": "gtol",
    "tolerance_change": "ftol", "max_ls": "max_line_search", "maxls": "max_line_search",
    "line_search_fn": "line_search",
}  # fmt: skip


WHY = {
    "gradient": "no entry of the gradient is above `gtol`",
    "loss": "five steps in a row gained no more than `ftol`",
    "stuck": "no step leads to a lower loss: it is at its precision, or the gradient is not that of the loss",
    "noisy": "two evaluations of the same weights gave two losses, or two gradients. It needs all data in one batch "
    "(`fit(..., batch_size=len(x), shuffle=False)`, or `accumulate_steps` for equal batches in a fixed order) and no "
    "Dropout or other randomness in the model",
    "nonfinite": "the loss or the gradient is infinite or NaN there",
}


MANY, RARELY = 20, 0.2  # so many evaluations, of which this share were steps, or less: something is wrong
_DEFAULTS = {
    "line_search": "wolfe", "c1": 1e-4, "c2": 0.9, "gtol": 1e-5, "ftol": "auto", "max_line_search": 25,
    "accumulate_steps": None, "check_noise": True,
}  # fmt: skip


_WINDOW = "window", "loss_sum", "gradient_sum"  # of the batches that make one evaluation


class Common(TypedDict, total=False):
    """The arguments that every quasi-Newton optimizer takes; `QuasiNewton` documents them."""

    line_search: str
    c1: float
    c2: float
    gtol: float
    ftol: float | str
    max_line_search: int
    accumulate_steps: int | None
    check_noise: bool
    name: str | None


class QuasiNewton(Declared, _keras.OptimizerBridge):
    """The base of `kopt.LBFGS`, `kopt.BFGS`, `kopt.SSBFGS` and `kopt.SSBroyden`; not to be used itself.

    They minimise one function: compile with one of them and call `fit` with all data in one batch, not shuffled,
    `model.fit(x, y, batch_size=len(x), shuffle=False, epochs=500)`. One training step is one evaluation of loss and
    gradient, whatever becomes of it, so that the loss that Keras logs is that of the points that the search tries. The
    best point so far is in the model when `fit` ends, and with `kopt.callbacks.LineSearchMonitor` also whenever a
    validation or a checkpoint looks. When a tolerance is met, steps change nothing any more. Each `fit` begins with an
    evaluation of that point, and with a new search if loss or gradient are not what they were.

    In a loop of your own, and after a `fit` that was broken off (Ctrl-C), the model has a point that was to be tried:
    `optimizer.show("point")` puts the best one there.

    `status`, `loss`, `gradient_norm`, `step_size`, `evaluations` and `iterations`, the accepted steps, say how it is.

    Args:
        line_search: "wolfe", the default, accepts a step by the strong Wolfe conditions, or by Hager's and Zhang's
            approximation where the loss is flat to its precision. "gradient" goes by the slope alone. "none" takes
            every step, whatever becomes of the loss.
        c1: How much of the decrease that the slope promises a step must bring; 1e-4.
        c2: What share of the slope may be left after a step; 0.9.
        gtol: Stop when no entry of the gradient is larger than this in absolute value, whatever the scale of the loss;
            1e-5. 0 switches it off, as you will want for many digits.
        ftol: Stop when five steps in a row lower the loss by no more than this share of it. "auto", the default, is 4
            times the precision of the dtype. 0 switches it off.
        max_line_search: How many steps to try along one direction; 25.
        accumulate_steps: An evaluation is the mean of so many batches, the same ones in the same order each time, for
            data that does not fit into one. They should have equal sizes, since the mean takes them for equal. None,
            the default, is one.
        check_noise: Whether the first point is evaluated twice, and that of a `fit` with other data; where it has two
            losses or two gradients, that is the end. True is the default.
        name: Name of the optimizer.
    """

    line_search = Choice(checks.one_of("wolfe", "gradient", "none"))
    c1 = Choice(checks.inner)
    c2 = Choice(checks.inner)
    gtol = Choice(checks.nonnegative)
    ftol = Choice(checks.either("auto", checks.nonnegative))
    max_line_search = Choice(checks.count(1))
    accumulate_steps = Choice(checks.optional(checks.count(1)))
    check_noise = Choice(checks.boolean)

    def __init__(self, *, name=None, **arguments):
        if type(self).method is QuasiNewton.method:
            raise TypeError("`kopt.QuasiNewton` has no method of its own; use one of its subclasses, as `kopt.LBFGS`")
        backends.check_strategy()
        if getattr(backends.strategy(), "num_replicas_in_sync", 1) > 1:
            allowed = f"of one replica for {type(self).__name__}: a search goes through one point at a time"
            checks.refuse("strategy", allowed, type(backends.strategy()).__name__)
        declared = self.declared()
        for other, value in arguments.items():
            if other in declared:
                continue
            if other in _NOT_FOR and value is None:
                continue
            if other in _NOT_FOR:
                checks.refuse(other, f"left out for {type(self).__name__}: {_NOT_FOR[other]}", value)
            self.refuse_unknown(other, value, [*declared, "name"], _RENAMED)
        name = checks.optional(checks.text)("name", name)
        arguments = {
            argument: declared[argument].check(argument, value)
            for argument, value in (_DEFAULTS | arguments).items()
            if argument in declared
        }
        self.check_together(arguments)
        self.__dict__.update(
            ready=False, choices=arguments, kept=None, found_loss=None, waiting={}, before={}, loaded={}
        )
        self.__dict__.update(slots_in_use=(), is_blind=False, is_followed=False, told=(0, 0))
        super().__init__(1.0, name=name)
        self.__dict__["ready"] = True

    def check_together(self, arguments):
        if arguments["c1"] >= arguments["c2"]:
            checks.refuse("c1", f"less than `c2`, {arguments['c2']}", arguments["c1"])

    def method(self):
        """How the curvature is learnt and used: `lbfgs.Recursion`, `dense.Inverse`."""
        raise NotImplementedError

    def rules(self, is_blind=False) -> search.Rules:
        given = {name: value for name, value in self.choices.items() if name in search.Rules._fields}
        if is_blind and self.line_search == "wolfe":
            given["line_search"] = "gradient"
        return search.Rules(**given, is_blind=is_blind)

    # State

    def build(self, variables):
        """Create the state for these variables. Keras calls it at the first step."""
        if self.built:
            return
        variables = self._checked(list(variables))
        dtype, size = _keras.dtype_of(variables[0]), sum(int(np.prod(v.shape)) for v in variables)
        self.check_size(size)
        with backends.eagerly():
            vector = ops.zeros((size,), dtype)
            start = machine.begun(self.method(), vector, space_of(vector))
            kept = {name: self._add(name, (size,), dtype) for name in machine.VECTORS}
            kept["counts"] = self._add("counts", (len(search.INTEGERS),), "int32")
            kept["numbers"] = self._add("numbers", (len(search.FLOATS),), dtype)
            kept["memory"] = [self._add(f"memory_{i}", part.shape, dtype) for i, part in enumerate(start.memory)]
            if self.accumulate_steps:
                kept["window"] = self._add("window", (), "int32")
                kept["loss_sum"], kept["gradient_sum"] = (
                    self._add("loss_sum", (), dtype),
                    self._add("gradient_sum", (size,), dtype),
                )
            self.__dict__["kept"] = kept
            self.index(variables)
            noise.check_names([] if self.is_followed else map(_keras.path_of, variables), self.name)
            if self.waiting:
                state.settle(self)

    def check_size(self, size) -> None:
        """Refuse a model that is too large."""

    def _add(self, name, shape, dtype):
        variable = self.add_variable(tuple(shape), dtype=dtype, aggregation="only_first_replica", name=name)
        self.named[id(variable)] = "search", name
        return variable

    def _checked(self, variables) -> list:
        if not variables:
            checks.refuse("variables", "at least one: the model has no trainable weights", variables)
        dtypes = sorted({_keras.dtype_of(variable) for variable in variables})
        if dtypes not in (["float32"], ["float64"]):
            checks.refuse("variables", f"all of float32, or all of float64, for {type(self).__name__}", dtypes)
        if bound := [_keras.path_of(v) for v in variables if getattr(v, "constraint", None) is not None]:
            allowed = f"without constraints for {type(self).__name__}, which would not go where the search says"
            checks.refuse("variables", allowed, bound)
        return variables

    @property
    def parts(self) -> list:
        """The variables as a file holds them."""
        return self.variables

    # The step

    def scale_loss(self, loss):
        """Take note of the loss. Keras calls it in each step, before it differentiates."""
        self.__dict__["found_loss"] = ops.stop_gradient(loss)
        return loss

    @backends.as_written
    def apply(self, grads, trainable_variables=None, loss=None):
        """Take one evaluation: the gradient, and the loss, at the weights that the variables have.

        Args:
            grads: A gradient for each variable; None counts as zero.
            trainable_variables: The variables; by default all that the optimizer was built with.
            loss: The loss, for a training loop that does not call `scale_loss`. Without any, gradients alone decide.
        """
        loss, self.__dict__["found_loss"] = (self.found_loss if loss is None else loss), None
        variables = self.trained if trainable_variables is None else list(trainable_variables)
        grads = checks.listed("grads", grads)
        if not grads and not variables:
            return
        gradients.check(grads, variables)
        with backends.unrecorded():
            self.build(variables)
            if list(map(id, variables)) != list(map(id, self.trained)):
                allowed = "all that the optimizer was built with, in their order, since a search moves them together "
                allowed += "(if other weights are trainable now, compile with a new optimizer)"
                checks.refuse("trainable_variables", allowed, [_keras.path_of(variable) for variable in variables])
            if loss is None and not self.is_blind:
                self.__dict__["is_blind"] = True
                if self.line_search == "wolfe":
                    text = "is not told the loss and goes by gradients alone. In a loop of your own, call "
                    warnings.warn(f"{self.name} {text}`apply(gradients, variables, loss=loss)`.", stacklevel=2)
            elif loss is not None:
                self.__dict__["is_blind"] = False
            self._take(loss, self._flat([
                ops.zeros(v.shape, v.dtype) if g is None else g for g, v in zip(grads, variables, strict=True)
            ]))  # fmt: skip

    def _flat(self, tensors):
        return ops.concatenate([ops.reshape(backends.read(t, self.kept["point"].dtype), (-1,)) for t in tensors])

    def _take(self, loss, gradient) -> None:
        dtype = self.kept["point"].dtype
        loss = ops.cast(0.0 if loss is None else loss, dtype)
        if self.accumulate_steps is None:
            self._advance(loss, gradient)
            return
        window, loss_sum, gradient_sum = (self.kept[name] for name in _WINDOW)
        window.assign_add(1)
        loss_sum.assign_add(loss)
        gradient_sum.assign_add(gradient)

        def close():
            count = ops.cast(self.accumulate_steps, dtype)
            self._advance(backends.read(loss_sum, dtype) / count, backends.read(gradient_sum, dtype) / count)
            self.empty_window()

        backends.when(backends.read(window, "int32") >= self.accumulate_steps, close, [*self.trained, *self.variables])

    def _advance(self, loss, gradient) -> None:
        x, m = self._flat(self.trained), space_of(gradient)
        before, loss = self._state(m), m.number(loss)
        rules = self.rules(self.is_blind)
        over = machine.is_over(before, x, loss, gradient, rules, m)

        def go():
            after = machine.advanced(self._state(m), x, loss, gradient, self.method(), rules, m)
            self._keep(after)
            self._show(after.trial)

        backends.when(m.no(over), go, [*self.trained, *self.variables])

    def _state(self, m) -> machine.State:
        kept = self.kept
        numbers = m.parts(kept["counts"], "int32") + m.parts(kept["numbers"], m.dtype)
        vectors = {name: backends.read(kept[name], m.dtype) for name in machine.VECTORS}
        memory = tuple(backends.read(variable, m.dtype) for variable in kept["memory"])
        return machine.State(search=search.Search(**dict(zip(search.INTEGERS + search.FLOATS, numbers, strict=True))),
                             memory=memory, **vectors)  # fmt: skip

    def _keep(self, after: machine.State) -> None:
        kept, numbers = self.kept, after.search._asdict()
        for name in machine.VECTORS:
            kept[name].assign(getattr(after, name))
        for variable, value in zip(kept["memory"], after.memory, strict=True):
            variable.assign(value)
        for name, of in (("counts", search.INTEGERS), ("numbers", search.FLOATS)):
            values = [numbers[field] for field in of]
            kept[name].assign(np.array(values) if isinstance(values[0], (int, float)) else ops.stack(values))
        self.iterations.assign(ops.cast(numbers["iterations"], self.iterations.dtype))

    def show(self, which: str) -> None:
        """Put the `"point"` that was accepted last into the variables, or the `"trial"` that is evaluated next."""
        if self.built and not _keras.is_away(self.iterations) and self._number("evaluations"):
            self._show(backends.read(self.kept[which], self.kept[which].dtype))

    def is_at(self, which: str) -> bool:
        """Whether the variables are at the `"point"` that was accepted last, or at the `"trial"`."""
        if not self.built or not self.evaluations:
            return False
        return bool(ops.all(self._flat(self.trained) == backends.read(self.kept[which], self.kept[which].dtype)))

    def finalize_variable_values(self, var_list):
        """Put the best point into the model, and say if there is none. Keras calls it when `fit` ends."""
        if not self.built or _keras.is_away(self.iterations):  # not to hide an error on its way through JAX's `fit`
            return
        self.show("point")
        self.empty_window()
        self._warn()

    def follow(self) -> None:
        """Be ready for a `fit` with a monitor, which knows the model and warns of what is in it."""
        self.__dict__["is_followed"] = True
        self.empty_window()

    def empty_window(self) -> None:
        """Forget the batches of an evaluation that is not complete."""
        for name in _WINDOW:
            if self.built and name in self.kept:
                self.kept[name].assign(ops.zeros(self.kept[name].shape, self.kept[name].dtype))

    def _warn(self) -> None:
        """Say at the end of `fit` what has made it fail."""
        (tried, taken), numbers = self.__dict__["told"], (self.evaluations, self._number("iterations"))
        self.__dict__["told"] = numbers
        if self.status in ("noisy", "nonfinite"):
            counts = _keras.to_numpy(self.kept["counts"]).copy()
            counts[search.INTEGERS.index("phase")] = search.RESTED
            self.kept["counts"].assign(counts)
            warnings.warn(f"{self.name} has stopped at its start: {WHY[self.status]}.", stacklevel=3)
        elif numbers[0] - tried >= MANY and numbers[1] - taken < RARELY * (numbers[0] - tried):
            steps = f"{numbers[1] - taken} steps in {numbers[0] - tried} evaluations"
            warnings.warn(
                f"{self.name} has taken {steps}: the loss is not the same at each evaluation (Dropout, batches, data "
                "that change), or it is at its precision.",
                stacklevel=3,
            )

    # What it came to

    def _number(self, name: str):
        """A number of the search, as it stands after the last step."""
        if not self.built:
            return search.Search._field_defaults[name]
        of, fields = ("counts", search.INTEGERS) if name in search.INTEGERS else ("numbers", search.FLOATS)
        return _keras.to_numpy(self.kept[of])[fields.index(name)].item()

    @property
    def status(self) -> str:
        """How it stands.

        "running"; "gradient": no entry of the gradient is above `gtol`; "loss": five steps in a row gained no more
        than `ftol`; "stuck": no step leads to a lower loss, mostly because that is at its precision; "nonfinite": the
        loss or the gradient of the first point is not finite; "noisy": the first point has two losses.
        """
        return search.STATUS[self._number("status")]

    @property
    def evaluations(self) -> int:
        """How many evaluations of loss and gradient it has been given."""
        return self._number("evaluations")

    @property
    def loss(self) -> float:
        """The loss at the point that was accepted last; NaN where the optimizer was told of gradients alone."""
        return float("nan") if self.is_blind else self._number("loss")

    @property
    def gradient_norm(self) -> float:
        """The largest entry of the gradient there."""
        return self._number("norm")

    @property
    def step_size(self) -> float:
        """The step that led there."""
        return self._number("taken")

    # Arguments and state

    def __setattr__(self, name, value):
        if self.__dict__.get("ready") and name in _NOT_FOR and value not in (None, False):
            checks.refuse(name, f"left alone with {type(self).__name__}: {_NOT_FOR[name]}", value)
        super().__setattr__(name, value)

    @property
    def learning_rate(self):
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        checks.refuse("learning_rate", f"left alone with {type(self).__name__}: {_NOT_FOR['learning_rate']}", value)

    @property
    def loss_scale_factor(self):
        """None: the loss is not scaled."""

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        if self.ready:  # a LossScaleOptimizer assigns None
            allowed = f"outside of a LossScaleOptimizer, which mixed_float16 wraps around it: {_ALONE}. Use float32"
            checks.refuse("optimizer", allowed, self)

    def get_config(self):
        return {"name": self.name, **self.arguments()}

    def save_own_variables(self, store):
        state.save(self, store)

    def load_own_variables(self, store):
        state.load(self, store)

    def __repr__(self):
        return self.shown(self.arguments(), dict(_DEFAULTS)) if self.__dict__.get("ready") else object.__repr__(self)

    def _show(self, vector) -> None:
        sizes = [int(np.prod(variable.shape)) for variable in self.trained]
        for variable, part in zip(self.trained, backends.split(vector, sizes), strict=True):
            variable.assign(ops.reshape(part, variable.shape))
