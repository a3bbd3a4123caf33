"""The one list of what is public: how to make it, what proves it, what it can do.

A test body names no algorithm: what is particular to one stands in its row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import kopt
from tests import oracles


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
    bad: tuple[dict, ...] = ()  # refused by the constructor; the first key is the argument that the message names
    fixed: dict = field(default_factory=dict)  # another value for each argument that is fixed by build
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
        bad=({"rho": 1.0}, {"rho": -0.1}, {"epsilon": 0.0}, {"centered": 1}, {"momentum": "0.9"}),
        fixed={"centered": not arguments.get("centered", False)},
    )


BAD_BETAS = ({"beta_1": 1.0}, {"beta_2": 1.2}, {"beta_2": 1 - 1e-9}, {"epsilon": -1e-7}, {"epsilon": 1e-60},
             {"bias_correction": "yes"}, {"amsgrad": None})  # fmt: skip

OPTIMIZERS = [
    Row(
        "sgd",
        kopt.SGD,
        oracles.sgd,
        slots=(),
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, **more),
        optax=lambda optax: optax.sgd(0.01),
        bad=({"momentum": 1.0}, {"momentum": float("nan")}, {"nesterov": True}, {"form": "torch", "momentum": 0.9}),
    ),
    sgd(
        "momentum",
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9),
        differs="torch and optax keep the rate out of the velocity, which shows only when the rate changes",
    ),
    sgd(
        "nesterov",
        nesterov=True,
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9, nesterov=True),
        differs="as momentum",
    ),
    sgd(
        "momentum-gradient",
        form="gradient",
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9),
    ),
    sgd(
        "nesterov-gradient",
        form="gradient",
        nesterov=True,
        torch=lambda optim, p, **more: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, **more),
        optax=lambda optax: optax.sgd(0.01, momentum=0.9, nesterov=True),
    ),
    sgd(
        "momentum-average",
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
        slots=("c",),
        torch=lambda optim, p, **more: optim.Adagrad(p, 0.01, eps=1e-7, **more),
        differs="optax adds epsilon inside the root",
        changes={"epsilon": 1e-2},
        bad=({"initial_accumulator_value": -1.0}, {"epsilon": 0}, {"epsilon": None}, {"epsilon": True}),
        fixed={"initial_accumulator_value": 1.0},
    ),
    Row(
        "adagrad-warm",
        kopt.Adagrad,
        oracles.adagrad,
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
        slots=("m", "v"),
        torch=lambda optim, p, **more: optim.Adam(p, 0.01, eps=1e-7, **more),
        optax=lambda optax: optax.adam(0.01, eps=1e-7),
        changes={"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2},
        bad=BAD_BETAS,
        fixed={"bias_correction": False, "amsgrad": True},
    ),
    Row(
        "adam-uncorrected",
        kopt.Adam,
        oracles.adam,
        slots=("m", "v"),
        arguments={"bias_correction": False},
        torch=lambda optim, p, **more: Uncorrected(optim.Adam(p, 0.01, eps=1e-7, **more)),
        differs="torch always corrects, so its rate and epsilon are set at each step to undo that; optax likewise",
    ),
    Row(
        "amsgrad-uncorrected",
        kopt.Adam,
        oracles.adam,
        slots=("m", "v", "v_max"),
        arguments={"bias_correction": False, "amsgrad": True},
        torch=lambda optim, p, **more: Uncorrected(optim.Adam(p, 0.01, eps=1e-7, amsgrad=True, **more)),
        differs="as adam-uncorrected",
    ),
    Row(
        "amsgrad",
        kopt.Adam,
        oracles.adam,
        slots=("m", "v", "v_max"),
        arguments={"amsgrad": True},
        torch=lambda optim, p, **more: optim.Adam(p, 0.01, eps=1e-7, amsgrad=True, **more),
        differs="optax takes the maximum of the corrected v",
    ),
    Row(
        "adamw",
        kopt.AdamW,
        oracles.adam,
        slots=("m", "v"),
        arguments={"weight_decay": 0.1},
        torch=lambda optim, p, **more: optim.AdamW(p, 0.01, eps=1e-7, weight_decay=0.1, **more),
        optax=lambda optax: optax.adamw(0.01, eps=1e-7, weight_decay=0.1),
        changes={"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2, "weight_decay": 0.5},
        bad=(*BAD_BETAS, {"weight_decay": -0.1}, {"weight_decay": "0.1"}),
        fixed={"bias_correction": False, "amsgrad": True, "exclude_from_decay": ["bias"]},
    ),
]

CLASSES = list({row.cls: row for row in reversed(OPTIMIZERS)}.values())  # the first row of each class

COMMON_BAD = (  # refused by every optimizer
    {"learning_rate": "0.1"}, {"learning_rate": None}, {"learning_rate": True}, {"learning_rate": -1e-3},
    {"learning_rate": float("inf")}, {"learning_rate": 1e39}, {"learning_rate": float("nan")}, {"learning_rate": [0.1]},
    {"learning_rate": lambda step: 0.1}, {"learning_rate": float}, {"learning_rate": 1j},
    {"weight_decay": -1}, {"weight_decay": float("nan")}, {"weight_decay": "x"}, {"l2": -1}, {"l2": True},
    {"exclude_from_decay": 3, "l2": 0.1}, {"exclude_from_decay": [], "l2": 0.1},
    {"exclude_from_decay": "(", "l2": 0.1}, {"exclude_from_decay": "bias", "weight_decay": None, "l2": None},
    {"clipnorm": 0}, {"clipnorm": 1e-60}, {"clipnorm": -1.0}, {"clipvalue": float("nan")}, {"global_clipnorm": "1"},
    {"clipvalue": 1.0, "clipnorm": 1.0}, {"use_ema": 1}, {"ema_momentum": 1.1}, {"ema_momentum": -0.1},
    {"ema_overwrite_frequency": 0}, {"ema_overwrite_frequency": 1.5}, {"loss_scale_factor": 0},
    {"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 2.0}, {"gradient_accumulation_steps": True},
    {"name": ""}, {"name": "a/b"}, {"name": 3}, {"lr": 0.1}, {"momentun": 0.9}, {"decay": 0.1},
)  # fmt: skip
