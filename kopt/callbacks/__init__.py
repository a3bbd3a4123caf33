"""Callbacks for `fit`: they work with every optimizer, kopt's and Keras's."""

from kopt.callbacks.backup import BackupAndRestore as BackupAndRestore
from kopt.callbacks.cycles import CosineRestarts as CosineRestarts
from kopt.callbacks.cycles import CyclicalRate as CyclicalRate
from kopt.callbacks.cycles import MomentumAnneal as MomentumAnneal
from kopt.callbacks.cycles import OneCycle as OneCycle
from kopt.callbacks.decays import CosineDecay as CosineDecay
from kopt.callbacks.decays import ExponentialDecay as ExponentialDecay
from kopt.callbacks.decays import InverseSqrtDecay as InverseSqrtDecay
from kopt.callbacks.decays import InverseTimeDecay as InverseTimeDecay
from kopt.callbacks.decays import PolynomialDecay as PolynomialDecay
from kopt.callbacks.decays import Staircase as Staircase
from kopt.callbacks.decays import StepDecay as StepDecay
from kopt.callbacks.decays import WarmUp as WarmUp
from kopt.callbacks.finder import LearningRateFinder as LearningRateFinder
from kopt.callbacks.line_search import LineSearchMonitor as LineSearchMonitor
from kopt.callbacks.monitor import RateMonitor as RateMonitor
from kopt.callbacks.polyak import PolyakAveraging as PolyakAveraging
from kopt.callbacks.ratios import UpdateRatio as UpdateRatio
from kopt.callbacks.schedule import Schedule as Schedule
from kopt.callbacks.snapshots import SnapshotEnsemble as SnapshotEnsemble
from kopt.callbacks.unfreeze import StagedUnfreeze as StagedUnfreeze
