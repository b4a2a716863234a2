"""The one error class of this package; every message says what was found, in which file, and what to do."""


class PreprocessingError(Exception):
    """A scan, a table or a store that cannot be trusted as it is."""
