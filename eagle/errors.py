"""The errors a caller may meet. Each message is one line: what was given, what was expected, what to do.

The command line prints the message and exits with code 2; a Python caller gets the exception. All derive from
:class:`EagleError`, and from the built-in class a reader would expect (``ValueError``, ``FileNotFoundError``, ...).
"""


class EagleError(Exception):
    """Base of every error that a user can cause and mend."""


class ModelNotFoundError(EagleError, FileNotFoundError):
    """A model name, folder or hub id leads to no usable model."""

    def __str__(self) -> str:  # FileNotFoundError would format its args as errno and path
        return str(self.args[0]) if self.args else ""


class DownloadError(EagleError, ConnectionError):
    """Weights could not be fetched, or what arrived is not what was asked for."""


class CheckpointError(EagleError, ValueError):
    """A checkpoint is damaged, unsafe, or does not fit its target."""


class UnsupportedModelError(EagleError, ValueError):
    """The target model has a part that speculative decoding here cannot drive."""


class InvalidInputError(EagleError, ValueError):
    """An argument is outside what is allowed."""


class TrainingError(EagleError, RuntimeError):
    """Training cannot start or cannot go on."""


class OutOfMemoryError(EagleError, MemoryError):
    """The run needs more memory or disk space than there is."""
