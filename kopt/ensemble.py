"""Several models as one."""

import copy
import os

import keras
import numpy as np
from keras import ops

from kopt import _keras, checks, scores, weights

CATEGORICAL = "categoricalcrossentropy", "sparsecategoricalcrossentropy", "categoricalfocalcrossentropy"
BINARY = "binarycrossentropy", "binaryfocalcrossentropy"
OF_NUMBERS = (
    *("meansquarederror", "meanabsoluteerror", "meanabsolutepercentageerror", "meansquaredlogarithmicerror"),
    *("huber", "logcosh", "mse", "mae", "mape", "msle"),
)
WAYS = "probabilities", "logits", "binary_probabilities", "binary_logits", "mean"


class Way:
    """How one output of the members is combined: the mean, of what the output stands for.

    Args:
        name: One of `WAYS`.
        shape: That of the outputs of all members. Probabilities and logits of which there is one for each row are of a
            single class, yes or no.
    """

    def __init__(self, name: str, shape):
        width = shape[-1] if len(shape) > 2 else 1
        self.is_numbers = name == "mean"
        self.is_logits = name.endswith("logits")
        self.is_binary = not self.is_numbers and (name.startswith("binary") or width == 1)

    def combined(self, stacked, shares, temperature):
        """One tensor out of those of the members, `(rows, members, ...)`."""
        if keras.backend.standardize_dtype(stacked.dtype) != "float64":
            stacked = ops.cast(stacked, "float32")
        temperature = 1.0 if temperature is None else temperature
        counted = [i for i, share in enumerate(shares) if share]  # others count for nothing, not even if they are NaN
        stacked, shares = ops.take(stacked, counted, axis=1), [shares[i] for i in counted]
        shape = (1, len(shares), *[1] * (len(stacked.shape) - 2))
        share = ops.reshape(ops.convert_to_tensor(shares, stacked.dtype), shape)
        if not self.is_logits:
            mean = ops.sum(stacked * share, 1)
            return mean if temperature == 1 or self.is_numbers else self._tempered(mean, temperature)
        log_share = ops.log(share)
        if self.is_binary:  # log(p / (1 - p)) of the mean p
            yes, no = (ops.logsumexp(ops.log_sigmoid(z) + log_share, 1) for z in (stacked, -stacked))
            return (yes - no) / temperature
        return ops.logsumexp(ops.log_softmax(stacked, -1) + log_share, 1) / temperature

    def _tempered(self, p, temperature):
        logs = ops.log(ops.maximum(p, scores.LEAST))
        if self.is_binary:
            return ops.sigmoid((logs - ops.log(ops.maximum(1 - p, scores.LEAST))) / temperature)
        return ops.softmax(logs / temperature, -1)

    def judge(self, targets, shape, ignored=None):
        """Who judges this output by the true one.

        Args:
            targets: The true numbers, or the classes: their numbers, or rows of 0 and 1.
            shape: That of a prediction.
            ignored: The class that the loss ignores.
        """
        targets = np.asarray(targets)
        if self.is_numbers:
            return scores.Numbers(targets.reshape(shape))
        if self.is_binary:
            return scores.Classes(targets.reshape(shape).reshape(-1) > 0.5, 2)
        is_sparse = targets.shape != tuple(shape)
        labels = targets.reshape(shape[:-1]) if is_sparse else targets.argmax(-1)
        return scores.Classes(labels.reshape(-1), shape[-1], ignored)

    def judged(self, values, lead=0):
        """What a judge looks at: NumPy values as they are, or rows of probabilities; the first axes may be others."""
        if self.is_numbers:
            return values
        found = self.probabilities(values)
        return found.reshape(*found.shape[:lead], -1, found.shape[-1])

    def probabilities(self, values):
        """The probabilities of classes, along a last axis, that NumPy values stand for."""
        if self.is_logits and not self.is_binary:
            values = scores.softmax(values.astype("float64"))
        elif self.is_logits:
            values = 1 / (1 + np.exp(-values.astype("float64")))
        return np.stack([1 - values, values], -1) if self.is_binary else values


