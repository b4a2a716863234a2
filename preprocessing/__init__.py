"""From a CT file on disk to model-ready voxels; knows nothing of models."""

from preprocessing.errors import PreprocessingError
from preprocessing.pipeline import Prepared, prepare
from preprocessing.spec import PreprocessingSpec

__all__ = ["Prepared", "PreprocessingError", "PreprocessingSpec", "prepare"]
