"""`ctclip preprocess`: a cohort on disk to a store of model-ready volumes."""


def preprocess() -> None:
    """Bring every volume of a cohort to one geometry and keep it in a store."""
