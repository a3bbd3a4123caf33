"""Methods that try what a model of the loss foretells, and trust the model by how well it has foretold."""

import numpy as np

from kopt.optimizers.quasi_newton import machine, search
from kopt.optimizers.quasi_newton.space import Values

ENOUGH = 1e-4  # of the decrease that was promised, for a step to be taken


class Foretold:
    """A minimisation on the host, one evaluation after another.

    A subclass says `loss_at(x)`, which is not finite where anything is not; `gradient_at(x)`, asked for after the loss,
    where a step is taken only; `learn(ratio, length)`, from how much of the promise a step of that length has kept; and
    `propose(loss)`, a step and the decrease that it promises.
    """

    def __init__(self, start, rules):
        self.rules, self.m, zeros = rules, Values(start), np.zeros_like(start)
        self.state = machine.State(search.Search(), start, zeros, zeros, start, ())
        self.promised = 0.0

    def go(self, limit) -> None:
        """Make evaluations until there are as many as the limit, or the method has ended."""
        with np.errstate(all="ignore"):
            while self.state.search.status == search.RUNNING and self.state.search.evaluations < limit:
                self._step()

    def _step(self) -> None:
        state, x = self.state, self.state.trial
        s = state.search._replace(evaluations=state.search.evaluations + 1)
        loss, is_first = self.loss_at(x), s.phase == search.NEW
        if is_first and not np.isfinite(loss):
            s = s._replace(status=search.NONFINITE, loss=loss, norm=np.nan)
            self.state = state._replace(search=s, gradient=np.full_like(x, np.nan))
            return
        kept = np.isfinite(loss) and self.promised > 0
        ratio = (s.loss - loss) / self.promised if kept else -np.inf
        length = float(np.linalg.norm((x - state.point).astype("float64")))
        if is_first or ratio > ENOUGH:
            state = state._replace(point=x, gradient=self.gradient_at(x))
            norm = self.m.largest(state.gradient)
            s = machine.reached(s, loss, norm, not is_first, False, False, self.rules, self.m)
            s = s._replace(phase=search.SEARCHING, taken=length)
        if not is_first:
            self.learn(ratio, length)
        status, trial = s.status, state.point
        if status == search.RUNNING:
            step, self.promised = self.propose(s.loss)
            trial = (state.point + step).astype(x.dtype)
            is_none = np.array_equal(trial, state.point) or not np.isfinite(trial).all()
            if is_none or not self.promised > self.m.eps * abs(s.loss) * 1e-3:
                status, trial = search.STUCK, state.point
        self.state = state._replace(search=s._replace(status=status), trial=trial)
