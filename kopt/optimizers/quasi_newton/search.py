"""The line search as a machine: each evaluation of loss and gradient takes it from one state to the next.

A search goes along `x0 + step * direction`. What was evaluated is accepted, or it narrows the bracket in which the next
step lies; nothing is ever evaluated within another call, so that one training step is one evaluation.

A step is accepted by the strong Wolfe conditions, with `loss0` and `slope0 = gradient0 . direction < 0` at its start:

    loss <= loss0 + c1 * step * slope0    and    |slope| <= c2 * |slope0|

or, where the loss is flat to its precision, by Hager and Zhang's approximation of the first, which asks the slope:

    slope <= (2 * DELTA - 1) * slope0     and    loss <= loss0 + SLACK * eps * |loss0|

Where no step meets them, after `max_line_search` trials or because the bracket holds no other number, the best of those
that were too short is taken, if it lowers the loss. No point is accepted that is worse than the first.

Reference: Nocedal and Wright, "Numerical Optimization", 2nd ed., 2006, chapter 3. Hager and Zhang, "A new conjugate
gradient method with guaranteed descent and an efficient line search", SIAM Journal on Optimization 16(1), 2005.
"""

from typing import Any, NamedTuple

DELTA = 0.1  # of Hager and Zhang
SLACK = 100  # how many roundings of the loss they allow for
GROWTH = 4.0  # how much longer the next step may be while no step was too long; of Moré and Thuente, 1994
MARGIN = 0.1  # of a bracket: the next step stays so far from its ends
FLAT_STEPS = 5  # accepted steps in a row that gain no more than `ftol`, until that is the end

# Phases: no point is known; it is evaluated once more; a step is looked for; the next evaluation is to be taken; `fit`
# has ended where no search could begin, and the next one is to try again
NEW, CHECKING, SEARCHING, LAST, RESTED = range(5)
STATUS = "running", "gradient", "loss", "stuck", "nonfinite", "noisy"
RUNNING, GRADIENT, LOSS, STUCK, NONFINITE, NOISY = range(len(STATUS))


class Rules(NamedTuple):
    """What a search goes by."""

    line_search: str = "wolfe"
    c1: float = 1e-4
    c2: float = 0.9
    gtol: float = 1e-5
    ftol: float | str = "auto"
    max_line_search: int = 25
    check_noise: bool = False
    is_blind: bool = False  # whether there are only gradients, and no loss


class Search(NamedTuple):
    """The numbers of a search: first integers, then floats."""

    status: Any = RUNNING
    phase: Any = NEW
    iterations: Any = 0  # accepted steps
    evaluations: Any = 0
    trials: Any = 0  # evaluations in this search
    flat: Any = 0  # accepted steps in a row that gained next to nothing
    restarts: Any = 0  # how often the memory was forgotten
    pairs: Any = 0  # how many steps the memory has learnt from
    loss: Any = 0.0  # at the point that was accepted last
    first_loss: Any = 0.0  # at the start: no point is accepted that is worse
    norm: Any = 0.0  # of the gradient there: its largest entry
    taken: Any = 0.0  # the step that led there
    slope: Any = 0.0  # along the direction from there
    step: Any = 0.0  # the one that is evaluated next
    low: Any = 0.0  # the longest step that is too short, its loss and slope
    low_loss: Any = 0.0
    low_slope: Any = 0.0
    high: Any = 0.0  # the shortest step that is too long; 0 if there is none
    high_loss: Any = 0.0
    high_slope: Any = 0.0
    grain: Any = 0.0  # steps that differ by less lead to the same point


INTEGERS = tuple(name for name, value in Search._field_defaults.items() if isinstance(value, int))
FLOATS = tuple(name for name, value in Search._field_defaults.items() if isinstance(value, float))


def is_sufficient(s: Search, loss, slope, rules: Rules, m):
    """Whether the step has brought enough."""
    if rules.line_search == "gradient":
        return (slope <= (1 - 2 * DELTA) * m.abs(s.slope)) & (loss <= s.first_loss)
    gain = loss - s.loss  # two losses that are close differ exactly
    wolfe = gain <= rules.c1 * s.step * s.slope
    nearly = (slope <= (2 * DELTA - 1) * s.slope) & (gain <= SLACK * m.eps * m.abs(s.loss))
    return (wolfe | nearly) & (loss <= s.first_loss)


