"""Which layers are random, and layers called as in training, or as in inference, whatever their caller says."""

import contextlib

import keras

from kopt._keras import generators_of, global_seeds, layers_of
from kopt._keras.stepping import stand_in


@contextlib.contextmanager
def called_with(layers, training: bool):
    """For the length of this context, each of the layers is called with this `training`.

    It is for the layers alone, not for those within them, and for each that takes `training`. Of two such contexts the
    inner one counts. What was compiled before or in the context is as it was compiled: a model's `train_function`,
    `test_function` and `predict_function` are the caller's to put aside.
    """
    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            if "training" in layer.call_signature_parameters:
                stack.callback(stand_in(layer, "call", _with(layer, training)))
        yield


def _with(layer, training):
    """The layer's `call` with this `training`."""
    call = getattr(layer.call, "as_given", layer.call)  # not the one of an outer context
    place = layer.call_signature_parameters.index("training")

    def call_with(*args, **kwargs):
        if len(args) > place:
            return call(*args[:place], training, *args[place + 1 :], **kwargs)
        return call(*args, **{**kwargs, "training": training})

    call_with.as_given = call
    return call_with


def random_layers(model) -> list:
    """The layers that regularize at random: those with a source of random numbers, but no augmentation of data.

    Keras gives layers of rate 0 no such source, but cells of recurrent layers always. Theirs is used by the layer, too.
    """
    layers = layers_of(model)
    cells = [layer for layer in layers if generators_of(layer) and _is_active(layer) and not _augments(layer)]
    known = {id(layer) for layer in cells}
    loops = [layer for layer in layers if isinstance(layer, keras.layers.RNN) and known & _ids_within(layer.cell)]
    return [*cells, *loops]


def _ids_within(cell) -> set:
    return set(map(id, layers_of(cell))) if isinstance(cell, keras.layers.Layer) else set()


def _is_active(layer) -> bool:
    rates = [getattr(layer, name) for name in ("dropout", "recurrent_dropout") if hasattr(layer, name)]
    return not rates or any(rates)


def _augments(layer) -> bool:
    """Whether Keras or a class derived from one of Keras's makes a layer one of preprocessing."""
    return any(cls.__module__.startswith("keras.src.layers.preprocessing") for cls in type(layer).__mro__)


def seeds_of(model) -> list:
    """The variables that random numbers are drawn from, also Keras's own."""
    kept = {id(variable) for variable in model.weights}
    return [*(variable for variable in model.variables if id(variable) not in kept), *global_seeds()]