@_keras.register
class Ensemble(keras.Model):
    """Several models as one: it predicts the mean of what they predict.

    Probabilities are averaged as they are. Where the models give logits, the ensemble gives the logarithm of the mean
    of their probabilities, so that their loss and metrics, with which it is compiled, are right for it, too. Numbers
    are averaged; `uncertainty` has their spread. Each of several outputs is combined by itself.

    It is a `keras.Model` like any other, to predict, evaluate, save, load (after `import kopt`) and export, and runs as
    one compiled program. It holds the models themselves, as a `Sequential` holds its layers. It is not trained; train
    the models.

    When to use it: with models that are about equally good and wrong about different things.

    Attributes:
        models: The models, its members.
        shares: How much each counts; together 1.

    Args:
        models: Models, or files of such: `.keras`, or `.weights.h5` of models like the first in the list that is not
            one. They have the same inputs and outputs, but may be of different architectures.
        combine: What the outputs are: "probabilities" (of classes, along the last axis), "logits", "mean" (of numbers),
            or, where each number is the probability of a class of its own, "binary_probabilities" or "binary_logits".
            "auto" tells it from the loss and the last activation. A list or dict says it for several outputs.
        weights: How much each model counts, in proportion; None: all alike.
        temperature: What the logits of the mean are divided by, for calibration, or a list of such for several outputs.
            `kopt.callbacks.SnapshotEnsemble.build(temperature="fit")` finds it.
        name: The name of the model.

    Example:
        >>> import keras, kopt, numpy as np
        >>> def trained(seed):
        ...     keras.utils.set_random_seed(seed)
        ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
        >>> models = [trained(seed) for seed in range(3)]
        >>> ensemble = kopt.Ensemble(models)
        >>> x = np.ones((2, 4))
        >>> mean = np.mean([model.predict(x, verbose=0) for model in models], axis=0)
        >>> np.allclose(ensemble.predict(x, verbose=0), mean)
        True
        >>> ensemble.members(x).shape
        (3, 2, 3)
        >>> sorted(ensemble.uncertainty(x))
        ['disagreement', 'entropy', 'mutual_information']

    Reference: Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles",
    NeurIPS 2017.
    """

    def __init__(self, models, combine="auto", weights=None, temperature=None, name: str | None = None):
        models = _loaded(models)
        super().__init__(name=checks.optional(checks.text)("name", name))
        self.models = models
        self.shares = _shares(weights, len(models))
        self.combine = resolved(combine, models[0])
        self.temperature = _temperature(temperature, self.combine)
        names = getattr(models[0], "output_names", None)
        if names:
            self.output_names = list(names)
        inputs = _keras.inputs_of(models[0])
        if inputs is None:
            self.built = True
        else:
            self(keras.tree.map_structure(lambda one: keras.Input(batch_shape=one.shape, dtype=one.dtype), inputs))
        if models[0].compiled:
            _keras.compile_like(self, models[0], but=("optimizer",))

    def call(self, inputs, training=None):
        return self.each(
            lambda way, stacked, temperature: way.combined(stacked, self.shares, temperature),
            stacked(self.models, inputs),
        )

    def each(self, function, outputs):
        """What a function makes of each output, which has two axes in front, by the way to combine it."""
        flat = keras.tree.flatten(outputs)
        names, temperatures = (
            given if isinstance(given, list) else [given] * len(flat) for given in (self.combine, self.temperature)
        )
        if len(names) != len(flat):
            checks.refuse("combine", f"one for each of the {len(flat)} outputs", self.combine)
        ways = [Way(name, one.shape) for name, one in zip(names, flat, strict=True)]
        made = [function(*one) for one in zip(ways, flat, temperatures, strict=True)]
        return made[0] if flat[0] is outputs else keras.tree.pack_sequence_as(outputs, made)

    def side_by_side(self):
        """A model that gives what each model predicts, `(rows, models, ...)`."""
        if "_apart" not in vars(self):
            made = Apart(self.models, self.run_eagerly)
            vars(self)["_apart"] = lambda: made  # by itself it would be a part of this model
        return vars(self)["_apart"]()

    def members(self, x, batch_size: int | None = None, verbose=0):
        """What each model predicts, with the models along the first axis.

        Args:
            x: As for `predict`, and the others, too.
            batch_size: How arrays are split.
            verbose: Whether to show how far it is.
        """
        found = self.side_by_side().predict(x, batch_size=batch_size, verbose=verbose)
        return keras.tree.map_structure(lambda one: np.swapaxes(one, 0, 1), found)

    def uncertainty(self, x, batch_size: int | None = None, verbose=0) -> dict:
        """How unsure the prediction for each row is, as arrays by name; of several outputs each has its own.

        Of classes: `entropy` of the prediction, in nats. `mutual_information`: how much of it is there because the
        models differ: the entropy of the mean of their probabilities less the mean of their entropies. `disagreement`:
        the share of the models that name another class than the prediction.
        Of numbers: `std`, the standard deviation of what the models predict.

        Args:
            x: As for `predict`, and the others, too.
            batch_size: How arrays are split.
            verbose: Whether to show how far it is.
        """
        return self.each(self._uncertainty, self.members(x, batch_size, verbose))

    def _uncertainty(self, way, values, temperature):
        shares = np.array(self.shares)
        if way.is_numbers:
            mean = np.tensordot(shares, values, 1)
            return {"std": np.sqrt(np.tensordot(shares, np.square(values - mean), 1))}
        p = way.probabilities(values)
        mean = np.tensordot(shares, p, 1)
        differs = p.argmax(-1) != mean.argmax(-1)
        within = np.tensordot(shares, scores.entropy(p), 1)
        return {
            "entropy": scores.entropy(mean if temperature is None else scores.tempered(mean, temperature)),
            "mutual_information": np.maximum(scores.entropy(mean) - within, 0),
            "disagreement": np.tensordot(shares, differs.astype("float64"), 1),
        }

    @property
    def losses(self):
        """The penalties of the models, of which the mean counts."""
        if given := _keras.given_losses(self):
            return given
        return [share * one for model, share in zip(self.models, self.shares, strict=True) for one in model.losses]

    # What is not trained

    @property
    def trainable_variables(self):
        return []

    @property
    def non_trainable_variables(self):
        return self.variables

    trainable_weights = trainable_variables
    non_trainable_weights = non_trainable_variables

    def fit(self, *args, **kwargs):
        raise RuntimeError("An Ensemble is not trained: train its `models`, each by itself")

    # Files, without the optimizers of the models

    def save(self, filepath, **kwargs):
        with _keras.without_optimizers(self.models):
            super().save(filepath, **kwargs)

    def save_weights(self, filepath, **kwargs):
        with _keras.without_optimizers(self.models):
            super().save_weights(filepath, **kwargs)

    def load_weights(self, filepath, **kwargs):
        with _keras.without_optimizers(self.models):
            super().load_weights(filepath, **kwargs)

    def get_config(self):
        made = [keras.saving.serialize_keras_object(model) for model in self.models]
        for one in made:
            one.pop("compile_config", None)  # which would make each an optimizer
        apart = [one for i, one in enumerate(made) if one not in made[:i]]
        return {
            "models": {"configs": apart, "places": [apart.index(one) for one in made]},
            "combine": self.combine,
            "weights": self.shares,
            "temperature": self.temperature,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config):
        configs, places = config["models"]["configs"], config["models"]["places"]
        own = [copy.deepcopy(configs[place]) for place in places]  # Keras takes apart what it is given
        models = [keras.saving.deserialize_keras_object(one) for one in own]
        return cls(**{**config, "models": models})


