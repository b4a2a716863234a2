"""The objectives of training: one per file, with its configuration beside it and its paper in the docstring."""
