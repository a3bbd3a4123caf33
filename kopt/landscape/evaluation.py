"""The loss of a model with one set of weights after the other."""

import contextlib
import functools

import keras
import numpy as np

from kopt import _keras, backends, checks, weights
from kopt._keras import passes, stepping
from kopt.batch_norm import Statistics
from kopt.batches import batches, check_batches
from kopt.objective import check_trainable


class Evaluation:
    """What `model.evaluate` gives, for whatever weights are put into the model.

    The data are read once, and kept as the batches that Keras makes of them: an iterator costs more than a small model.

    Args:
        model: A model that is built, and compiled with a loss.
        given: The data, as `(x, y, sample_weight)`.
        batch_size: How arrays are split.
        update_bn: Whether the statistics of batch normalization are estimated anew, or on which other data.
    """

    def __init__(self, model, given, batch_size, update_bn):
        _check_model(model)
        self.model, self.given, self.batch_size = model, given, checks.count(1)("batch_size", batch_size)
        _check_data(model, *given)
        is_data = not isinstance(update_bn, (bool, np.bool_))
        if is_data:
            check_batches("update_bn", update_bn)
        _keras.fetch_state(model)
        self.variables = [variable for variable in model.weights if is_float(variable)]
        self.statistics = Statistics(model) if is_data or update_bn else None
        if self.statistics is not None and not self.statistics.layers:
            self.statistics = None
        self.batches = [tuple(map(_kept, batch)) for batch in _read(*given, self.batch_size)]
        if not self.batches:
            checks.refuse("x", "not empty", given[0])
        if model.loss is not None and any(y is None for _, y, _ in self.batches):
            checks.refuse("x", "with the targets that the loss compares with", type(given[0]).__name__)
        self.inputs = self.batches
        if is_data and self.statistics is not None:
            self.inputs = [(x,) for x in batches(update_bn, self.batch_size)]

    def __call__(self, arrays) -> dict:
        """The loss and the metrics, by name, if the float variables of the model hold these arrays."""
        weights.assign(self.variables, arrays)
        if self.statistics is not None:
            found = self.statistics.estimate(iter(self.inputs), self.batch_size)
            weights.assign(self.statistics.variables, found)
        found = self._evaluated()
        return found if "loss" in found else checks.refuse("model", "one whose `evaluate` gives a loss", list(found))

    @functools.cached_property
    def is_apart(self) -> bool:
        """Whether batches one by one come to something else than `evaluate`.

        To several replicas each would go as a whole. And the losses of several outputs are means over batches that
        count alike on TensorFlow, if it has traced batches of several sizes.
        """
        replicas = getattr(getattr(self.model, "distribute_strategy", None), "num_replicas_in_sync", 1)
        sizes = {keras.tree.flatten(x)[0].shape[0] for x, _, _ in self.batches}
        outputs = len(keras.tree.flatten(self.batches[0][1]))
        return replicas > 1 or (backends.BACKEND == "tensorflow" and len(sizes) > 1 and outputs > 1)

    def _evaluated(self) -> dict:
        model = self.model
        if self.is_apart:
            x, y, sample_weight = self.given
            how = {"sample_weight": sample_weight, "batch_size": self.batch_size, "verbose": 0, "return_dict": True}
            return model.evaluate(x, y, **how)
        model.reset_metrics()
        put_back = stepping.stand_in(model, "reset_metrics", lambda: None)  # which comes with every batch
        try:
            for batch in self.batches:
                found = model.test_on_batch(*batch, return_dict=True)
        finally:
            put_back()
        return found


@contextlib.contextmanager
def as_it_was(model):
    """A context after which a model has its weights, statistics, random states and metrics, whatever is raised."""
    kept = [*_keras.variables_of(model), *model.metrics_variables, *_keras.global_seeds()]
    random_state = backends.random_state()
    with weights.keeping(model, kept), contextlib.ExitStack() as stack:
        if not getattr(getattr(model, "optimizer", None), "built", True):
            stack.callback(stepping.stand_in(model, "optimizer", None))  # Keras would build it
        stack.callback(model.reset_metrics)  # also those that are built within
        stack.callback(backends.set_random_state, random_state)
        yield


def _check_model(model) -> None:
    check_trainable(model)
    owned = (getattr(type(model), name) is not getattr(keras.Model, name) for name in ("compute_loss", "test_step"))
    if not model.compiled or (model.loss is None and not any(owned)):
        checks.refuse("model", "compiled with a loss", model.name)


def is_float(variable) -> bool:
    return "float" in _keras.dtype_of(variable)


def _check_data(model, x, y, sample_weight) -> None:
    is_whole = all(hasattr(part, "shape") for part in keras.tree.flatten(x))
    if not is_whole:
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                checks.refuse(name, "left out, unless `x` is an array or a structure of them", value)
        check_batches("x", x)
    elif y is None and model.loss is not None:
        checks.refuse("y", "the targets that the loss compares with", y)
    else:
        check_batches("x", tuple(part for part in (x, y, sample_weight) if part is not None), y is not None)


def _read(x, y, sample_weight, batch_size):
    """The batches that `evaluate` reads, as `(x, y, sample_weight)`."""
    has_batches = not all(hasattr(part, "shape") for part in keras.tree.flatten(x))
    adapter = passes.adapted(x) if has_batches else passes.adapted(x, y, sample_weight, batch_size)
    adapter.on_epoch_begin()
    yield from map(keras.utils.unpack_x_y_sample_weight, adapter.get_numpy_iterator())
    adapter.on_epoch_end()


def _kept(part):
    """Numbers as tensors, where the model is; anything else as it is."""

    def tensor(array):
        is_number = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
        return keras.ops.convert_to_tensor(array) if is_number else array

    return keras.tree.map_structure(tensor, part)