class Apart(keras.Model):
    """What several models predict, side by side."""

    def __init__(self, models, run_eagerly=False):
        super().__init__()
        self.models = models
        self.built = True
        self.run_eagerly = run_eagerly

    def call(self, inputs):
        return stacked(self.models, inputs)


def stacked(models, inputs):
    """The outputs of models, which lie along the second axis."""
    outputs = [model(inputs, training=False) for model in models]
    return keras.tree.map_structure(lambda *parts: ops.stack(parts, 1), *outputs)


def _loaded(models) -> list:
    allowed = "a list of one or more models, each another, or files of such"
    if not isinstance(models, (list, tuple)) or not models:
        checks.refuse("models", allowed, models)
    if any(not isinstance(one, (keras.Model, str, os.PathLike)) for one in models):
        checks.refuse("models", allowed, models)
    files = [None if isinstance(one, keras.Model) else checks.path("models", one) for one in models]
    if missing := [file for file in files if file and not os.path.isfile(file)]:
        checks.refuse("models", "files that there are", missing)
    if wrong := [file for file in files if file and not file.endswith((".keras", ".weights.h5"))]:
        checks.refuse("models", "`.keras` or `.weights.h5` files", wrong)
    found = [
        one if file is None else _keras.loaded(file) if file.endswith(".keras") else None
        for one, file in zip(models, files, strict=True)
    ]
    first = next((model for model in found if model is not None), None)
    if first is None:
        checks.refuse("models", "a list with a model or a `.keras` file beside `.weights.h5`", models)
    for i, file in enumerate(files):
        if found[i] is None:
            found[i] = weights.copy_of(first, compiled=False)
            found[i].load_weights(file)
    if len({id(model) for model in found}) < len(found):
        checks.refuse("models", "each another one: a model that is trained on is the same model", models)
    if unbuilt := [model.name for model in found if not model.built]:
        checks.refuse("models", "built, so that they have weights", unbuilt)
    forms = [_form(model) for model in found]
    for form in forms:
        if form is not None and forms[0] is not None and form != forms[0]:
            checks.refuse("models", f"of the same inputs and outputs: {forms[0]} of the first, not {form}", models)
    return found


