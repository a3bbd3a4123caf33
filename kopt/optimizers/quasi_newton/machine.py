"""The whole of a method: from one evaluation to the point of the next. Pure functions, the same in `fit` and alone."""

from typing import Any, NamedTuple

from kopt.optimizers.quasi_newton import search
from kopt.optimizers.quasi_newton.search import Rules, Search

VECTORS = "point", "gradient", "direction", "trial"
DIFFERENCE = 0.1  # of two gradients of one point, in shares of the greater, that are not the same any more


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


def is_over(state: State, x, loss, gradient, rules: Rules, m):
    """Whether a method that has ended stays so: not if somebody has moved the point or changed what is minimised."""
    s = state.search
    is_same = (s.status == search.NOISY) | m.no(is_other(state, loss, gradient, rules, m))
    stays = m.equal(x, state.point) & is_same
    return (s.status != search.RUNNING) & (s.phase != search.RESTED) & stays


def advanced(state: State, x, loss, gradient, method, rules: Rules, m) -> State:
    """The state after `loss` and `gradient` were found at `x`.

    What was found is accepted, where the search asks for it or a point is known no better; or the search is narrowed;
    or, where it cannot be, it goes back to the best step that it has seen, or gives up. After a point that is accepted
    or given up comes a new direction, unless the point is to be evaluated once more, for noise.

    Where `x` is not the point of the trial, somebody else has moved it: the search begins anew there. Where it is moved
    back to the point that was accepted last, and the loss is what it was, what was learnt stays.
    """
    before, is_new = found_at(state, x, loss, gradient, rules, m)
    slope = m.dot(gradient, state.direction)
    finite = m.is_finite(loss) & m.all_finite(gradient)
    accepted = search.is_accepted(before, loss, slope, finite, rules, m)
    is_step = accepted & (before.phase >= search.SEARCHING)

    change, turn = x - state.point, gradient - state.gradient
    memory, learns = method.learnt(state.memory, before, change, turn, is_step, m)
    tried, is_done = search.narrowed(before, loss, slope, finite, rules, m)
    is_noisy = accepted & (before.phase == search.CHECKING) & is_other(state, loss, gradient, rules, m)
    norm = m.largest(gradient)
    s = m.merged(accepted, reached(before, loss, norm, is_step, learns, is_noisy, rules, m), tried)
    goes_back = m.no(accepted) & is_done & search.has_gain(tried, rules)  # the best step of this search is good enough
    gives_up = m.no(accepted) & is_done & m.no(goes_back)
    s = m.merged(goes_back, s._replace(phase=search.LAST, step=s.low), s)
    s = m.merged(gives_up, given_up(s, loss, norm, finite, m), s)

    checks = accepted & (before.phase == search.NEW) & is_new & rules.check_noise
    begins = (accepted | gives_up) & (s.status == search.RUNNING) & m.no(checks)
    state = State(
        s._replace(phase=m.where(checks, search.CHECKING, s.phase)),
        m.where(accepted | (before.phase == search.NEW), x, state.point),
        m.where(accepted | (before.phase == search.NEW), gradient, state.gradient),
        state.direction,
        state.trial,
        memory,
    )
    return aimed(state, begins, method, m)


def found_at(state: State, x, loss, gradient, rules: Rules, m) -> tuple[Search, Any]:
    """The search, one evaluation later, and whether it is a new one: elsewhere, or of another function."""
    s = state.search
    moved, ended = m.no(m.equal(x, state.trial)), s.status != search.RUNNING
    is_same = m.equal(x, state.point) & m.no(is_other(state, loss, gradient, rules, m))
    elsewhere = ended | (moved & m.no(is_same))
    is_new = elsewhere | (s.evaluations == 0)
    return s._replace(
        status=s.status * 0,
        phase=m.where(moved | ended, search.NEW, s.phase),
        evaluations=s.evaluations + 1,
        pairs=m.where(elsewhere, 0, s.pairs),  # 0: nothing that was learnt counts any more
        first_loss=m.where(is_new, loss, s.first_loss),
    ), is_new


def is_other(state: State, loss, gradient, rules: Rules, m):
    """Whether loss or gradient of the point that was accepted last differ by more than the order of a sum can make."""
    before, norm = state.search.loss, m.maximum(m.largest(gradient), state.search.norm)
    apart = m.abs(loss - before) > m.root_eps * m.maximum(m.abs(loss), m.abs(before))
    apart = apart | (m.is_finite(loss) != m.is_finite(before))
    turn = m.largest(gradient - state.gradient)
    return apart | ((turn > DIFFERENCE * norm) & (turn > rules.gtol))


def reached(s: Search, loss, norm, is_step, learns, is_noisy, rules: Rules, m) -> Search:
    """The search at a point that was accepted; whether it is the last."""
    ftol = 4 * m.eps if rules.ftol == "auto" else rules.ftol
    is_flat = is_step & (m.abs(s.loss - loss) <= ftol * m.maximum(m.abs(loss), m.abs(s.loss))) & (ftol > 0)
    flat = m.where(is_flat & m.no(rules.is_blind), s.flat + 1, 0)
    ended = m.where(loss <= s.first_loss, search.LOSS, search.STUCK)  # where each step is taken it may have risen
    status = m.where(flat >= search.FLAT_STEPS, ended, search.RUNNING)
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


def given_up(s: Search, loss, norm, finite, m) -> Search:
    """The search where no step is good: once more, along the gradient, if that was not tried; or the end."""
    is_start = (s.phase == search.NEW) & m.no(finite)
    return s._replace(
        status=m.where(is_start, search.NONFINITE, m.where(s.pairs > 0, search.RUNNING, search.STUCK)),
        pairs=s.pairs * 0,
        restarts=s.restarts + 1,
        loss=m.where(is_start, loss, s.loss),
        norm=m.where(is_start, norm, s.norm),
    )


def aimed(state: State, begins, method, m) -> State:
    """The state with the trial that comes next, along a new direction if a search begins."""
    s, gradient = state.search, state.gradient
    direction = m.cond(begins, lambda: method.direction(state, m), lambda: state.direction)
    slope = m.dot(gradient, direction)
    uphill = begins & m.no(m.is_finite(slope) & (slope < 0))
    s = s._replace(pairs=m.where(uphill, 0, s.pairs), restarts=s.restarts + m.where(uphill, 1, 0))
    direction, slope, step = m.cond(
        begins & (uphill | m.no(method.has_scale(s))),
        lambda: steepest(gradient, m),
        lambda: (direction, slope, m.number(1.0)),
    )
    grain = m.grain(state.point, direction)
    s = m.merged(begins, search.begun(s, slope, m.maximum(step, 2 * grain), grain), s)
    is_search = (s.status == search.RUNNING) & (s.phase != search.CHECKING)
    trial = m.cond(is_search, lambda: state.point + s.step * direction, lambda: state.point)
    return state._replace(search=s, direction=direction, trial=trial)


def steepest(gradient, m):
    """The direction against the gradient, of length 1, the slope along it, and a first step."""
    length = m.length(gradient)
    return -gradient / length, -length, m.minimum(m.number(1.0), length)
