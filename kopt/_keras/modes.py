"""Layers that are called as in training, or as in inference, whatever their caller says."""

import contextlib

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
