"""An optimizer of Keras around another one."""

import keras

from kopt._keras.stepping import trained_by


class Wrapper(keras.optimizers.Optimizer):
    """An optimizer that hands its gradients to another, whose learning rate, count and state are its own.

    A subclass calls `super().__init__(inner_optimizer, name)` before it adds variables, and overrides `apply`.
    """

    def __init__(self, inner_optimizer, name=None):
        super().__init__(learning_rate=0.0, name=name)
        for unused in list(self._variables):  # the rate and the count are those of the optimizer within
            self._untrack_variable(unused)
        self.inner_optimizer = inner_optimizer

    def __setattr__(self, name, value):
        """Keras wraps what is assigned; the value of a property is not to be kept so."""
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def build(self, variables):
        """Create the state of the optimizer within, unless it is there."""
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    @property
    def trained(self) -> list:
        """The variables that the optimizer was built with."""
        return trained_by(self)

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        if hasattr(self, "inner_optimizer"):  # Keras's constructor assigns its own default
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        return {"name": self.name, "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("inner_optimizer"), custom_objects=custom_objects)
        return cls(inner, **config)
