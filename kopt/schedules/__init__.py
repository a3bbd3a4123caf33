"""Formulas of time: each is a Keras schedule, and in `kopt.callbacks` a callback of the same name."""

from kopt.schedules import algebra as _algebra  # noqa: F401  (what is saved as an expression is known from the start)
from kopt.schedules.base import Schedule as Schedule
from kopt.schedules.cycles import CosineRestarts as CosineRestarts
from kopt.schedules.cycles import CyclicalRate as CyclicalRate
from kopt.schedules.cycles import OneCycle as OneCycle
from kopt.schedules.decays import Constant as Constant
from kopt.schedules.decays import CosineDecay as CosineDecay
from kopt.schedules.decays import ExponentialDecay as ExponentialDecay
from kopt.schedules.decays import InverseSqrtDecay as InverseSqrtDecay
from kopt.schedules.decays import InverseTimeDecay as InverseTimeDecay
from kopt.schedules.decays import Linear as Linear
from kopt.schedules.decays import PolynomialDecay as PolynomialDecay
from kopt.schedules.decays import Staircase as Staircase
from kopt.schedules.decays import StepDecay as StepDecay
from kopt.schedules.decays import WarmUp as WarmUp
from kopt.schedules.decays import WarmUpStableDecay as WarmUpStableDecay