def _form(model):
    """The shapes of its inputs and outputs, if they are known."""
    sides = _keras.inputs_of(model), _keras.outputs_of(model)
    if None in sides:
        return None
    shapes = [keras.tree.map_structure(lambda one: f"{one.dtype} {tuple(one.shape)}", side) for side in sides]
    return f"{shapes[0]} to {shapes[1]}".replace("'", "")


def _shares(given, count) -> list[float]:
    allowed = f"a number of 0 or more for each of the {count} models, and not only zeros"
    if given is None:
        return [1 / count] * count
    found = checks.several(checks.nonnegative, allowed)("weights", given)
    if len(found) != count or not sum(found):
        checks.refuse("weights", allowed, given)
    return [one / sum(found) for one in found]


def resolved(combine, model):
    """The way to combine each output, in a list; one for all where there is one or nobody can tell."""
    outputs, names = _keras.outputs_of(model), names_of(model)
    if isinstance(combine, str) and combine == "auto":
        loss = model.loss if model.compiled else None
        losses = _spread("loss", loss, names)
        made = [None] * len(losses) if outputs is None else map(_keras.made_by, keras.tree.flatten(outputs))
        found = [_told(one, layer, loss is not None) for one, layer in zip(losses, made, strict=True)]
    else:
        found = _spread("combine", check_combine("combine", combine), names)
        if None in found:
            checks.refuse("combine", f"said of each output: {', '.join(names)}", combine)
    return found if len(found) > 1 or isinstance(combine, (list, tuple, dict)) else found[0]


def check_combine(name, value):
    """Refuse what is no way to combine outputs, nor ways of several."""
    if isinstance(value, str) and value == "auto":
        return value
    several = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    if not several or any(not isinstance(one, str) or one not in WAYS for one in several):
        checks.refuse(name, f"'auto', or {', '.join(map(repr, WAYS))}, or these for several outputs", value)
    return value


def ignored_of(model) -> list:
    """The class that the loss of each output ignores, or None."""
    if not model.compiled:
        return [None] * len(names_of(model) or [1])
    return [getattr(loss, "ignore_class", None) for loss in _spread("loss", model.loss, names_of(model))]


def names_of(model) -> list[str] | None:
    """What the outputs are called, in the order in which Keras lays them side by side, if that is known."""
    outputs = _keras.outputs_of(model)
    if outputs is None:
        return None
    if isinstance(outputs, dict):
        return keras.tree.flatten({name: name for name in outputs})
    return list(getattr(model, "output_names", [model.name]))  # a Sequential names none


def _spread(name, given, names) -> list:
    """What is given for each output by name, in order, or once for all."""
    if isinstance(given, dict):
        if names is not None and (unknown := given.keys() - set(names)):
            checks.refuse(name, f"by the names of the outputs, {', '.join(names)}", sorted(unknown))
        return keras.tree.flatten(given) if names is None else [given.get(one) for one in names]
    if isinstance(given, (list, tuple)):
        if names is not None and len(given) != len(names):
            checks.refuse(name, f"one for each of the {len(names)} outputs", given)
        return list(given)
    return [given] * len(names or [1])


def _told(loss, layer, is_trained) -> str:
    """What an output is, by its loss and by the layer that makes it."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    kinds = [getattr(loss, "__name__", ""), *(one.__name__ for one in type(loss).__mro__)]
    kinds = {kind.lower().replace("_", "") for kind in kinds}
    kind = "logits" if getattr(loss, "from_logits", False) else "probabilities"
    if kinds & {*CATEGORICAL}:
        return kind
    if kinds & {*BINARY}:
        return f"binary_{kind}"
    if kinds & {*OF_NUMBERS}:
        return "mean"
    activation = "softmax" if isinstance(layer, keras.layers.Softmax) else getattr(layer, "activation", None)
    activation = getattr(activation, "__name__", activation)
    if activation in ("softmax", "sigmoid"):
        return "probabilities" if activation == "softmax" else "binary_probabilities"
    if is_trained and "ctc" not in kinds and (loss is None or str(loss.__module__).startswith("keras.")):
        return "mean"
    allowed = ", ".join(map(repr, WAYS)) + ": neither a loss nor the last activation tells what the models predict"
    return checks.refuse("combine", f"one of {allowed}", "auto")


def _temperature(given, combine):
    if given is None:
        return None
    allowed = "a finite number greater than 0 for classes, None for numbers; a list of them for several outputs"
    names = combine if isinstance(combine, list) else [combine]
    found = given if isinstance(given, (list, tuple)) else [given]
    if len(found) != len(names) or any(name == "mean" and one is not None for name, one in zip(names, found)):  # noqa: B905
        checks.refuse("temperature", allowed, given)
    found = [checks.optional(checks.positive)("temperature", one) for one in found]
    return found if isinstance(combine, list) else found[0]
