"""Errors that a user can cause and fix; commands print their message without a traceback."""


class UserError(Exception):
    """Base class. The message states what is wrong, where, and what would be right."""


class ConfigError(UserError, ValueError):
    """An invalid configuration; the message names the key and the value."""


class DataError(UserError):
    """A dataset that is missing, damaged or too small."""


class SourceUnavailable(DataError):
    """A remote dataset that does not respond, as opposed to one that is missing."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another model."""


class NonFiniteError(CheckpointError):
    """Weights or moments that are infinite or nan, which are never saved."""


class TrainingError(UserError):
    """A run that can't continue, such as one whose loss stays non-finite."""


class PeerLost(UserError):
    """Another process of the job exited or hangs; every remaining rank reports which."""


class OutOfMemory(UserError):
    """The memory of a device or machine ran out on this rank; the message names keys that would help."""
