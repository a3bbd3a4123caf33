"""Pictures of records. They need matplotlib: `pip install kopt[plot]`."""

from kopt.plot.learning_rates import range_test as range_test
from kopt.plot.learning_rates import search as search
from kopt.plot.schedules import schedule as schedule
