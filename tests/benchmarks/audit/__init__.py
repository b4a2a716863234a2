"""Detection of planted faults by `ctclip audit` and related commands."""
