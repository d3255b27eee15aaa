"""Errors that a user can cause, and mend: their message alone is shown, without a traceback."""


class UserError(Exception):
    """Base of all: says what is wrong, where, and what would be right."""


class ConfigError(UserError, ValueError):
    """A configuration that can't run: the message names the key and the value."""


class DataError(UserError):
    """A data set that is missing, damaged or too small."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another model."""


class TrainingError(UserError):
    """A run that can't go on, such as one whose loss stays non-finite."""


class PeerLost(UserError):
    """Another process of the job ended or hangs; each rank that is left says which."""
