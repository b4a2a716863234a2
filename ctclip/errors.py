"""Errors that a user can act on, one class per layer. The command line prints the message and exits with code 2."""

from ctclip.preprocessing.errors import printable


class CtclipError(Exception):
    """Base of every error below. Its message names the file, what is wrong with it and what to do, in one printable
    line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(CtclipError):
    """A configuration that cannot be used: unknown key, wrong type, values that exclude each other."""


class DataError(CtclipError):
    """A cohort, report or label table that lacks data for the next step."""


class PhantomError(CtclipError):
    """A synthetic cohort that cannot be generated with the given options."""


class CheckpointError(CtclipError):
    """A checkpoint or model folder that is damaged, incomplete or of another kind."""


class TrainingError(CtclipError):
    """A run that cannot start, cannot continue, or has diverged."""


class PromptError(CtclipError):
    """A prompt set that cannot be used."""


class EvaluationError(CtclipError):
    """Predictions, labels or a protocol that cannot be scored together."""


class ExplanationError(CtclipError):
    """A finding that cannot be located, because the method, the encoder or the head does not support it."""
