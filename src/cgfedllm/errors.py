"""Named errors. Each message says what was wrong, where, and what to do about it.

The command line prints the message of any `CgFedLlmError` without a traceback; everything else
is a bug and keeps its traceback.
"""

from __future__ import annotations


class CgFedLlmError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CgFedLlmError, ValueError):
    """A configuration key is unknown, badly typed, or contradicts another one."""


class ModelError(CgFedLlmError):
    """A base model cannot be found, loaded, or adapted as asked."""


class AdapterError(CgFedLlmError, ValueError):
    """An adapter or update does not fit the spec it is used with."""


class DataError(CgFedLlmError, ValueError):
    """A data set is missing, malformed, empty for a client, or cannot be partitioned."""


class PacketError(CgFedLlmError, ValueError):
    """Bytes received are not a valid packet for this run (damaged, foreign or stale)."""


class CodecError(CgFedLlmError, ValueError):
    """A codec was asked for something it cannot do (unknown name, bad options, bad input)."""


class CodecStateError(CgFedLlmError, ValueError):
    """A learned codec's state is missing, damaged, or of another codec, release or adapter."""


class PrivacyError(CgFedLlmError, ValueError):
    """A privacy budget or mechanism is asked for that does not exist, or the budget is spent."""


class SecureAggregationError(CgFedLlmError):
    """Secure aggregation cannot go on, or was asked for what would give a client's update away."""


class TrainingError(CgFedLlmError):
    """Local training cannot go on (for example the loss is no longer finite)."""


class CheckpointError(CgFedLlmError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class RecordingError(CgFedLlmError, ValueError):
    """A recording is missing, damaged, foreign, or holds nothing of what was asked for."""


class StorageError(CgFedLlmError, OSError):
    """A file could not be written; what was there before is untouched."""


class FederationError(CgFedLlmError):
    """A federated run cannot go on (for example too few clients gave a usable reply)."""


class ReferenceMissingError(CgFedLlmError):
    """A client was sent an increment on a global adapter it does not hold."""


class CodecStateMissingError(CodecStateError):
    """A client was sent something that builds on a codec state it does not hold."""


class MissingExtraError(CgFedLlmError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""


class RunInterrupted(CgFedLlmError):
    """The user stopped the run; everything finished so far is on disk."""
