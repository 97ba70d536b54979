"""What can go wrong, as one line a user can act on.

Every message says what is wrong, with numbers, and what to do. The command line prints it and exits with code 2.
"""


class TurbowanError(Exception):
    """Base of all errors raised on purpose by this package."""

    def __init_subclass__(cls) -> None:
        cls.__module__ = "turbowan.errors"  # what users see, also of a clone that ComfyUI loads by its path


class Note(UserWarning):
    """Something a user should know that is no error; programs show it as one line."""


class Stopped(Exception):
    """The user asked for an end. No error: a program that meets it ends with exit code 130."""


class RequestError(TurbowanError, ValueError):
    """A request that cannot be carried out: sizes, frame counts, steps, prompts."""


class CheckpointError(TurbowanError, ValueError):
    """A file that is missing, damaged, of a family we do not run, or not what its role needs."""


class MediaError(TurbowanError, ValueError):
    """An image that cannot be read, or a video that cannot be written."""


class MachineError(TurbowanError, RuntimeError):
    """Something this machine lacks: a device, memory, disk, a package."""
