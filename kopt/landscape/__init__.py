"""What optimizers do on a surface, and what the loss of a model looks like: records, which `kopt.plot` draws."""

from kopt.landscape.records import Plane as Plane
from kopt.landscape.records import Slice as Slice
from kopt.landscape.slices import plane as plane
from kopt.landscape.slices import slice_1d as slice_1d
from kopt.landscape.surfaces import SURFACES as SURFACES
from kopt.landscape.surfaces import Surface as Surface
from kopt.landscape.trajectories import Trajectories as Trajectories
from kopt.landscape.trajectories import trajectories as trajectories
