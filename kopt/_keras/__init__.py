"""The only room that reaches into Keras. Here: the bridge from Keras's optimizer to kopt's, and small helpers.

Every private name used here has a test in `tests/test_keras_internals.py` that fails when Keras changes it.
"""

import contextlib
import inspect
import sys
import tempfile
import warnings

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.saving.serialization_lib import SafeModeScope

from kopt import backends, checks

register = keras.saving.register_keras_serializable(package="kopt")


def dtype_of(variable) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def to_numpy(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def number(variable, known: float) -> float:
    """The value of a scalar variable as the shortest float that is stored as it: 0.9, not 0.8999999761581421.

    Where no value can be read, while a step is compiled or in the hands of JAX, it is the one that is `known`.
    """
    try:
        return float(str(to_numpy(variable)[()]))
    except (NotImplementedError, TypeError):
        return known


def memory(variable):
    """What a Keras variable holds, whatever the scope; anything else is a variable of the backend's own."""
    return getattr(variable, "_value", variable)


def is_stateless() -> bool:
    """Whether a `keras.StatelessScope` keeps what is assigned, so that no variable may be changed in place."""
    with keras.StatelessScope(initialize_variables=False) as scope:
        return scope.original_scope is not None


def is_away(variable) -> bool:
    """Whether a variable's value is in the hands of JAX, which holds the values itself between two steps of `fit`."""
    return getattr(variable, "_value", 0) is None


def assign(name, variable, value) -> None:
    """Assign to a variable, unless JAX would lose it."""
    if is_away(variable):
        raise ValueError(
            f"`{name}` must be assigned through `self.model.optimizer`, which fetches the state from the running step, "
            f"not through a reference from before. Received: {name}={value!r}"
        )
    variable.assign(value)


def constant(value):
    """An initializer; Keras's own rounds a number to float32 on its way to float64."""
    return lambda shape, dtype: keras.ops.full(shape, keras.ops.convert_to_tensor(value, dtype), dtype)


class OptimizerBridge(keras.optimizers.Optimizer):
    """Keras's optimizer with its private attributes under plain names.

    Of what it does in a step, the learning rate's getter and `assign` are left; `optimizers/gradients.py` is the rest.
    """

    def __init__(self, learning_rate, name=None):
        self.__dict__["named"] = {}  # id of a variable -> its slot and the path of the model's variable
        self.__dict__["stateless"] = False  # whether `stateless_apply` runs
        super().__init__(learning_rate, name=name)
        if not self.rate_is_computed() and keras.config.floatx() != checks.held_dtype():  # 16 bits would round it
            self._untrack_variable(self._learning_rate)
            self._learning_rate = self.add_scalar("learning_rate", learning_rate)

    def __setattr__(self, name, value):
        """Keras wraps and tracks what is assigned; the value of a property or an argument is not to be kept so."""
        if hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def add_scalar(self, name, value, dtype=None):
        """A scalar variable of this optimizer, saved and compiled like its slots."""
        return self.add_variable(
            shape=(),
            initializer=constant(value),
            dtype=dtype or checks.held_dtype(),
            aggregation="only_first_replica",
            name=name,
        )

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros", dtype=None):
        """Keras's method, with a dtype of its own and a record of what the variable is for."""
        native = reference_variable.value if isinstance(reference_variable, keras.Variable) else reference_variable
        path = path_of(reference_variable)
        with self.home.extended.colocate_vars_with(native) if self.home else contextlib.nullcontext():
            variable = self.add_variable(
                shape=reference_variable.shape,
                initializer=initializer,
                dtype=dtype or dtype_of(reference_variable),
                layout=getattr(reference_variable, "_layout", None),
                name=f"{path.replace('/', '_').replace(':', '_')}_{name or 'var'}",
            )
        self.named[id(variable)] = name or "var", path
        return variable

    def index(self, variables):
        """Note the variables to be trained; from then on the optimizer is built."""
        self.__dict__["_trainable_variables"] = list(variables)
        self._trainable_variables_indices.update({self._var_key(v): i for i, v in enumerate(variables)})
        self.built = True

    @property
    def trained(self) -> list:
        """The variables that the optimizer was built with."""
        return self._trainable_variables

    def index_of(self, variable) -> int | None:
        """The position of a variable in that list, if it is there."""
        return self._trainable_variables_indices.get(self._var_key(variable))

    @property
    def iterations(self):
        """The number of updates applied, however many steps were accumulated or skipped between them."""
        return self._iterations

    @property
    def home(self):
        """The `tf.distribute` strategy in whose scope the optimizer was made; None on other backends."""
        return getattr(self, "_distribution_strategy", None)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        self.__dict__["stateless"] = True
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self.__dict__["stateless"] = False

    def show_averages(self, variables, averages):
        """Let Keras's `SwapEMAWeights` find the moving averages, if it can swap them: it cannot between two dtypes."""
        if all(a is None or dtype_of(v) == dtype_of(a) for v, a in zip(variables, averages, strict=True)):
            self.__dict__["_model_variables_moving_average"] = averages

    def rate_source(self):
        """The schedule, the callable, or the variable that the learning rate comes from."""
        return self._learning_rate

    def rate_now(self):
        """The learning rate of this step."""
        return computed_rate(self, self._learning_rate) if self.rate_is_computed() else self._learning_rate

    def rate_is_computed(self) -> bool:
        return not isinstance(self._learning_rate, keras.Variable)


def computed_rate(optimizer, source):
    """The learning rate of the next update, from a schedule or a callable."""
    if not isinstance(source, keras.optimizers.schedules.LearningRateSchedule):
        return source()
    if keras.backend.backend() != "torch":
        return source(optimizer._iterations)
    with keras.device("cpu"):  # on the host, not to wait for a device
        return source(keras.ops.convert_to_tensor(backends.number(optimizer._iterations, "int32"), "int32"))


def path_of(variable) -> str:
    """The path of a Keras variable; the name of a `tf.Variable`, which has no path."""
    return getattr(variable, "path", variable.name)


def variables_of(model) -> list:
    """All that a model keeps: what it lists, and what layers hold beside that, such as the states of a stateful RNN."""
    listed = [*model.variables, *model.metrics_variables]
    known = {id(variable) for variable in listed}
    seeds = keras.random.SeedGenerator
    others = [value.state if isinstance(value, seeds) else value for value in _held(model)]
    others = {id(value): value for value in others if isinstance(value, keras.Variable)}
    return [*model.variables, *(variable for key, variable in others.items() if key not in known)]


def optimizers_of(model) -> list:
    """The optimizer that the model was compiled with, and others that it or a layer holds for a step of its own."""
    found = [model.optimizer, *(value for value in _held(model) if isinstance(value, keras.optimizers.Optimizer))]
    return list({id(optimizer): optimizer for optimizer in found}.values())


def _held(model):
    """What the attributes of a model, its layers and its losses hold."""
    losses = [loss for loss in keras.tree.flatten(model.loss) if isinstance(loss, keras.losses.Loss)]
    for owner in [*layers_of(model), *losses]:
        values, seen = list(vars(owner).values())[::-1], set()
        while values:
            value = values.pop()
            inner = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(inner, (list, tuple)):
                yield value
            elif id(value) not in seen and inner and not isinstance(inner[0], (str, int, float)):
                seen.add(id(value))
                values.extend(reversed(inner))


def global_seeds() -> list:
    """The variable of the generator that Keras draws from where no seed is given, if it was used."""
    generator = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    return [] if generator is None else [generator.state]


def make_global_seeds() -> list:
    return [seed_generator.global_seed_generator().state]


def layers_of(model) -> list:
    """The model and all layers in it, however deep."""
    return list(model._flatten_layers())


def frozen_in(model) -> list:
    """The weights that would be trained if `trainable` of no layer were False."""
    trained = {id(variable) for variable in model.trainable_variables}
    made = {id(v): v for layer in layers_of(model) for v in layer._trainable_variables}
    return [variable for key, variable in made.items() if key not in trained]


def compilation_of(model):
    """Something that is another after each `compile`."""
    return getattr(model, "_loss_tracker", None)


def generators_of(layer) -> list:
    """The sources of random numbers that a layer itself has."""
    return [value for value in vars(layer).values() if isinstance(value, keras.random.SeedGenerator)]


def fetch_state(model) -> None:
    """Let the variables of a model have their values, where JAX holds them between two steps."""
    if model is not None:
        callback = keras.callbacks.Callback()
        callback.set_model(model)
        callback.model  # noqa: B018  the property fetches them


def keeping_method(callback) -> str | None:
    """The name of the method in which a callback of Keras or KerasTuner takes the model's weights, to keep or save."""
    if isinstance(callback, keras.callbacks.EarlyStopping):
        return "on_epoch_end" if callback.restore_best_weights else None
    is_tuners = type(callback).__module__.startswith("keras_tuner.") and hasattr(callback, "_save_model")
    return "_save_model" if isinstance(callback, keras.callbacks.ModelCheckpoint) or is_tuners else None


def metric_of(callback) -> str:
    """The name of the metric that a callback of Keras or KerasTuner goes by, or nothing."""
    return str(getattr(callback, "monitor", None) or getattr(getattr(callback, "objective", None), "name", ""))


def tell_direction(callback, metric) -> None:
    """Let a callback that monitors what Keras does not know take the direction, up or down, of a metric of Keras's."""
    if getattr(callback, "mode", None) == "auto" and getattr(callback, "monitor_op", True) is None:
        monitor, callback.monitor = callback.monitor, metric
        try:
            callback._set_monitor_op()
        finally:
            callback.monitor = monitor


def made_from_config(model):
    """A model like this one, from its config, built but not compiled; its own code in a `lambda` is no danger."""
    known = {type(layer).__name__: type(layer) for layer in layers_of(model)}
    with keras.saving.CustomObjectScope(known), SafeModeScope(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        twin = type(model).from_config(model.get_config())
        if not twin.built:
            twin.build_from_config(model.get_build_config())
    return twin


def made_anew(layer):
    """A layer like this one, from its config, with weights as its initializers draw them."""
    with SafeModeScope(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        config = layer.get_config()
        own = {name: getattr(layer, name, None) for name in config}  # no config can hold a function of one's own
        config |= {name: value for name, value in own.items() if inspect.isfunction(value)}
        twin = type(layer).from_config(config)
        twin.build_from_config(layer.get_build_config())
    return twin


def own_weights(layer) -> list:
    """The weights that a layer has itself, without those of the layers in it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def hand_over(layer, other) -> None:
    """Give a layer like this one its state in the way of Keras's files: adapted layers make more of it then."""
    stored: dict = {}
    layer.save_own_variables(stored)
    other.load_own_variables({name: to_numpy(value) for name, value in stored.items()})
    if hasattr(layer, "load_assets"):
        with tempfile.TemporaryDirectory() as directory:
            layer.save_assets(directory)
            other.load_assets(directory)


def compile_like(twin, model, but=()) -> None:
    """Compile a model like another: with the same functions, but objects with a state, as metrics, of its own.

    Of the arguments of `compile`, those in `but` are left out.
    """
    owned = keras.optimizers.Optimizer, keras.metrics.Metric

    def own(given):
        if type(given) is keras.metrics.MeanMetricWrapper:  # no config can hold a function of one's own
            return type(given)(given._fn, name=given.name, dtype=given.dtype, **given._fn_kwargs)
        return type(given).from_config(given.get_config()) if isinstance(given, owned) else given

    with SafeModeScope(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        given = {name: value for name, value in model._compile_config.config.items() if name not in but}
        twin.compile(**keras.tree.map_structure(own, given))
    if isinstance(twin.optimizer, keras.optimizers.Optimizer):
        twin.optimizer.build(twin.trainable_variables)


def predicted(model, x):
    """What a model predicts for one batch."""
    strategy = getattr(model, "distribute_strategy", None)
    if getattr(strategy, "num_replicas_in_sync", 1) > 1:  # where `predict_on_batch` predicts as often for each row
        return model.predict(x, verbose=0)
    return model.predict_on_batch(x)


@contextlib.contextmanager
def without_optimizers(models):
    """The models as if they had not been compiled, for a file that holds them all."""
    held = [vars(model).pop("optimizer", None) for model in models]
    try:
        yield
    finally:
        for model, optimizer in zip(models, held, strict=True):
            if optimizer is not None:
                vars(model)["optimizer"] = optimizer


def loaded(file):
    """The model in a `.keras` file; what state of an optimizer is in it does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        return keras.models.load_model(file)


def given_losses(model) -> list:
    """The penalties that a stateless call has found, as on JAX, for the one that computes the loss."""
    return model._losses_override


def inputs_of(model):
    """What a functional or sequential model takes, as symbolic tensors; None for others."""
    symbolic = getattr(model, "_functional", model)
    return getattr(symbolic, "_inputs_struct", None)


def outputs_of(model):
    """What a functional or sequential model returns, as symbolic tensors; None for others."""
    symbolic = getattr(model, "_functional", model)
    return getattr(symbolic, "_outputs_struct", None)


def made_by(output):
    """The layer that makes a symbolic tensor, in a nested model the innermost."""
    layer = output._keras_history.operation
    inner = outputs_of(layer)
    return layer if inner is None else made_by(keras.tree.flatten(inner)[output._keras_history.tensor_index])


def last_before(output, is_sought) -> list:
    """The layers nearest to a symbolic tensor, on every way back from it, for which `is_sought(layer)`."""
    found, seen, left = [], set(), [output]
    while left:
        operation, node, place = left.pop()._keras_history
        if (id(operation), node, place) in seen:
            continue
        seen.add((id(operation), node, place))
        inner = outputs_of(operation)
        if inner is not None:
            here = last_before(keras.tree.flatten(inner)[place], is_sought)
        else:
            layers = layers_of(operation) if isinstance(operation, keras.Layer) else []
            here = [layer for layer in layers if is_sought(layer)][-1:]
        found += here
        left += [] if here else operation._inbound_nodes[node].input_tensors
    return found


def fits_of(model) -> int:
    """How many calls of the model's `fit` are running, one within the other."""
    return sum(frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model for frame in frames())


def frames():
    """The frames of the callers, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def takes_training(model) -> bool:
    """Whether the model's `call` has an argument that says whether it is trained."""
    return model._call_has_training_arg


def compute_loss(model, x, y, predicted, sample_weight, training):
    """`model.compute_loss`, which may not have the argument `training`."""
    return model._compute_loss(x, y, predicted, sample_weight, training=training)


def exchange_optimizer(model, optimizer) -> None:
    """Give a compiled model another optimizer; the step is compiled anew."""
    vars(model)["optimizer"] = optimizer
    model.train_function = None


def has_metrics(model) -> bool:
    """Whether a model was compiled with metrics beside its loss."""
    given = model._compile_config.config if model.compiled else {}
    return bool(given.get("metrics") or given.get("weighted_metrics"))
