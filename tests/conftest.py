"""One process is one backend (KERAS_BACKEND) and one precision (KOPT_FLOATX=float64, or float32 if not set)."""

import gc
import itertools
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
FLOATX = os.environ.get("KOPT_FLOATX", "float32")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # JAX; tests/test_distribution.py
if FLOATX == "float64":
    os.environ["JAX_ENABLE_X64"] = "1"

import hypothesis
import keras
import pytest

keras.config.set_floatx(FLOATX)
BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":  # two devices for tests/test_distribution.py
    import tensorflow as tf
    from tensorflow.python.data.ops import dataset_ops
    from tensorflow.python.ops import gen_resource_variable_ops

    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
    make_handle = gen_resource_variable_ops.var_handle_op  # makes a kernel for each name: 0.4 ms
    gen_resource_variable_ops.var_handle_op = lambda *a, **k: make_handle(*a, **{**k, "debug_name": ""})

    def untuned(dataset):
        """Half the time that an iterator takes to make goes into tuning: 15 ms, and every `fit` makes one."""
        options = tf.data.Options()
        options.autotune.enabled = options.experimental_optimization.apply_default_optimizations = False
        return dataset.with_options(options)

    dataset_ops.DatasetV2._apply_debug_options = untuned

hypothesis.settings.register_profile("kopt", max_examples=30, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("kopt")


@pytest.fixture(autouse=True)
def fresh():
    """The same seed and the same layer names for every test."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="session")
def generator():
    """Hypothesis makes its generator in its first run and asks gc who holds it, which gc.freeze would hide."""
    hypothesis.find(hypothesis.strategies.none(), lambda value: True)


def pytest_configure(config):
    """Have JAX keep what it compiles, for other tests, processes and runs: most of the time it compiles the same."""
    if BACKEND == "jax" and hasattr(config, "cache"):
        import jax
        from jax._src.lru_cache import LRUCache

        def put(self, key, value):
            """In one piece: another process may be reading."""
            with tempfile.NamedTemporaryFile(dir=self.path, delete=False) as file:
                file.write(value)
            os.replace(file.name, self.path / f"{key}-cache")

        LRUCache.put = put
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


ENDED = itertools.count(1)


def pytest_runtest_teardown(item):
    """Let go of traced functions, which lie in cycles, while they are few: thousands at once take a minute."""
    if next(ENDED) % 10 == 0:
        gc.collect()
        gc.freeze()  # what is left now stays, most of it modules


def pytest_terminal_summary(terminalreporter):
    """Say how many values tests/test_bad_input.py has tried."""
    calls = [r for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", "") == "call"]
    cases = sum(value for report in calls for name, value in report.user_properties if name == "cases")
    if cases:
        terminalreporter.write_line(f"{cases} values of arguments taken or refused as declared")
