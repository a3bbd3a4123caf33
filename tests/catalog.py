"""The one list of what is public: how to make it, what proves it, what it can do.

A test body names no algorithm: what is particular to one stands in its row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial

import keras
import numpy as np
import pytest

import kopt
import kopt.callbacks as kc
import kopt.layers as kl
import kopt.schedules as ks
import kopt.tuner
from kopt.optimizers.rule import KERNELS
from kopt.tuner.spaces import RULES
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


@dataclass(frozen=True)
class Timed:
    """A schedule, the callback of the same name, and what proves both."""

    name: str
    cls: type
    arguments: dict
    oracle: Callable  # (t, batches, total) -> factor
    borders: tuple[int, ...] = ()  # the steps at which something changes, where an epoch has BATCHES
    counts_epochs: bool = False
    is_open: bool = False
    initial: str = "initial"  # what the argument is called that makes a value of the factor
    callback: Callable | None = None
    reference: Callable | None = None  # (steps) -> the same factors by torch, optax or Keras
    without: str = ""  # why there is no reference

    def make(self, **more):
        return self.cls(**{**self.arguments, **more})

    def by_itself(self, value=1.0):
        """With a value of its own."""
        return self.make(**{self.initial: value})

    def values(self, steps, total):
        return np.array([self.oracle(int(t), BATCHES, total) for t in steps])

    def __str__(self):
        return self.name


BATCHES, EPOCHS = 5, 4  # of the fits that schedules are tried in
STEPS = BATCHES * EPOCHS


def torch_rates(make, steps, momentum=False):
    torch = pytest.importorskip("torch", reason="torch comes with the extra `torch`")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))], 1.0, momentum=0.95)
    scheduler, rates = make(torch.optim.lr_scheduler)(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["momentum" if momentum else "lr"])
        optimizer.step()
        scheduler.step()
    return rates


def by_torch(make):
    return lambda steps: torch_rates(make, steps)


def by_optax(make):
    def rates(steps):
        schedule = make(pytest.importorskip("optax", reason="optax comes with the extra `jax`"))
        return [float(schedule(t)) for t in range(steps)]

    return rates


def by_keras(make):
    def rates(steps):
        schedule = make(keras.optimizers.schedules)
        return [float(schedule(t)) for t in range(steps)]

    return rates


SCHEDULES = [
    Timed("constant", ks.Constant, {"factor": 0.5}, lambda *_: 0.5, without="nothing to compare"),
    Timed(
        "step-decay",
        ks.StepDecay,
        {"factor": 0.5, "every_epochs": 2},
        partial(oracles.step_decay, factor=0.5, every=10),
        (10, 20),
        counts_epochs=True,
        callback=kc.StepDecay,
        reference=by_torch(lambda s: lambda o: s.StepLR(o, 10, 0.5)),
    ),
    Timed(
        "step-decay-steps",
        ks.StepDecay,
        {"factor": 0.7, "every_steps": 3},
        partial(oracles.step_decay, factor=0.7, every=3),
        (3, 6),
        callback=kc.StepDecay,
        reference=by_torch(lambda s: lambda o: s.StepLR(o, 3, 0.7)),
    ),
    Timed(
        "exponential",
        ks.ExponentialDecay,
        {"rate": 0.3},
        partial(oracles.exponential, rate=0.3, per="epoch"),
        (5, 10),
        counts_epochs=True,
        callback=kc.ExponentialDecay,
        reference=by_keras(lambda s: s.ExponentialDecay(1.0, 5, math.exp(-0.3), staircase=True)),
    ),
    Timed(
        "exponential-base",
        ks.ExponentialDecay,
        {"base": 0.95, "per": "step"},
        partial(oracles.exponential, rate=-math.log(0.95), per="step"),
        counts_epochs=True,
        callback=kc.ExponentialDecay,
        reference=by_optax(lambda o: o.exponential_decay(1.0, 5, 0.95)),
    ),
    Timed(
        "exponential-steps",
        ks.ExponentialDecay,
        {"base": 0.9, "per": "step", "unit_steps": 5},
        partial(oracles.exponential, rate=-math.log(0.9), per="step"),
        callback=kc.ExponentialDecay,
        reference=by_keras(lambda s: s.ExponentialDecay(1.0, 5, 0.9)),
    ),
    Timed(
        "inverse-time",
        ks.InverseTimeDecay,
        {"rate": 1.0},
        partial(oracles.inverse_time, rate=1.0, per="epoch"),
        (5, 10),
        counts_epochs=True,
        callback=kc.InverseTimeDecay,
        reference=by_keras(lambda s: s.InverseTimeDecay(1.0, 5, 1.0, staircase=True)),
    ),
    Timed(
        "inverse-time-step",
        ks.InverseTimeDecay,
        {"rate": 0.5, "per": "step"},
        partial(oracles.inverse_time, rate=0.5, per="step"),
        counts_epochs=True,
        callback=kc.InverseTimeDecay,
        reference=by_keras(lambda s: s.InverseTimeDecay(1.0, 5, 0.5)),
    ),
    Timed(
        "inverse-sqrt",
        ks.InverseSqrtDecay,
        {"scale": 2.0},
        partial(oracles.inverse_sqrt, scale=2.0, per="epoch"),
        (5, 10),
        counts_epochs=True,
        callback=kc.InverseSqrtDecay,
        without="no library has it as a decay from the first step on",
    ),
    Timed(
        "inverse-sqrt-steps",
        ks.InverseSqrtDecay,
        {"per": "step", "unit_steps": 2},
        lambda t, batches, total: oracles.inverse_sqrt(t, 2, total, 1.0, "step"),
        callback=kc.InverseSqrtDecay,
        reference=by_torch(lambda s: lambda o: s.LambdaLR(o, lambda t: (1 + t / 2) ** -0.5)),
    ),
    Timed(
        "staircase",
        ks.Staircase,
        {"boundaries": [1, 3], "factors": [0.5, 0.1]},
        partial(oracles.staircase, boundaries=(5, 15), factors=(0.5, 0.1)),
        (5, 15),
        counts_epochs=True,
        callback=kc.Staircase,
        reference=by_keras(lambda s: s.PiecewiseConstantDecay([4, 14], [1.0, 0.5, 0.1])),
    ),
    Timed(
        "staircase-steps",
        ks.Staircase,
        {"boundaries": [3, 7], "factors": [0.5, 0.25], "per": "step"},
        partial(oracles.staircase, boundaries=(3, 7), factors=(0.5, 0.25)),
        (3, 7),
        callback=kc.Staircase,
        reference=by_torch(lambda s: lambda o: s.MultiStepLR(o, [3, 7], 0.5)),
    ),
    Timed(
        "linear",
        ks.Linear,
        {"start": 0.5, "end": 0.2},
        partial(oracles.linear, start=0.5, end=0.2),
        (STEPS,),
        is_open=True,
        reference=by_torch(lambda s: lambda o: s.LinearLR(o, 0.5, 0.2, STEPS)),
    ),
    Timed(
        "linear-steps",
        ks.Linear,
        {"steps": 7},
        partial(oracles.linear, start=1.0, end=0.0, length=7),
        (7,),
        reference=by_optax(lambda o: o.linear_schedule(1.0, 0.0, 7)),
    ),
    Timed(
        "polynomial",
        ks.PolynomialDecay,
        {"power": 2.0, "final": 0.1},
        partial(oracles.polynomial, power=2.0, final=0.1),
        (STEPS,),
        is_open=True,
        callback=kc.PolynomialDecay,
        reference=by_keras(lambda s: s.PolynomialDecay(1.0, STEPS, 0.1, power=2.0)),
    ),
    Timed(
        "cosine",
        ks.CosineDecay,
        {},
        partial(oracles.cosine, final=0.0),
        (STEPS,),
        is_open=True,
        callback=kc.CosineDecay,
        reference=by_optax(lambda o: o.cosine_decay_schedule(1.0, STEPS)),
    ),
    Timed(
        "cosine-epochs",
        ks.CosineDecay,
        {"final": 0.2, "epochs": 2},
        partial(oracles.cosine, final=0.2, length=10),
        (10,),
        counts_epochs=True,
        callback=kc.CosineDecay,
        reference=by_keras(lambda s: s.CosineDecay(1.0, 10, alpha=0.2)),
    ),
    Timed(
        "restarts",
        ks.CosineRestarts,
        {"cycle_epochs": 1},
        partial(oracles.restarts, length=5, growth=1, peak=1.0, final=0.0),
        (5, 10),
        counts_epochs=True,
        callback=kc.CosineRestarts,
        reference=by_torch(lambda s: lambda o: s.CosineAnnealingWarmRestarts(o, 5)),
    ),
    Timed(
        "restarts-growing",
        ks.CosineRestarts,
        {"cycle_steps": 3, "growth": 2, "peak_decay": 0.8, "final": 0.1},
        partial(oracles.restarts, length=3, growth=2, peak=0.8, final=0.1),
        (3, 9, 21),
        callback=kc.CosineRestarts,
        reference=by_keras(lambda s: s.CosineDecayRestarts(1.0, 3, t_mul=2.0, m_mul=0.8, alpha=0.1)),
    ),
    *(
        Timed(
            f"cyclical-{mode}",
            ks.CyclicalRate,
            {"max_learning_rate": 3.0, "cycle_steps": 8, "mode": mode} | more,
            partial(oracles.triangles, length=8, low=1.0, high=3.0, mode=mode, **more),
            (4, 8, 16),
            callback=kc.CyclicalRate,
            reference=by_torch(
                lambda s, mode=mode, more=more: (
                    lambda o: s.CyclicLR(o, 1.0, 3.0, 4, mode=mode, cycle_momentum=False, **more)
                )
            ),
        )
        for mode, more in (("triangular", {}), ("triangular2", {}), ("exp_range", {"gamma": 0.9}))
    ),
    *(
        Timed(
            f"one-cycle-{shape}",
            ks.OneCycle,
            {"shape": shape},
            partial(oracles.one_cycle, start=0.04, final=4e-6, peak_at=0.3, shape=shape),
            (6, STEPS),
            is_open=True,
            initial="max_learning_rate",
            callback=partial(kc.OneCycle, momentum=None),
            reference=by_torch(
                lambda s, shape=shape: (
                    lambda o: s.OneCycleLR(
                        o,
                        1.0,
                        STEPS + 1,
                        pct_start=7 / (STEPS + 1),
                        anneal_strategy={"cosine": "cos"}.get(shape, shape),
                    )
                )
            ),
        )
        for shape in ("cosine", "linear")
    ),
    Timed(
        "warm-up",
        ks.WarmUp,
        {"epochs": 2},
        partial(oracles.warm_up, length=10),
        (10,),
        counts_epochs=True,
        callback=kc.WarmUp,
        reference=by_optax(lambda o: o.linear_schedule(0.0, 1.0, 10)),
    ),
    Timed(
        "warm-up-steps",
        ks.WarmUp,
        {"steps": 3, "start": 0.1},
        partial(oracles.warm_up, length=3, start=0.1),
        (3,),
        callback=kc.WarmUp,
        reference=by_torch(lambda s: lambda o: s.LinearLR(o, 0.1, 1.0, 3)),
    ),
    *(
        Timed(
            f"trapezoid-{shape}",
            ks.WarmUpStableDecay,
            {"warmup_steps": 3, "decay_epochs": 1, "shape": shape, "final": 0.1},
            partial(oracles.trapezoid, up=3, down=5, shape=shape, final=0.1),
            (3, 15, STEPS),
            counts_epochs=True,
            is_open=True,
            reference=by_optax(
                lambda o, shape=shape: o.join_schedules(
                    [
                        o.linear_schedule(0.0, 1.0, 3),
                        o.constant_schedule(1.0),
                        {"linear": o.linear_schedule(1.0, 0.1, 5), "cosine": o.cosine_decay_schedule(1.0, 5, 0.1)}[
                            shape
                        ],
                    ],
                    [3, 15],
                )
            )
            if shape != "sqrt"
            else None,
            without="" if shape != "sqrt" else "no library at hand has this shape",
        )
        for shape in ("linear", "cosine", "sqrt")
    ),
]

CLASSES = list({row.cls: row for row in reversed(OPTIMIZERS)}.values())  # the first row of each class

# What each argument of everything public may be; tests/test_bad_input.py says what the kinds mean. `Optional` is "?".
COMMON_KINDS = {
    "learning_rate": "rate",
    "weight_decay": "nonnegative?",
    "l2": "nonnegative?",
    "exclude_from_decay": "keys?",
    "multipliers": "groups?",
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
LENGTH = {"epochs": "epochs?", "steps": "count 1?"}
CYCLE = {"cycle_epochs": "epochs?", "cycle_steps": "count 1?"}
EVERY = {"every_epochs": "count 1?", "every_steps": "count 1?"}
UNIT = {"per": "epoch|step", "unit_steps": "count 1?"}
INITIAL, NAME = {"initial": "nonnegative?"}, {"name": "text?"}
ON_SURFACE = {
    "optimizers": "names or optimizers",
    "surface": "a name or a function",
    "steps": "count 1?",
    "start": "two numbers?",
    "view": "two pairs?",
    "tune": "count 3?",
}
PICTURE = {"ax": "made by matplotlib", "save": "made by others", "show": "boolean"}
SCHEDULE_KINDS = {  # of the schedule and the callback of a name; the one also takes `initial`, the other `name`
    "StepDecay": {"factor": "share"} | EVERY,
    "ExponentialDecay": {"rate": "nonnegative?", "base": "share?"} | UNIT,
    "InverseTimeDecay": {"rate": "nonnegative"} | UNIT,
    "InverseSqrtDecay": {"scale": "positive"} | UNIT,
    "Staircase": {"boundaries": "two counts", "factors": "two nonnegatives", "per": "epoch|step"},
    "PolynomialDecay": {"power": "positive", "final": "closed_fraction"} | LENGTH,
    "CosineDecay": {"final": "closed_fraction"} | LENGTH,
    "WarmUp": {"start": "closed_fraction"} | LENGTH,
    "CosineRestarts": {"growth": "count 1", "peak_decay": "share", "final": "closed_fraction"} | CYCLE,
    "CyclicalRate": {
        "max_learning_rate": "positive",
        "mode": "triangular|triangular2",  # the third wants `gamma`
        "gamma": "share?",
    }
    | CYCLE,
}
ONE_CYCLE = {
    "max_learning_rate": "positive?",
    "start": "nonnegative",
    "final": "nonnegative",
    "peak_at": "inner",
    "shape": "cosine|linear",
} | LENGTH
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
    kopt.Multipliers: {"inner_optimizer": "an optimizer", "multipliers": "groups", "name": "text?"},
    kopt.layer_decay: {
        "model": "a built model",
        "decay": "share",
        "levels": "keys?",
        "min_multiplier": "closed_fraction",
    },
    kopt.reinit_head: {"model": "a built model", "base": "a layer of it", "zeros": "boolean"},
    kopt.fine_tune: {
        "model": "a compiled model",
        "base": "a layer of it",
        "x": "data",
        "y": "arrays?",
        "head_epochs": "count 0",
        "epochs": "count 1",
        "learning_rate": "positive?",
        "body_multiplier": "nonnegative",
        "levels": "count 1?",
        "ramp_epochs": "epochs?",
        "reinit": "boolean",
        "engine": "multiplier|trainable",
        "freeze_bn": "boolean",
        "callbacks": "callbacks?",
        "fit_arguments": "those of `fit`",
    },
    kopt.describe: {"model": "a model", "multipliers": "groups?", "print_fn": "a function?"},
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
    **{getattr(ks, name): kinds | INITIAL for name, kinds in SCHEDULE_KINDS.items()},
    **{getattr(kc, name): kinds | NAME for name, kinds in SCHEDULE_KINDS.items()},
    ks.Constant: {"factor": "nonnegative"} | INITIAL,
    ks.Linear: {"start": "nonnegative", "end": "nonnegative"} | LENGTH | INITIAL,
    ks.WarmUpStableDecay: {
        "warmup_epochs": "epochs?",
        "warmup_steps": "count 1?",
        "decay_epochs": "epochs?",
        "decay_steps": "count 1?",
        "shape": "linear|cosine|sqrt",
        "final": "closed_fraction",
    }
    | LENGTH
    | INITIAL,
    ks.OneCycle: ONE_CYCLE,
    kc.OneCycle: ONE_CYCLE | {"momentum": "two inners?"} | NAME,
    kc.MomentumAnneal: {"start": "fraction", "end": "fraction"} | LENGTH | NAME,
    ks.Schedule: {},  # has no constructor of its own
    kc.Schedule: {"hyperparameter": "text", "schedule": "schedule", "name": "text?"},
    kc.StagedUnfreeze: {
        "stages": "stages",
        "engine": "multiplier|trainable",
        "freeze_bn": "boolean",
        "verbose": "count 0",
        "name": "text?",
    },
    kc.RateMonitor: {"hyperparameters": "names", "capacity": "count 1?", "name": "text?"},
    kc.UpdateRatio: {"groups": "keys?", "name": "text?"},
    kopt.plot.schedule: {
        "shown": "made by others",
        "steps": "count 1?",
        "steps_per_epoch": "count 1?",
        "base": "finite",
        "model": "a built model?",
    }
    | PICTURE,
    kopt.landscape.trajectories: ON_SURFACE,
    kopt.plot.trajectories: ON_SURFACE | {"title": "sentence?"} | PICTURE,
    kopt.landscape.Surface: {
        "function": "a function",
        "start": "two numbers",
        "view": "two pairs?",
        "name": "sentence",
        "minima": "points",
        "lowest": "a number?",
        "steps": "count 1",
    },
    kopt.landscape.Trajectories: {field.name: "made by trajectories" for field in fields(kopt.landscape.Trajectories)},
    kopt.data.seekable: {"source": "data", "num_batches": "count 1?", "shuffle": "boolean", "seed": "count 0"},
    kopt.load_optimizer: {"model": "a compiled model", "path": "a file of it"},
    kopt.update_bn: {"model": "a built model", "data": "batches", "batch_size": "count 1"},
    kc.PolyakAveraging: {
        "momentum": "fraction",
        "kind": "ema|uniform",
        "start_epoch": "count 0",
        "update_every_steps": "count 1",
        "bias_correction": "boolean",
        "warmup_steps": "count 0",
        "window_steps": "window?",
        "window_epochs": "epochs?",
        "update_bn": "batches?",
        "validate": "averaged|raw",  # "both" wants `validation_data`
        "validation_data": "batches with targets?",
        "on_train_end": "averaged|raw",
        "segment_every_epochs": "count 1?",
        "name": "text?",
    },
}
KINDS |= {
    kc.SnapshotEnsemble: {
        "cycles": "count 1",
        "max_learning_rate": "positive?",
        "min_learning_rate": "nonnegative",
        "cycle_mult": "positive",
        "topology": "sequential|star",
        "storage": "auto|ram|disk",
        "directory": "path?",
        "dtype": "float32|float16|bfloat16",
        "validation_data": "batches with targets?",
        "verbose": "count 0",
        "combine": "auto|probabilities|logits|mean|binary_probabilities|binary_logits",
        "on_save_error": "raise|warn",
        "name": "text?",
    },
    kopt.Ensemble: {
        "models": "built models",
        "combine": "a way",
        "weights": "nonnegatives",
        "temperature": "positive?",
        "name": "text?",
    },
}
SEARCH_KINDS = {
    "line_search": "wolfe|gradient|none",
    "c1": "inner",
    "c2": "inner",
    "gtol": "nonnegative",
    "ftol": "nonnegative",  # or "auto"
    "max_line_search": "count 1",
    "accumulate_steps": "count 1?",
    "check_noise": "boolean",
    "name": "text?",
}
KINDS |= {
    kopt.LBFGS: SEARCH_KINDS | {"memory": "count 1"},
    **{cls: SEARCH_KINDS | {"max_weights": "count 1"} for cls in (kopt.BFGS, kopt.SSBFGS, kopt.SSBroyden)},
    kopt.QuasiNewton: {},  # has no constructor of its own
    kc.LineSearchMonitor: {"stop_on_convergence": "boolean", "verbose": "count 0", "name": "text?"},
    kopt.minimize_fn: {
        "value_and_grad": "a function",
        "x0": "tensors",
        "method": "a method",
        "max_evals": "count 1",
        "chunk": "count 1",
        "callback": "a function?",
        "options": "those of the method",
    },
    kopt.curvature: {
        "model": "a compiled model",
        "x": "arrays",
        "y": "arrays?",
        "sample_weight": "arrays?",
        "batch_size": "count 1?",
        "steps": "count 1",
        "tolerance": "inner",
        "probes": "count 2",
        "seed": "count 0",
        "verbose": "count 0",
    },
    kopt.minimize: {
        "model": "a compiled model",
        "x": "arrays",
        "y": "arrays?",
        "method": "a method",
        "sample_weight": "arrays?",
        "max_evals": "count 1",
        "chunk": "count 1",
        "validation_data": "arrays with targets?",
        "callbacks": "callbacks?",
        "verbose": "count 0",
        "options": "those of the method",
    },
}
FINDER_KINDS = {
    "min_learning_rate": "positive",
    "max_learning_rate": "positive",
    "steps": "count 3",
    "beta": "fraction",
    "explode": "positive",
    "verbose": "count 0",
}
KINDS |= {
    kc.LearningRateFinder: FINDER_KINDS | {"name": "text?"},
    kopt.find_learning_rate: FINDER_KINDS
    | {"model": "a compiled model", "x": "data", "y": "arrays?", "fit_arguments": "those of `fit`"},
    kopt.RangeTest: {
        "learning_rates": "series",
        "losses": "series",
        "initial_loss": "a number",
        "stopped": "end|diverged|data",
        "beta": "fraction",
    },
    kopt.plot.Picture: dict.fromkeys(("axes", "data", "record", "motion"), "made by a picture"),
    kopt.plot.rate_range: {"record": "made by others"} | PICTURE,
    kopt.plot.rates: {"curves": "made by others", "metric": "sentence"} | PICTURE,
    kopt.plot.search: {"result": "made by others"} | PICTURE,
    kopt.plot.history: {"runs": "made by others", "metrics": "made by others"} | PICTURE,
    kopt.plot.average: {"history": "made by others", "metric": "sentence"} | PICTURE,
    kopt.plot.groups: {"history": "made by others"} | PICTURE,
    kopt.plot.snapshots: {"snap": "made by others", "output": "made by others"} | PICTURE,
    kopt.tuner.learning_rate: {
        "hp": "made by KerasTuner",
        "rule": "|".join(RULES),
        "around": "a record?",
        "name": "sentence",
    },
    kopt.tuner.optimizer: {"hp": "made by KerasTuner", "rules": "names", "schedules": "names"},
    kopt.tuner.wrap: {
        "build": "a function",
        "seed": "count 0",
        "explode": "positive",
        "keep_weights": "all|best|none",
        "horizon_epochs": "count 1?",
    },
    kopt.tuner.LearningRateSearch: {
        "build": "a function",
        "objective": "a metric",
        "min_learning_rate": "positive?",
        "max_learning_rate": "positive?",
        "stages": "pairs?",
        "confirm": "count 0",
        "top": "count 1",
        "batch_sizes": "counts?",
        "range_test": "boolean",
        "max_widen": "count 0",
        "explode": "positive",
        "keep_weights": "all|best|none",
        "seed": "count 0",
        "directory": "path?",
        "project_name": "text",
        "overwrite": "boolean",
    },
    kopt.tuner.SearchResult: {field.name: "made by a search" for field in fields(kopt.tuner.SearchResult)},
}
SLICED = {
    "points": "weights?",
    "n": "count 2",
    "directions": "filter|layer",
    "update_bn": "boolean, or batches",
    "batch_size": "count 1",
    "sample_weight": "arrays?",
    "seed": "count 0",
    "verbose": "count 0",
}
OF_MODEL = {"model": "a compiled model", "x": "data", "y": "arrays?"}
KINDS |= {
    kopt.landscape.slice_1d: OF_MODEL | SLICED | {"positions": "numbers?"},
    kopt.landscape.plane: OF_MODEL | SLICED | {"margin": "nonnegative", "span": "positive"},
    kopt.landscape.Slice: {field.name: "made by a slice" for field in fields(kopt.landscape.Slice)},
    kopt.landscape.Plane: {field.name: "made by a plane" for field in fields(kopt.landscape.Plane)},
    kopt.plot.slice_1d: OF_MODEL | {"metrics": "names?", "how": "those of `kopt.landscape.slice_1d`"} | PICTURE,
    kopt.plot.plane: OF_MODEL | {"metrics": "names?", "how": "those of `kopt.landscape.plane`"} | PICTURE,
}
DRAWN = {"seed": "count 0?"}
FORMAT = {"data_format": "channels_last|channels_first?"}
KINDS |= {
    kl.DropPath: {"rate": "fraction", "mode": "sample|batch"} | DRAWN,
    kl.drop_path_rates: {"depths": "counts", "rate": "fraction"},
    kl.DropConnectDense: {"units": "count 1", "rate": "fraction", "drop_bias": "boolean"} | DRAWN,
    kl.DropConnectConv2D: {"filters": "count 1", "kernel_size": "size", "rate": "fraction", "drop_bias": "boolean"}
    | DRAWN,
    kl.DropBlock2D: {"rate": "fraction", "block_size": "count 1"} | DRAWN | FORMAT,
    kl.FractionalMaxPooling2D: {"pool_ratio": "ratio", "overlapping": "boolean", "mode": "random|pseudorandom"}
    | DRAWN
    | FORMAT,
    kopt.mc_predict: {
        "model": "a built model",
        "x": "batches",
        "n": "count 2",
        "batch_size": "count 1",
        "layers": "layers?",
        "seed": "count 0?",
        "verbose": "count 0",
    },
}
TRIED_ELSEWHERE = {  # the step makes `At`; others have a test file of their own
    kopt.At,
    kopt.Ensemble,
    kopt.RangeTest,
    kopt.curvature,
    kopt.Multipliers,
    kopt.describe,
    kopt.find_learning_rate,
    kopt.fine_tune,
    kopt.reinit_head,
    kl.drop_path_rates,  # which makes as long a list as one asks for
    kopt.landscape.Plane,
    kopt.landscape.Slice,
    kopt.landscape.plane,
    kopt.landscape.slice_1d,
    kopt.layer_decay,
    kopt.load_optimizer,
    kopt.mc_predict,
    kopt.minimize,
    kopt.minimize_fn,
    kopt.plot.Picture,
    kopt.plot.average,
    kopt.plot.groups,
    kopt.plot.history,
    kopt.plot.plane,
    kopt.plot.rate_range,
    kopt.plot.rates,
    kopt.landscape.Surface,
    kopt.landscape.Trajectories,
    kopt.landscape.trajectories,
    kopt.plot.schedule,
    kopt.plot.search,
    kopt.plot.trajectories,
    kopt.plot.slice_1d,
    kopt.plot.snapshots,
    kopt.update_bn,
    *(value for name, value in vars(kopt.tuner).items() if callable(value)),
}
PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (kopt, kopt.callbacks, kopt.data, kopt.landscape, kopt.layers, kopt.plot, kopt.schedules, kopt.tuner)
    for name, value in vars(module).items()
    if callable(value) and not name.startswith("_") and value.__module__.startswith("kopt")
}
NEEDED = {
    "nesterov": {"momentum": 0.9},
    "exclude_from_decay": {"l2": 0.1},
    "ema_overwrite_frequency": {"use_ema": True},
    "name": {"doc": "a slot"},
    "c2": {"c1": 1e-37},
    "gamma": {"mode": "exp_range"},
    "min_learning_rate": {"max_learning_rate": 3.4e38},
    "max_learning_rate": {"min_learning_rate": 1.2e-38},
    "validation_data": {"validate": "both"},
}
INSTEAD = {  # two arguments of which only one is given
    one: other
    for pair in (
        ("epochs", "steps"),
        ("cycle_epochs", "cycle_steps"),
        ("every_epochs", "every_steps"),
        ("rate", "base"),
        ("warmup_epochs", "warmup_steps"),
        ("decay_epochs", "decay_steps"),
    )
    for one, other in (pair, pair[::-1])
}
