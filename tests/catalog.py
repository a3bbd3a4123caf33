"""The one list of what is public: how to make it, what proves it, what it can do.

A test body names no algorithm: what is particular to one stands in its row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import kopt
from kopt.optimizers.rule import KERNELS
from tests import oracles
from tests.conftest import BACKEND


@dataclass(frozen=True)
class Row:
    name: str
    cls: type
    oracle: Callable  # in tests/oracles.py
    slots: tuple[str, ...]
    arguments: dict = field(default_factory=dict)
    torch: Callable | None = None  # (torch.optim, parameters) -> the same rule in torch
    optax: Callable | None = None  # (optax) -> the same rule in optax
    differs: str = ""  # how the references differ from kopt on purpose
    changes: dict = field(default_factory=dict)  # another value for each number that can change during fit
    fixed: dict = field(default_factory=dict)  # another value for each argument that is fixed by build
    kernels: tuple[str, ...] = ()  # the backends that have a kernel for it
    rate: float = 0.01  # the learning rate at which the tests run it

    def make(self, **more):
        return self.cls(**{"learning_rate": self.rate, **self.arguments, **more})

    def hypers(self, **more):
        """The arguments for the oracle."""
        return {"learning_rate": self.rate, **self.arguments, **more}

    def __str__(self):
        return self.name


class Uncorrected:
    """torch's Adam with the bias corrections taken out again: the rate and epsilon of each step undo them."""

    def __init__(self, adam):
        self.adam, self.t, self.start = adam, 0, adam.param_groups[0].copy()

    def step(self):
        self.t += 1
        first, second = (1 - beta**self.t for beta in self.start["betas"])
        self.adam.param_groups[0]["lr"] = self.start["lr"] * first / second**0.5
        self.adam.param_groups[0]["eps"] = self.start["eps"] / second**0.5
        self.adam.step()


def sgd(name, nesterov=False, form="velocity", **more):
    return Row(
        name,
        kopt.SGD,
        oracles.sgd,
        slots=("v",),
        arguments={"momentum": 0.9, "nesterov": nesterov, "form": form},
        changes={"momentum": 0.5},
        fixed={"nesterov": not nesterov, "form": "gradient" if form == "average" else "average"},
        **more,
    )


def rmsprop(name, slots, **arguments):
    return Row(
        name,
        kopt.RMSprop,
        oracles.rmsprop,
        slots=slots,
        arguments=arguments,
        torch=lambda optim, p, **more: optim.RMSprop(p, 0.01, alpha=0.9, eps=1e-7, **arguments, **more),
        optax=lambda optax: optax.rmsprop(
            0.01,
            decay=0.9,
            eps=1e-7,
            eps_in_sqrt=False,
            centered=arguments.get("centered", False),
            momentum=arguments.get("momentum"),
        ),
        differs="torch and optax keep the rate out of the momentum, which shows only when the rate changes",
        changes={"rho": 0.5, "epsilon": 1e-2} | ({"momentum": 0.3} if "momentum" in arguments else {}),
        fixed={"centered": not arguments.get("centered", False)},
    )


