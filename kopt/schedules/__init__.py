"""Formulas of time: each is a Keras schedule; most have a callback of the same name in `kopt.callbacks`."""

from kopt.schedules import algebra as _algebra  # noqa: F401  (what is saved as an expression is known from the start)
from kopt.schedules.base import Schedule as Schedule
from kopt.schedules.cycles import CosineRestarts as CosineRestarts
from kopt.schedules.cycles import CyclicalRate as CyclicalRate
from kopt.schedules.cycles import OneCycle as OneCycle
from kopt.schedules.decays import Constant as Constant
from kopt.schedules.decays import ExponentialDecay as ExponentialDecay
from kopt.schedules.decays import InverseSqrtDecay as InverseSqrtDecay
from kopt.schedules.decays import InverseTimeDecay as InverseTimeDecay
from kopt.schedules.decays import Staircase as Staircase
from kopt.schedules.decays import StepDecay as StepDecay
from kopt.schedules.ramps import CosineDecay as CosineDecay
from kopt.schedules.ramps import Linear as Linear
from kopt.schedules.ramps import PolynomialDecay as PolynomialDecay
from kopt.schedules.ramps import WarmUp as WarmUp
from kopt.schedules.ramps import WarmUpStableDecay as WarmUpStableDecay
