"""Fine-tuning in one call: a new head on a frozen body first, then the body, too, and less."""

from collections.abc import Iterable

import keras
import numpy as np

from kopt import _keras, checks
from kopt._keras import stepping
from kopt.callbacks.install import clear_left
from kopt.callbacks.unfreeze import StagedUnfreeze
from kopt.optimizers.layer_decay import levels_of

LISTED = "the base of the model: a layer or model in it, or a list of such"


def fine_tune(
    model,
    base,
    x=None,
    y=None,
    *,
    head_epochs: int = 3,
    epochs: int = 10,
    learning_rate: float | None = None,
    body_multiplier: float = 0.1,
    levels: int | None = None,
    ramp_epochs: float | None = None,
    reinit: bool | str = False,
    engine: str = "multiplier",
    freeze_bn: bool = True,
    callbacks=None,
    **fit_arguments,
):
    """Train a network whose body was trained before: its head alone at first, then the body with a small rate, too.

    All in one `fit`, with the optimizer, loss and metrics of `compile`: one optimizer state, one schedule, one
    `History`. The head, which is all that is not in `base`, learns at the full rate throughout; the body rests for
    `head_epochs` and then takes `body_multiplier` of each update. Batch normalization of the body stays in inference.

    With more data, train more of the network: with a handful of labels a class only the head (`body_multiplier=0`),
    with more the top of the body (`levels=1`, 2, ...), then all of it (the default).

    When to use it: a body that was trained on something like the task. Where it was not, training from scratch can be
    better: compare, as `recipes/transfer_digits.py` does. A head that is good already needs no `head_epochs`.

    Args:
        model: A compiled model, with its weights.
        base: The body: a layer or model in it, or a list of such.
        x: The inputs, or any data that `fit` takes.
        y: The targets.
        head_epochs: How many epochs the head learns alone. 0: none.
        epochs: How many epochs come after them.
        learning_rate: The rate of the head, which the optimizer keeps afterwards; by default it stays what it is, and
            may be a schedule.
        body_multiplier: How much of each update the body takes then.
        levels: How many levels of the body are trained, from the top: layers with weights, a normalization together
            with the layer before it, as for `kopt.layer_decay`. None: all.
        ramp_epochs: Let the body begin slowly, in a straight line over so many epochs.
        reinit: Draw the weights of the head anew before (`kopt.reinit_head`); for a model that was just compiled.
            "zeros": with zeros in its last layer, the better choice with few labels: what was drawn at random stays in
            the answer wherever the labels say nothing.
        engine: "multiplier", or "trainable", which saves time while the body rests; see
            `kopt.callbacks.StagedUnfreeze`.
        freeze_bn: Keep batch normalization of the body in inference.
        callbacks: Others, as for `fit`.
        **fit_arguments: Others of `fit`: `batch_size`, `validation_data`, `verbose`, `class_weight`, ...

    Returns:
        The `History` of `fit`, with `multiplier/<name>` of the body.

    Example:
        >>> import keras, kopt, numpy as np
        >>> base = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)], name="base")
        >>> model = keras.Sequential([base, keras.layers.Dense(1)])
        >>> model.compile("adam", loss="mse")
        >>> history = kopt.fine_tune(model, base, np.ones((4, 2)), np.ones(4), head_epochs=1, epochs=2, verbose=0)
        >>> history.history["multiplier/base"]
        [0.0, 0.1, 0.1]

    Reference:
        Yosinski, Clune, Bengio & Lipson, How transferable are features in deep neural networks?, 2014,
        https://arxiv.org/abs/1411.1792.
    """
    bases = _bases(model, base)
    clear_left(model)
    if not any(one.trainable_variables for one in bases):
        allowed = "of trainable weights: set `trainable = True` and compile; it is the callback that freezes"
        checks.refuse("base", allowed, base)
    if not getattr(model, "compiled", False) or getattr(model, "optimizer", None) is None:
        checks.refuse("model", "a compiled model, with an optimizer", model)
    head_epochs, epochs = checks.count(0)("head_epochs", head_epochs), checks.count(1)("epochs", epochs)
    learning_rate = checks.optional(checks.positive)("learning_rate", learning_rate)
    body_multiplier = checks.nonnegative("body_multiplier", body_multiplier)
    ramp_epochs = checks.optional(checks.epochs)("ramp_epochs", ramp_epochs)
    if ramp_epochs is not None and not head_epochs:
        checks.refuse("ramp_epochs", "None without `head_epochs`: the ramp leads out of the rest", ramp_epochs)
    if "initial_epoch" in fit_arguments:
        checks.refuse("initial_epoch", "left out: to go on, `fit` with StagedUnfreeze", fit_arguments["initial_epoch"])
    reinit = checks.either("zeros", checks.boolean)("reinit", reinit)
    trained = bases
    if levels is not None:
        found = levels_of(bases)
        levels = checks.count(1)("levels", levels)
        if levels > len(found):
            checks.refuse("levels", f"{len(found)} at most, as many as the base has", levels)
        trained = [layer for level in found[-levels:] for layer in level]
    stages = [{"epoch": 0, "multipliers": [(bases, 0.0)]}]
    later = {"epoch": head_epochs, "multipliers": [(trained, body_multiplier)], "ramp_epochs": ramp_epochs}
    if head_epochs:
        stages.append(later)
    elif levels is None:
        stages = [later]
    else:
        stages = [{**later, "multipliers": [(trained, body_multiplier), (bases, 0.0)]}]
    staged = StagedUnfreeze(stages, engine=engine, freeze_bn=freeze_bn)
    callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks] if callbacks else []
    if learning_rate is not None:
        _check_rate(model.optimizer, learning_rate)
    if reinit:
        if any(int(_keras.to_numpy(one.iterations)) for one in stepping.updating(model.optimizer)):
            allowed = "False for an optimizer that has run, with moments of the old head: compile the model anew"
            checks.refuse("reinit", allowed, True)
        reinit_head(model, base, zeros=reinit == "zeros")
    if learning_rate is not None:
        model.optimizer.learning_rate = learning_rate
    callbacks = [*callbacks, staged]
    return model.fit(x, y, epochs=head_epochs + epochs, callbacks=callbacks, **fit_arguments)


