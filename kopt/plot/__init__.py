"""Pictures of records. They need matplotlib: `pip install kopt[plot]`."""

from kopt.plot.schedules import schedule as schedule
