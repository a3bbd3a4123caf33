"""The vocabulary of a rule: the moment it is asked for, the state it keeps, the arguments it reads.

A rule is a pure function `rule(g, w, *slots, at, **arguments) -> (step, *slots)` of the gradient `g`, the weight `w`
and the slots; whoever calls it subtracts `step` from the weight. Inside a rule stand the paper's letters.
"""

import difflib
import inspect
from dataclasses import dataclass
from typing import Any

from kopt import _keras, backends, checks, numerics


class At:
    """The moment of a step: its number `t`, counted from 1, and the `learning_rate` at that step."""

    def __init__(self, t, learning_rate):
        self.t, self.learning_rate = t, learning_rate
        self._corrections = {}  # id of a beta, a number or tensor -> the beta, kept so that the id stays its own

    def afresh(self):
        """The same moment within a condition or a function of its own, whose tensors must not get out."""
        return At(self.t, self.learning_rate)

    def correction(self, beta):
        """`1 / (1 - beta**t)`, computed once a step however many weights ask for it."""
        if id(beta) not in self._corrections:
            self._corrections[id(beta)] = beta, 1 / numerics.bias_correction(beta, self.t)
        return self._corrections[id(beta)][1]


@dataclass(frozen=True)
class Slot:
    """State that a rule keeps for every weight: an array of the weight's shape, in float32 or wider."""

    name: str
    doc: str
    initial: float = 0.0

    def __post_init__(self):
        checks.text("name", self.name)
        checks.sentence("doc", self.doc)
        checks.finite("initial", self.initial)


@dataclass(frozen=True)
class Traits:
    """What a rule says of itself, so that it can be run in other ways than one variable after the other."""

    elementwise: bool = False
    kernel: str | None = None
    rests: bool = False


KERNELS = "sgd", "velocity", "gradient", "average", "adagrad", "adam", "amsgrad"


def elementwise(*, kernel: str | None = None, rests: bool = False):
    """Declare that a rule treats each entry of a weight by itself, whatever its shape and its neighbours.

    Such a rule may run on many variables laid together, on pieces of one, and on some of its rows, so it must not ask
    for a shape or a value, nor draw at random. Without the declaration a rule is called for each variable by itself,
    which is right for one that looks at a norm.

    Args:
        kernel: The kernel in `optimizers/kernels.py` that does the same, if there is one: it is called in its place.
        rests: Whether a gradient of zero leaves weight and slots as they are, so that rows without a gradient can be
            left alone.

    Example:
        >>> import kopt
        >>> @kopt.elementwise()
        ... def sign_descent(g, w, *, at):
        ...     return (at.learning_rate * keras.ops.sign(g),)
    """
    kernel = checks.optional(checks.one_of(*KERNELS))("kernel", kernel)
    traits = Traits(True, kernel, checks.boolean("rests", rests))

    def declare(rule):
        if hasattr(rule, "traits"):
            checks.refuse("rule", "a function that is not declared yet", rule)
        rule.traits = traits
        return rule

    return declare


def traits(rule) -> Traits:
    return getattr(rule, "traits", Traits())


MASTER = Slot("master", "the float32 weight behind a 16-bit one")


class Argument:
    """A constructor argument, declared once: `check` judges it when it is given and whenever it is assigned."""

    def __init__(self, check: checks.Check):
        self.check = check

    def __set_name__(self, owner, name):
        self.name = name

    def judged(self, optimizer, value: Any):
        """The value in plain Python, if it is right by itself and beside the other arguments."""
        value = self.check(self.name, value)
        if not optimizer.built:
            optimizer.check_together(optimizer.arguments() | {self.name: value})
        return value


class Declared:
    """What an optimizer can tell of the arguments that its class declares."""

    @classmethod
    def declared(cls) -> dict[str, Argument]:
        """The arguments that are a `Hyper` or a `Choice`, those of the constructor's signature first."""
        found = {n: a for base in reversed(cls.__mro__) for n, a in vars(base).items() if isinstance(a, Argument)}
        first = [name for name in inspect.signature(cls.__init__).parameters if name in found]
        return {name: found[name] for name in [*first, *found]}

    def arguments(self) -> dict:
        """The declared arguments with the values in use."""
        return {name: getattr(self, name) for name in self.declared()}

    def check_together(self, arguments: dict) -> None:
        """Refuse arguments that are right one by one but not together."""

    def refuse_unknown(self, name: str, value, allowed: list[str], renamed: dict[str, str]):
        """Refuse an argument that is not declared, and say which may have been meant."""
        near = [renamed[name]] if renamed.get(name) in allowed else difflib.get_close_matches(name, allowed, 1)
        hint = f"Did you mean `{near[0]}`?" if near else "It takes " + ", ".join(f"`{a}`" for a in allowed) + "."
        raise ValueError(f"`{type(self).__name__}` has no argument `{name}`. {hint} Received: {name}={value!r}")

    def shown(self, values: dict, defaults: dict) -> str:
        """The optimizer as an expression: of these values, those that are not the defaults."""
        defaults |= {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        given = {n: v for n, v in values.items() if not (v is None or v == defaults.get(n))}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


class Choice(Argument):
    """An argument that the step and its state are made from: it is fixed once the optimizer is built."""

    def __get__(self, optimizer, owner=None):
        return self if optimizer is None else optimizer.choices.get(self.name)

    def __set__(self, optimizer, value):
        if not optimizer.ready:  # Keras's constructor assigns its own defaults
            return
        judged, kept = self.judged(optimizer, value), optimizer.choices.get(self.name)
        if optimizer.built and (isinstance(judged, list) or judged != kept):
            allowed = f"as it was at build, {kept!r}: the step and its state were made from it"
            checks.refuse(self.name, allowed, value)
        optimizer.choices[self.name] = judged


class Hyper(Argument):
    """A number that the step reads from a variable: assign to it at any time, and the next step uses it.

    `opens_slot` says that the rule needs a slot only where the number is not zero: without the slot it stays zero.
    """

    def __init__(self, check: checks.Check, opens_slot: bool = False):
        super().__init__(check)
        self.opens_slot = opens_slot

    def __get__(self, optimizer, owner=None):
        if optimizer is None:
            return self
        variable = optimizer.hyper_variables.get(self.name)
        if variable is None:
            return None
        optimizer.known[self.name] = _keras.number(variable, optimizer.known[self.name])
        return optimizer.known[self.name]

    def __set__(self, optimizer, value):
        if not optimizer.ready:
            return
        variable = optimizer.hyper_variables.get(self.name)
        symbolic = variable is not None and backends.is_symbolic(value)  # in a step being traced: no value to judge yet
        value = value if symbolic else self.judged(optimizer, value)
        if (variable is None) != (value is None):
            kind = "None" if variable is None else "a number"
            raise ValueError(
                f"`{self.name}` must stay {kind}, as it was at the start, where 0.0 leaves the choice. "
                f"Received: {self.name}={value!r}"
            )
        if self.opens_slot and optimizer.built and (symbolic or value) and not optimizer.opens(self.name):
            raise ValueError(
                f"`{self.name}` must be 0, as it was at build: there is no slot for another value. "
                f"Received: {self.name}={value!r}"
            )
        if symbolic:
            variable.assign(value)
        elif variable is not None:
            _keras.assign(self.name, variable, value)
            optimizer.known[self.name] = value
