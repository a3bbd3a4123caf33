"""Learning-rate search on KerasTuner; imported when it is first asked for."""

try:
    import keras_tuner  # noqa: F401
except ImportError as error:  # KerasTuner needs more than it says
    raise ImportError(f"kopt.tuner needs `pip install keras-tuner six tensorboard`: {error}") from error

from kopt.tuner.result import SearchResult as SearchResult
from kopt.tuner.search import LearningRateSearch as LearningRateSearch
from kopt.tuner.spaces import learning_rate as learning_rate
from kopt.tuner.spaces import optimizer as optimizer
from kopt.tuner.wrap import wrap as wrap