OPTIMIZERS = [
    Row(
        "sgd",
        kopt.SGD,
        oracles.sgd,
        kernels=("tensorflow", "torch"),
        slots=(),
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, **more),
        optax=lambda optax: optax.sgd(0.01),
    ),
    sgd(
        "momentum",
        kernels=("tensorflow", "torch"),
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9),
        differs="torch and optax keep the rate out of the velocity, which shows only when the rate changes",
    ),
    sgd(
        "nesterov",
        kernels=("tensorflow", "torch"),
        nesterov=True,
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9, nesterov=True),
        differs="as momentum",
    ),
    sgd(
        "momentum-gradient",
        kernels=("tensorflow", "torch"),
        form="gradient",
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9),
    ),
    sgd(
        "nesterov-gradient",
        kernels=("tensorflow", "torch"),
        form="gradient",
        nesterov=True,
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9, nesterov=True),
    ),
    sgd(
        "momentum-average",
        kernels=("torch",),
        form="average",
        torch=lambda optim, p, **more: optim.SGD(p, 0.01 * 0.1, momentum=0.9, **more),
        optax=lambda optax: optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.01)),
        differs="torch has this form with another first step (dampening); its sum at the rate a (1 - m) is the same",
    ),
    sgd(
        "nesterov-average",
        form="average",
        nesterov=True,
        torch=lambda optim, p, **more: optim.SGD(p, 0.01 * 0.1, momentum=0.9, nesterov=True, **more),
        optax=lambda optax: optax.sgd(0.01 * 0.1, momentum=0.9, nesterov=True),
        differs="as momentum-average",
    ),
    Row(
        "adagrad",
        kopt.Adagrad,
        oracles.adagrad,
        kernels=("tensorflow", "torch"),
        slots=("c",),
        torch=lambda optim, p, **more: optim.Adagrad(p, 0.01, eps=1e-7, **more),
        differs="optax adds epsilon inside the root",
        changes={"epsilon": 1e-2},
        fixed={"initial_accumulator_value": 1.0},
    ),
    Row(
        "adagrad-warm",
        kopt.Adagrad,
        oracles.adagrad,
        kernels=("tensorflow", "torch"),
        slots=("c",),
        arguments={"initial_accumulator_value": 0.1},
        torch=lambda optim, p, **more: optim.Adagrad(p, 0.01, eps=1e-7, initial_accumulator_value=0.1, **more),
        differs="as adagrad",
    ),
    rmsprop("rmsprop", ("c",)),
    rmsprop("rmsprop-momentum", ("c", "v"), momentum=0.8),
    rmsprop("rmsprop-centered", ("s", "mean"), centered=True),
    rmsprop("rmsprop-centered-momentum", ("s", "mean", "v"), centered=True, momentum=0.8),
    Row(
        "adam",
        kopt.Adam,
        oracles.adam,
        kernels=("tensorflow", "torch"),
        slots=("m", "v"),
        torch=lambda optim, p, **more: optim.Adam(p, 0.01, eps=1e-7, **more),
        optax=lambda optax: optax.adam(0.01, eps=1e-7),
        changes={"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2},
        fixed={"bias_correction": False, "amsgrad": True},
    ),
    Row(
        "adam-uncorrected",
        kopt.Adam,
        oracles.adam,
        kernels=("tensorflow", "torch"),
        slots=("m", "v"),
        arguments={"bias_correction": False},
        torch=lambda optim, p, **more: Uncorrected(optim.Adam(p, 0.01, eps=1e-7, **more)),
        differs="torch always corrects, so its rate and epsilon are set at each step to undo that; optax likewise",
    ),
    Row(
        "amsgrad-uncorrected",
        kopt.Adam,
        oracles.adam,
        kernels=("torch",),
        slots=("m", "v", "v_max"),
        arguments={"bias_correction": False, "amsgrad": True},
        torch=lambda optim, p, **more: Uncorrected(optim.Adam(p, 0.01, eps=1e-7, amsgrad=True, **more)),
        differs="as adam-uncorrected",
    ),
    Row(
        "amsgrad",
        kopt.Adam,
        oracles.adam,
        kernels=("torch",),
        slots=("m", "v", "v_max"),
        arguments={"amsgrad": True},
        torch=lambda optim, p, **more: optim.Adam(p, 0.01, eps=1e-7, amsgrad=True, **more),
        differs="optax takes the maximum of the corrected v",
    ),
    Row(
        "adamw",
        kopt.AdamW,
        oracles.adam,
        kernels=("torch",),
        slots=("m", "v"),
        arguments={"weight_decay": 0.1},
        torch=lambda optim, p, **more: optim.AdamW(p, 0.01, eps=1e-7, weight_decay=0.1, **more),
        optax=lambda optax: optax.adamw(0.01, eps=1e-7, weight_decay=0.1),
        changes={"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2, "weight_decay": 0.5},
        fixed={"bias_correction": False, "amsgrad": True, "exclude_from_decay": ["bias"]},
    ),
]

CLASSES = list({row.cls: row for row in reversed(OPTIMIZERS)}.values())  # the first row of each class

# What each argument of everything public may be; tests/test_bad_input.py says what the kinds mean. `Optional` is "?".
COMMON_KINDS = {
    "learning_rate": "rate",
    "weight_decay": "nonnegative?",
    "l2": "nonnegative?",
    "exclude_from_decay": "keys?",
    "clipnorm": "positive?",
    "clipvalue": "positive?",
    "global_clipnorm": "positive?",
    "track_gradient_norm": "boolean",
    "nonfinite": "apply|skip|raise",
    "use_ema": "boolean",
    "ema_momentum": "closed_fraction",
    "ema_overwrite_frequency": "count 1?",
    "loss_scale_factor": "positive?",
    "gradient_accumulation_steps": "count 2?",
    "sparse": "exact|lazy" if BACKEND == "tensorflow" else "exact",
    "name": "text?",
}
ADAM_KINDS = {
    "beta_1": "fraction",
    "beta_2": "fraction",
    "epsilon": "positive",
    "bias_correction": "boolean",
    "amsgrad": "boolean",
}
KINDS = {
    kopt.SGD: COMMON_KINDS | {"momentum": "fraction", "nesterov": "boolean", "form": "velocity|gradient|average"},
    kopt.Adagrad: COMMON_KINDS | {"initial_accumulator_value": "nonnegative", "epsilon": "positive"},
    kopt.RMSprop: COMMON_KINDS
    | {"rho": "fraction", "momentum": "fraction", "epsilon": "positive", "centered": "boolean"},
    kopt.Adam: COMMON_KINDS | ADAM_KINDS,
    kopt.AdamW: COMMON_KINDS | ADAM_KINDS,
    kopt.Slot: {"name": "text", "doc": "sentence", "initial": "finite"},
    kopt.exponentially_weighted_average: {
        "values": "series",
        "beta": "fraction?",
        "window": "window?",
        "bias_correction": "boolean",
    },
    kopt.elementwise: {"kernel": "|".join(KERNELS) + "?", "rests": "boolean"},
    kopt.At: {"t": "made by the step", "learning_rate": "made by the step"},
    kopt.Optimizer: {},  # has no constructor of its own
    kopt.callbacks.BackupAndRestore: {
        "directory": "path",
        "save_every_epochs": "count 1",
        "save_every_steps": "count 1?",
        "keep": "count 1",
        "on_save_error": "raise|warn",
        "delete_checkpoint": "boolean",
        "verbose": "count 0",
    },
    kopt.data.seekable: {"source": "data", "num_batches": "count 1?", "shuffle": "boolean", "seed": "count 0"},
    kopt.load_optimizer: {"model": "a compiled model", "path": "a file of it"},
}
TRIED_ELSEWHERE = {kopt.At, kopt.load_optimizer}  # the step makes the one; tests/test_loading.py tries the other
PUBLIC = {
    name: value
    for module in (kopt, kopt.callbacks, kopt.data)
    for name, value in vars(module).items()
    if callable(value) and not name.startswith("_") and value.__module__.startswith("kopt")
}
NEEDED = {
    "nesterov": {"momentum": 0.9},
    "exclude_from_decay": {"l2": 0.1},
    "ema_overwrite_frequency": {"use_ema": True},
    "name": {"doc": "a slot"},
}