def is_accepted(s: Search, loss, slope, finite, rules: Rules, m):
    """Whether the search ends with what was evaluated."""
    if rules.line_search == "none":
        return finite
    fresh = s.phase <= CHECKING
    enough = is_sufficient(s, loss, slope, rules, m) & (m.abs(slope) <= rules.c2 * m.abs(s.slope))
    last = (s.phase == LAST) & (loss <= s.first_loss)
    return finite & (enough | last | fresh)


def has_gain(s: Search, rules: Rules):
    """Whether there is a step that lowers the loss, though not as it should be."""
    return (s.low > 0) & ((s.low_loss < s.loss) | rules.is_blind) & (s.phase == SEARCHING)


def begun(s: Search, slope, step, grain) -> Search:
    """A search along a new direction."""
    return s._replace(
        phase=s.phase * 0 + SEARCHING, trials=s.trials * 0, slope=slope, step=step,
        low=s.low * 0, low_loss=s.loss, low_slope=slope, high=s.low * 0, high_loss=s.low * 0, high_slope=s.low * 0,
        grain=grain,
    )  # fmt: skip


def narrowed(s: Search, loss, slope, finite, rules: Rules, m) -> tuple[Search, Any]:
    """The search after a step that was not accepted, with the next step, and whether there is none."""
    too_long = m.no(finite) | m.no(is_sufficient(s, loss, slope, rules, m)) | (slope >= 0)
    if rules.line_search == "none":
        too_long = m.no(finite)
    has_high = too_long | (s.high > 0)
    ahead = extrapolated(s, loss, slope, rules, m)
    high = (
        m.where(too_long, s.step, s.high),
        m.where(too_long, loss, s.high_loss),
        m.where(too_long, slope, s.high_slope),
    )
    low = m.where(too_long, s.low, s.step), m.where(too_long, s.low_loss, loss), m.where(too_long, s.low_slope, slope)
    width = high[0] - low[0]
    between = least_between(low, high, rules, m)
    step = m.where(has_high, m.where(m.is_finite(between), between, low[0] + MARGIN * width), ahead)
    done = (
        (s.trials + 1 >= rules.max_line_search)
        | (has_high & (width <= m.maximum(s.grain, 4 * m.eps * high[0])))
        | (s.phase != SEARCHING)
    )
    return s._replace(
        trials=s.trials + 1, step=step, low=low[0], low_loss=low[1], low_slope=low[2],
        high=high[0], high_loss=high[1], high_slope=high[2],
    ), done  # fmt: skip


def extrapolated(s: Search, loss, slope, rules: Rules, m):
    """A longer step than the last, which was too short: where the cubic has its least value, if that helps."""
    guess = cubic((s.low, s.low_loss, s.low_slope), (s.step, loss, slope), m)
    if rules.line_search == "gradient":
        guess = secant((s.low, s.low_loss, s.low_slope), (s.step, loss, slope), m)
    shortest, longest = s.step + 1.1 * (s.step - s.low), GROWTH * s.step
    return m.where(m.is_finite(guess) & (guess > s.step), m.clip(guess, shortest, longest), longest)


def least_between(low, high, rules: Rules, m):
    """A step within the bracket; not finite where its upper end is not."""
    width = high[0] - low[0]
    guess = (secant if rules.line_search == "gradient" else cubic)(low, high, m)
    guess = m.where(m.is_finite(guess), guess, low[0] + width / 2)
    inside = m.clip(guess, low[0] + MARGIN * width, high[0] - MARGIN * width)
    return m.where(m.is_finite(high[1]) & m.is_finite(high[2]), inside, float("nan"))


def cubic(one, other, m):
    """Where the cubic through two points, with their slopes, has its least value; not finite if it has none.

    Nocedal and Wright, (3.59).
    """
    (a, loss_a, slope_a), (b, loss_b, slope_b) = one, other
    theta = slope_a + slope_b - 3 * m.ratio(loss_a - loss_b, a - b)
    root = m.sign(b - a) * m.sqrt(theta * theta - slope_a * slope_b)
    return b - (b - a) * m.ratio(slope_b + root - theta, slope_b - slope_a + 2 * root)


def secant(one, other, m):
    """Where the line through two slopes is zero."""
    (a, _, slope_a), (b, _, slope_b) = one, other
    return b - slope_b * m.ratio(b - a, slope_b - slope_a)
