"""Pictures of records. They need matplotlib: `pip install kopt[plot]`."""

from kopt.plot.curves import average as average
from kopt.plot.curves import history as history
from kopt.plot.groups import groups as groups
from kopt.plot.judged import rates as rates
from kopt.plot.landscapes import plane as plane
from kopt.plot.landscapes import slice_1d as slice_1d
from kopt.plot.learning_rates import rate_range as rate_range
from kopt.plot.learning_rates import search as search
from kopt.plot.members import snapshots as snapshots
from kopt.plot.picture import Picture as Picture
from kopt.plot.schedules import schedule as schedule
from kopt.plot.trajectories import trajectories as trajectories
