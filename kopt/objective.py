"""The loss of a model as a function of all its trainable weights in one vector, and what was compiled of it."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from kopt import _keras, backends, checks, derivatives


def objective_of(model) -> "Objective":
    """The objective of a model in training: that of the last call, with its programs, unless the model has changed."""
    new, kept = Objective(model, training=True), vars(model).get("_kopt_objective")
    if kept is None or kept.of != new.of:
        vars(model)["_kopt_objective"] = kept = new  # past Keras, which would track it
    return kept


def rows_of(x, y=None, sample_weight=None) -> int:
    """How many rows there are, in arrays in any structure; what is none, or has others, is refused by name."""
    rows = None
    for name, given in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        parts = [part for part in keras.tree.flatten(given) if part is not None]
        if not all(getattr(part, "shape", ()) for part in parts) or (name == "x" and not parts):
            allowed = "an array with rows, or a structure of them: all data at once (for batches, use `fit`)"
            checks.refuse(name, allowed, type(given).__name__)
        for part in parts:
            rows = part.shape[0] if rows is None else rows
            if part.shape[0] != rows or rows == 0:
                checks.refuse(name, f"of as many rows as `x`, and at least one: {rows} rows", tuple(part.shape))
    return rows


def check_trainable(model) -> None:
    """Refuse what is no model, or has no weights that could be moved."""
    if not isinstance(model, keras.Model):
        checks.refuse("model", "a keras.Model", model)
    if not model.built or not model.trainable_variables:
        checks.refuse("model", "built, with trainable weights", model.name)


class Look(NamedTuple):
    """What one evaluation of a loss has shown."""

    loss: float
    drawing: list[str]  # the layers that have drawn at random
    has_added: bool  # whether layers have added something to the loss


class Objective:
    """The loss that a model was compiled with, with its penalties, as a function of a vector and data.

    Args:
        model: A model that is built and compiled with a loss.
        training: Whether layers act as in training.
    """

    def __init__(self, model, training: bool):
        check_trainable(model)
        if not model.compiled and type(model).compute_loss is keras.Model.compute_loss:
            checks.refuse("model", "compiled with a loss, or one with a `compute_loss` of its own", model.name)
        _keras.fetch_state(model)
        self.model, self.training, self.variables = model, training, list(model.trainable_variables)
        dtypes = sorted({_keras.dtype_of(variable) for variable in self.variables})
        if dtypes not in (["float32"], ["float64"]):
            checks.refuse("model", "with weights all of float32, or all of float64", dtypes)
        self.dtype, self.shapes = dtypes[0], [tuple(variable.shape) for variable in self.variables]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.others = list(model.non_trainable_variables) if backends.BACKEND == "jax" else []
        self.programs: dict = {}
        layers = [(id(layer), layer.trainable) for layer in _keras.layers_of(model)]
        self.of = [_keras.compilation_of(model), self.dtype, list(map(id, self.variables)), layers]

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(self.sizes)

    def vector(self):
        """The weights that the model has."""
        return ops.concatenate([ops.reshape(backends.detached(v), (-1,)) for v in self.variables])

    def show(self, vector) -> None:
        """Give the model these weights."""
        for variable, value in zip(self.variables, self.split(vector), strict=True):
            variable.assign(value)

    def split(self, vector) -> list:
        parts = backends.split(vector, self.sizes)
        return [ops.reshape(part, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def program(self, key, make):
        """What was compiled under a name, or is now."""
        if key not in self.programs:
            self.programs[key] = make()
        return self.programs[key]

    def tensors(self, x, y=None, sample_weight=None) -> tuple:
        """Data as tensors of one batch; floats of NumPy in the dtype of the weights, as `fit` has them.

        Besides, the values of the other variables, which a function that JAX has compiled does not look up.
        """

        def tensor(part):
            if part is None or ops.is_tensor(part):
                return part
            part = np.asarray(part)
            return ops.convert_to_tensor(part, self.dtype if part.dtype.kind == "f" else None)

        return *keras.tree.map_structure(tensor, (x, y, sample_weight)), list(map(backends.detached, self.others))

    def _scope(self, vector, data):
        pairs = list(zip(self.variables, self.split(vector), strict=True))
        pairs += list(zip(self.others, data[-1], strict=True))
        return keras.StatelessScope(pairs, collect_losses=True, initialize_variables=False)

    def _called(self, x):
        return self.model(x, training=self.training) if _keras.takes_training(self.model) else self.model(x)

    def predicted(self, vector, data):
        """What the model makes of a batch with these weights."""
        with self._scope(vector, data):
            return self._called(data[0])

    def loss(self, vector, data):
        """The loss of one batch, with the penalties."""
        with self._scope(vector, data):
            return self._computed(data)

    def _computed(self, data):
        x, y, sample_weight, _ = data
        loss = _keras.compute_loss(self.model, x, y, self._called(x), sample_weight, self.training)
        return ops.cast(loss, self.dtype)

    def looked_at(self, data) -> "Look":
        """The loss of the weights that the model has, not compiled, and what it is made of."""
        with backends.unrecorded(), self._scope(self.vector(), data) as scope:
            loss = self._computed(data)

        def has_drawn(generator):
            now = scope.get_current_value(generator.state)
            return now is not None and not np.array_equal(*map(ops.convert_to_numpy, (now, generator.state.value)))

        layers = _keras.layers_of(self.model)
        drawing = [layer.name for layer in layers if any(map(has_drawn, _keras.generators_of(layer)))]
        return Look(float(ops.convert_to_numpy(loss)), drawing, bool(scope.losses))

    def value_and_gradient(self, vector, data):
        return derivatives.value_and_gradient(lambda w: self.loss(w, data))(vector)

    def hessian_product(self, vector, direction, data):
        return derivatives.hessian_product(lambda w: self.loss(w, data))(vector, direction)

    def hessian(self, vector, data):
        return derivatives.hessian(lambda w: self.loss(w, data))(vector)
