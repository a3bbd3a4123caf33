"""Optimizers and training callbacks for Keras 3."""

from kopt import callbacks as callbacks
from kopt import data as data
from kopt import landscape as landscape
from kopt import layers as layers
from kopt import plot as plot
from kopt import schedules as schedules
from kopt.batch_norm import update_bn as update_bn
from kopt.curvature import curvature as curvature
from kopt.describe import describe as describe
from kopt.ensemble import Ensemble as Ensemble
from kopt.finder import find_learning_rate as find_learning_rate
from kopt.fine_tune import fine_tune as fine_tune
from kopt.fine_tune import reinit_head as reinit_head
from kopt.monte_carlo import mc_predict as mc_predict
from kopt.numerics import exponentially_weighted_average as exponentially_weighted_average
from kopt.optimizers.adagrad import Adagrad as Adagrad
from kopt.optimizers.adam import Adam as Adam
from kopt.optimizers.adamw import AdamW as AdamW
from kopt.optimizers.base import Optimizer as Optimizer
from kopt.optimizers.layer_decay import layer_decay as layer_decay
from kopt.optimizers.loading import load_optimizer as load_optimizer
from kopt.optimizers.multipliers import Multipliers as Multipliers
from kopt.optimizers.quasi_newton.dense import BFGS as BFGS
from kopt.optimizers.quasi_newton.dense import SSBFGS as SSBFGS
from kopt.optimizers.quasi_newton.dense import SSBroyden as SSBroyden
from kopt.optimizers.quasi_newton.lbfgs import LBFGS as LBFGS
from kopt.optimizers.quasi_newton.optimizer import QuasiNewton as QuasiNewton
from kopt.optimizers.rmsprop import RMSprop as RMSprop
from kopt.optimizers.rule import At as At
from kopt.optimizers.rule import Slot as Slot
from kopt.optimizers.rule import elementwise as elementwise
from kopt.optimizers.sgd import SGD as SGD
from kopt.range_test import RangeTest as RangeTest
from kopt.solve.functions import minimize_fn as minimize_fn
from kopt.solve.models import minimize as minimize

__version__ = "0.1.0"


def __getattr__(name):
    """`kopt.tuner` is imported when it is asked for: it needs KerasTuner, which takes a second."""
    if name == "tuner":
        import importlib

        return importlib.import_module("kopt.tuner")
    raise AttributeError(f"module 'kopt' has no attribute {name!r}")
