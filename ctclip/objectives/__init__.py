"""What a run learns from: one objective a file, its configuration beside it, its paper in the docstring."""