def reinit_head(model, base, zeros: bool = False) -> None:
    """Draw the weights of a model anew that are not in its base, each by the initializer of its layer.

    A head that was trained for other classes is worse than a random one. Compile afterwards: an optimizer that was in
    use keeps its moments of the old weights.

    Args:
        model: The model, with its weights.
        base: The body, which stays: a layer or model in it, or a list of such.
        zeros: Let the last layer with a kernel, of each output, begin with zeros, as Big Transfer has it: the first
            gradients then do not depend on what was drawn, and nothing of them goes into the body. Not for a head that
            multiplies two layers, such as two towers: neither would learn.

    Example:
        >>> import keras, kopt
        >>> base = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        >>> model = keras.Sequential([base, keras.layers.Dense(1, name="head")])
        >>> kopt.reinit_head(model, base, zeros=True)
        >>> model.get_layer("head").get_weights()[0].ravel().tolist()
        [0.0, 0.0, 0.0]

    Reference:
        Kolesnikov et al., Big Transfer (BiT): General visual representation learning, 2020,
        https://arxiv.org/abs/1912.11370, for the zeros.
    """
    bases = _bases(model, base)
    clear_left(model)
    if not stepping.has_all_weights(model):
        checks.refuse("model", "built: call it once, or give it an `Input`", model.name)
    zeros = checks.boolean("zeros", zeros)
    body = {id(weight) for one in bases for weight in one.weights}
    trained = {id(variable) for variable in model.trainable_variables} - body
    head = [layer for layer in _keras.layers_of(model) if trained & {id(w) for w in _keras.own_weights(layer)}]
    if not head:
        checks.refuse("base", "a part of the model, so that there is a head, which is trainable", base)
    last = _last(model, head) if zeros else []
    drawn = [_drawn(layer) for layer in head]
    for layer, arrays in zip(head, drawn, strict=True):
        for weight, array in zip(_keras.own_weights(layer), arrays, strict=True):
            if id(weight) not in body:
                weight.assign(np.zeros_like(array) if layer in last else array)


def _drawn(layer) -> list:
    """What the initializers of a layer draw for its own weights."""
    own = _keras.own_weights(layer)
    try:
        drawn = [_keras.to_numpy(weight) for weight in _keras.own_weights(_keras.made_anew(layer))]
    except Exception as error:
        raise ValueError(f"{_unmade(layer)} Its config makes none: {error}") from error
    if [array.shape for array in drawn] != [tuple(weight.shape) for weight in own]:
        raise ValueError(f"{_unmade(layer)} Its config, and `get_build_config`, make other weights.")
    return drawn


def _unmade(layer) -> str:
    return f"`reinit_head` draws weights by making each layer anew, which it cannot do with {layer.name!r}."


def _last(model, head) -> list:
    """The last layers of the head with a kernel, one for each output."""
    passed = keras.layers.BatchNormalization, keras.layers.LayerNormalization, keras.layers.PReLU

    def is_sought(layer):
        is_matrix = any(len(weight.shape) > 1 for weight in _keras.own_weights(layer))
        return is_matrix and not isinstance(layer, passed) and any(layer is one for one in head)

    outputs = _keras.outputs_of(model)
    if outputs is None:
        found = [layer for layer in head if is_sought(layer)]
        if len(found) != 1:
            allowed = "False for a model that has no graph of layers, where they are several in the head"
            checks.refuse("zeros", allowed, True)
    else:
        found = [layer for output in keras.tree.flatten(outputs) for layer in _keras.last_before(output, is_sought)]
    unfit = [layer for layer in found if not hasattr(layer, "kernel") or hasattr(layer, "recurrent_kernel")]
    if unfit or not found:
        names = f": {unfit[0].name!r} has another" if unfit else ""
        checks.refuse("zeros", f"False where the head does not end with a layer with a `kernel`{names}", True)
    return found


def _check_rate(optimizer, learning_rate) -> None:
    rates = [stepping.rate_source(one) for one in stepping.nested(optimizer) if not stepping.within(one)]
    if len(rates) > 1 or not isinstance(rates[0], keras.Variable):
        allowed = "None where the optimizer has a schedule, or is several optimizers with a rate each"
        checks.refuse("learning_rate", allowed, learning_rate)


def _bases(model, base) -> list:
    """The layers and models that are the base."""
    if not isinstance(model, keras.Model):
        checks.refuse("model", "a keras.Model", model)
    bases = list(base) if isinstance(base, (list, tuple)) else [base]
    within = {id(layer) for layer in _keras.layers_of(model)} - {id(model)}
    if not bases or any(id(one) not in within for one in bases):
        checks.refuse("base", LISTED, base)
    return [one for one in bases if one.weights]  # no `InputLayer`, activation, pooling
