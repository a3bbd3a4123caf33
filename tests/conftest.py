"""One process is one backend (KERAS_BACKEND) and one precision (KOPT_FLOATX=float64, or float32 if not set)."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
FLOATX = os.environ.get("KOPT_FLOATX", "float32")
if FLOATX == "float64":
    os.environ["JAX_ENABLE_X64"] = "1"

import hypothesis
import keras
import pytest

keras.config.set_floatx(FLOATX)
BACKEND = keras.backend.backend()

hypothesis.settings.register_profile("kopt", max_examples=30, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("kopt")


@pytest.fixture(autouse=True)
def fresh():
    """The same seed and the same layer names for every test."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
