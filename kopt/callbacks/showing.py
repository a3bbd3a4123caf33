"""Other weights in a model for a while, with the statistics of batch normalization that belong to them."""

import contextlib
import functools

from kopt import _keras, weights
from kopt._keras import stepping
from kopt.batch_norm import Statistics


def around_validation(callback, model, context):
    """Let the `fit` that a callback is in validate within `context()`; what is returned takes it back."""
    evaluate = model.evaluate

    def call(*args, **kwargs):
        listed = getattr(kwargs.get("callbacks"), "callbacks", ())  # `fit` gives its validation its own list
        with context() if any(one is callback for one in listed) else contextlib.nullcontext():
            return evaluate(*args, **kwargs)

    return stepping.stand_in(model, "evaluate", call)


def around_keeping(keeper, context):
    """Let a callback that keeps or saves weights do it within `context()`; what is returned takes it back."""
    name = _keras.keeping_method(keeper)
    original = getattr(keeper, name)

    def call(*args, **kwargs):
        with context():
            return original(*args, **kwargs)

    return stepping.stand_in(keeper, name, call)


class Showing:
    """Puts weights into a model and takes them out again.

    Args:
        model: The model.
        update_bn: Data for the statistics of batch normalization, or None to leave them as they are.
    """

    def __init__(self, model, update_bn=None):
        self.model, self.update_bn = model, update_bn
        self.own = None  # what the model has by itself, while it has something else
        self.known = None  # the last statistics that were estimated, and for what

    @functools.cached_property
    def statistics(self):
        return Statistics(self.model)

    def changed(self, variables) -> list:
        """All variables that change when these do."""
        return [*variables, *(self.statistics.variables if self.update_bn is not None else ())]

    @contextlib.contextmanager
    def holding(self, variables, values, key=None):
        """A context in which the variables have these values; there may be values for all that changes with them.

        Otherwise the statistics are estimated, or known already, if they were estimated for the same `key`.
        """
        outermost, changed = self.own is None, self.changed(variables)
        put_back = stepping.stand_in(self.model, "fit", self._refuse)
        try:
            with weights.keeping(self.model, changed) as own:
                self.own = own if outermost else self.own
                weights.assign(changed[: len(values)], values)
                if len(values) < len(changed):
                    weights.assign(self.statistics.variables, self._estimated(key))
                yield
        finally:
            put_back()
            self.own = None if outermost else self.own

    def _refuse(self, *args, **kwargs):
        raise RuntimeError("`fit` cannot run while other weights are in the model: what it learns would go with them")

    def _estimated(self, key) -> list:
        """The statistics for the weights that the model has."""
        if key is None:
            return self.statistics.estimate(self.update_bn)
        if self.known is None or self.known[0] != key:
            self.known = key, self.statistics.estimate(self.update_bn)
        return self.known[1]
