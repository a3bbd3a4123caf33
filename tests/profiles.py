"""How many evaluations a method needs on each of `tests/problems.py`: kopt's and others', counted in the same way."""

import contextlib
import functools

import numpy as np

import kopt
from tests.problems import PROBLEMS, on_numpy, value_and_grad

CAP = 2000  # evaluations
TAU = {"float32": 1e-5, "float64": 1e-8}  # Moré and Wild: the share of f(start) - f* that may be left


def reached(problem, losses, tau):
    """How many evaluations it took to come to one of the minima, or None."""
    start = losses[0]
    for count, loss in enumerate(losses, start=1):
        for least in problem.optima:
            if -1e-6 * abs(least) - 1e-12 <= loss - least <= tau * (start - least):
                return count
    return None


class Solved(Exception):  # noqa: N818  it is no error
    """Ends a method that has come to where it should."""


class Counted:
    """A function of NumPy arrays that notes what it has returned; with `tau` it raises `Solved` when that is enough."""

    def __init__(self, problem, dtype, tau=None):
        self.problem, self.tau = problem, tau
        self.function, self.losses = function(problem, dtype), []

    def __call__(self, x):
        value, gradient = self.function(x)
        self.losses.append(float(value))
        if self.tau and reached(self.problem, [self.losses[0], self.losses[-1]], self.tau):
            raise Solved
        return value, gradient


@functools.cache
def function(problem, dtype):
    return on_numpy(problem, dtype)


def by_kopt(counted, dtype, method="lbfgs", **options):
    start = np.array(counted.problem.start, dtype)
    kopt.minimize_fn(counted, start, method, max_evals=CAP, gtol=0, ftol=0, **options)


def by_scipy(counted, dtype):
    """SciPy's L-BFGS-B, whose own arithmetic is float64 always, without its tolerances."""
    import scipy.optimize

    def both(x):
        value, gradient = counted(x.astype(dtype))
        return float(value), gradient.astype("float64")

    options = {"maxfun": CAP, "maxiter": CAP, "ftol": 0, "gtol": 0, "maxcor": 10}
    scipy.optimize.minimize(both, np.array(counted.problem.start), jac=True, method="L-BFGS-B", options=options)


def by_torch(counted, dtype):
    """torch's L-BFGS with the strong Wolfe search, without its tolerances."""
    import torch

    x = torch.tensor(counted.problem.start, dtype=getattr(torch, dtype))
    optimizer = torch.optim.LBFGS(
        [x], max_iter=CAP, max_eval=CAP, history_size=10, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure():
        value, gradient = counted(x.detach().numpy())
        x.grad = torch.as_tensor(gradient).clone()
        return torch.as_tensor(value)

    optimizer.step(closure)


def by_optax(counted, dtype):
    """optax's L-BFGS with its zoom search, which evaluates within its step: each step's loss, as often as it did."""
    import jax
    import jax.numpy as jnp
    import optax

    both = value_and_grad(counted.problem)
    optimizer = optax.lbfgs(memory_size=10)
    x = jnp.array(counted.problem.start, dtype)
    state = optimizer.init(x)

    def value(x):
        return both(x)[0]

    @jax.jit
    def step(x, state):
        loss, gradient = optax.value_and_grad_from_state(value)(x, state=state)
        updates, state = optimizer.update(gradient, state, x, value=loss, grad=gradient, value_fn=value)
        return optax.apply_updates(x, updates), state

    losses = counted.losses
    losses.append(float(value(x)))
    while len(losses) < CAP:
        x, state = step(x, state)
        evaluations = int(state[-1].info.num_linesearch_steps)
        if not evaluations or not np.isfinite(float(state[-1].value)):
            break
        losses += [np.inf] * (evaluations - 1) + [float(state[-1].value)]
        if reached(counted.problem, [losses[0], losses[-1]], counted.tau):
            break


PEERS = {"scipy": by_scipy, "torch": by_torch, "optax": by_optax}


def counts(by, dtype, tau=None, problems=PROBLEMS) -> dict:
    """The evaluations on each problem, None where it was not solved."""
    found, tau = {}, tau or TAU[dtype]
    for problem in problems:
        counted = Counted(problem, dtype, tau)
        with np.errstate(all="ignore"), contextlib.suppress(Solved):
            by(counted, dtype)
        found[problem.name] = reached(problem, counted.losses, tau)
    return found


def solved(found) -> int:
    return sum(count is not None for count in found.values())


def on_common(ours, theirs) -> tuple[int, int]:
    """The evaluations of both over the problems that both have solved."""
    common = [name for name in ours if ours[name] is not None and theirs[name] is not None]
    return sum(ours[name] for name in common), sum(theirs[name] for name in common)
