"""The whole of a method: from one evaluation to the point of the next. Pure functions, the same in `fit` and alone."""

from typing import Any, NamedTuple

from kopt.optimizers.quasi_newton import search
from kopt.optimizers.quasi_newton.search import Rules, Search

VECTORS = "point", "gradient", "direction", "trial"
DIFFERENCE = 1e-2  # of two gradients of one point, in shares of the first, that are not the same any more


class State(NamedTuple):
    """Where a method stands."""

    search: Search
    point: Any  # that was accepted last
    gradient: Any  # there
    direction: Any  # in which the search goes from there
    trial: Any  # where it evaluates next
    memory: tuple  # what the method has learnt of the curvature


def begun(method, x, m) -> State:
    """The state before the first evaluation, which is to be at `x`."""
    numbers = Search(*(m.count(v) if isinstance(v, int) else m.number(v) for v in Search()))
    return State(numbers, x, m.zeros(x.shape), m.zeros(x.shape), x, method.empty(x, m))


def is_over(state: State, x, loss, m):
    """Whether a method that has ended stays so: not if somebody has moved the point or changed what is minimised."""
    s = state.search
    stays = m.equal(x, state.point) & ((s.status == search.NOISY) | m.no(is_other(loss, s.loss, m)))
    return (s.status != search.RUNNING) & stays


def advanced(state: State, x, loss, gradient, method, rules: Rules, m) -> State:
    """The state after `loss` and `gradient` were found at `x`.

    Where `x` is not the point of the trial, somebody else has moved it: the search begins anew there. Where it is moved
    back to the point that was accepted last, what was learnt stays.
    """
    before = found_at(state, x, loss, m)
    slope = m.dot(gradient, state.direction)
    finite = m.is_finite(loss) & m.all_finite(gradient)
    accepted = search.is_accepted(before, loss, slope, finite, rules, m)
    is_step = accepted & (before.phase >= search.SEARCHING)

    change, turn = x - state.point, gradient - state.gradient
    memory, learns = method.learnt(state.memory, before, change, turn, state.gradient, is_step, m)
    tried, is_done = search.narrowed(before, loss, slope, finite, rules, m)
    is_noisy = accepted & (before.phase == search.CHECKING) & differs(state, loss, gradient, rules, m)
    s = m.merged(accepted, reached(before, loss, m.largest(gradient), is_step, learns, is_noisy, rules, m), tried)
    goes_back = m.no(accepted) & is_done & search.has_gain(tried, rules)  # the best step of this search is good enough
    gives_up = m.no(accepted) & is_done & m.no(goes_back)
    s = m.merged(goes_back, s._replace(phase=search.LAST, step=s.low), s)
    s = m.merged(gives_up, given_up(s, finite, m), s)

    checks = accepted & (before.phase == search.NEW) & (before.evaluations == 1) & rules.check_noise
    begins = (accepted | gives_up) & (s.status == search.RUNNING) & m.no(checks)
    state = State(
        s._replace(phase=m.where(checks, search.CHECKING, s.phase)),
        m.where(accepted | (before.phase == search.NEW), x, state.point),
        m.where(accepted, gradient, state.gradient),
        state.direction,
        state.trial,
        memory,
    )
    return aimed(state, begins, method, m)


def found_at(state: State, x, loss, m) -> Search:
    """The search, one evaluation later; a new one if `x` is not where it was to be."""
    s = state.search
    moved, ended = m.no(m.equal(x, state.trial)), s.status != search.RUNNING
    elsewhere = ended | (moved & m.no(m.equal(x, state.point)))
    anew = elsewhere | (s.evaluations == 0)
    return s._replace(
        status=s.status * 0,
        phase=m.where(moved | ended, search.NEW, s.phase),
        evaluations=s.evaluations + 1,
        pairs=m.where(elsewhere, 0, s.pairs),  # 0: nothing that was learnt counts any more
        first_loss=m.where(anew, loss, s.first_loss),
    )


def differs(state: State, loss, gradient, rules: Rules, m):
    """Whether a second evaluation of one point says something else than the first."""
    if rules.is_blind:
        return m.largest(gradient - state.gradient) > DIFFERENCE * state.search.norm
    return is_other(loss, state.search.loss, m)


def is_other(loss, before, m):
    """Whether two losses differ by more than the order of a sum can make."""
    return m.abs(loss - before) > m.root_eps * m.maximum(m.abs(loss), m.abs(before))


def reached(s: Search, loss, norm, is_step, learns, is_noisy, rules: Rules, m) -> Search:
    """The search at a point that was accepted; whether it is the last."""
    ftol = 64 * m.eps if rules.ftol == "auto" else rules.ftol
    is_flat = is_step & (s.loss - loss <= ftol * m.maximum(m.abs(loss), m.abs(s.loss))) & (ftol > 0)
    flat = m.where(is_flat & m.no(rules.is_blind), s.flat + 1, 0)
    status = m.where(flat >= search.FLAT_STEPS, search.LOSS, search.RUNNING)
    status = m.where(norm <= rules.gtol, search.GRADIENT, status)
    return s._replace(
        status=m.where(is_noisy, search.NOISY, status),
        iterations=s.iterations + m.where(is_step, 1, 0),
        pairs=s.pairs + m.where(learns, 1, 0),
        flat=flat,
        loss=loss,
        norm=norm,
        taken=m.where(is_step, s.step, s.taken),
    )


def given_up(s: Search, finite, m) -> Search:
    """The search where no step is good: once more, along the gradient, if that was not tried; or the end."""
    status = m.where(s.pairs > 0, search.RUNNING, search.STUCK)
    status = m.where((s.phase == search.NEW) & m.no(finite), search.NONFINITE, status)
    return s._replace(status=status, pairs=s.pairs * 0, restarts=s.restarts + 1)


def aimed(state: State, begins, method, m) -> State:
    """The state with the trial that comes next, along a new direction if a search begins."""
    s, gradient = state.search, state.gradient
    direction = m.cond(begins, lambda: method.direction(state, m), lambda: state.direction)
    slope, steepest = m.dot(gradient, direction), m.dot(gradient, gradient)
    uphill = begins & m.no(m.is_finite(slope) & (slope < 0))
    s = s._replace(pairs=m.where(uphill, 0, s.pairs), restarts=s.restarts + m.where(uphill, 1, 0))
    direction, slope = m.where(uphill, -gradient, direction), m.where(uphill, -steepest, slope)
    step = m.where(method.has_scale(s), 1.0, m.minimum(1.0, m.ratio(1.0, m.sqrt(steepest))))
    s = m.merged(begins, search.begun(s, slope, step, m.grain(state.point, direction)), s)
    is_search = (s.status == search.RUNNING) & (s.phase != search.CHECKING)
    trial = m.cond(is_search, lambda: state.point + s.step * direction, lambda: state.point)
    return state._replace(search=s, direction=direction, trial=trial)
