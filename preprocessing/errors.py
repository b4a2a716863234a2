"""The error class of this package. Every message names the file, the fault and the remedy."""

# What reading a file of values raises, and using them as if each had the expected type.
UNFIT = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


class PreprocessingError(Exception):
    """A scan, a table or a store that cannot be trusted. Its message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def counted(number: int, what: str, verbs: str = "") -> str:
    """``1 volume``, ``3 volumes``; with the ``verbs`` ``is|are``: ``1 volume is``, ``3 volumes are``."""
    one, _, several = verbs.partition("|")
    verb = one if number == 1 else several
    return f"{number} {what}" + "s" * (number != 1) + f" {verb}" * bool(verb)


def were(number: int) -> str:
    return "was" if number == 1 else "were"


def printable(text: str) -> str:
    """``text`` with control characters, undecodable bytes and halves of surrogate pairs written as escapes: file names
    may contain line feeds and terminal escape sequences."""
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
