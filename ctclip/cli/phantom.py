"""`ctclip phantom`: a synthetic cohort on disk."""


def phantom() -> None:
    """Write a synthetic CT-RATE-shaped cohort."""
