"""The one error class of this package; every message names the file, what is wrong with it and what to do."""


class PreprocessingError(Exception):
    """A scan, a table or a store that cannot be trusted as it is. Its message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """``text`` with what a terminal or a table must not be given written as escapes: a file may be called by line feeds,
    escape sequences, or bytes that are no text."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
