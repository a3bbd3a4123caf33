"""Optimizers by the words that people have for them."""

from kopt.optimizers.adagrad import Adagrad
from kopt.optimizers.adam import Adam
from kopt.optimizers.adamw import AdamW
from kopt.optimizers.quasi_newton.dense import BFGS, SSBFGS, SSBroyden
from kopt.optimizers.quasi_newton.lbfgs import LBFGS
from kopt.optimizers.rmsprop import RMSprop
from kopt.optimizers.sgd import SGD

RULES = {  # word -> the optimizer at a learning rate
    "sgd": SGD,
    "momentum": lambda rate, momentum=0.9: SGD(rate, momentum=momentum),
    "nesterov": lambda rate, momentum=0.9: SGD(rate, momentum=momentum, nesterov=True),
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
}
SOLVERS = {"lbfgs": LBFGS, "bfgs": BFGS, "ssbfgs": SSBFGS, "ssbroyden": SSBroyden}  # which need no rate
