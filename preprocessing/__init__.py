"""From a CT file on disk to model-ready voxels; knows nothing of models."""
