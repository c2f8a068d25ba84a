"""Every error recloop raises on purpose, in one tree.

    RecloopError                 exit code 1
    ├── ConfigError              2  a recipe, a flag or a combination of them
    ├── DataError                3  a dataset or a raw file
    ├── RegistryError            4  versions on disk
    │   ├── NoVersionError          nothing has been published yet
    │   ├── CorruptVersionError     a manifest or a checksum does not hold
    │   └── NothingToLearnError     a version does not learn while it serves
    ├── EngineError              5  Ray, ports, storage, the event log
    │   ├── PortTakenError
    │   └── RefusedError            a server's answer is no
    ├── GateError                6  a run that finished, with figures below its bars
    └── InvalidEventError        a feedback event the guard refuses (an answer: HTTP 422)

Exit code 0 is success, 130 is Ctrl-C; an exception outside this tree is a defect and keeps its traceback.
"""


class RecloopError(Exception):
    """Base of the tree; its text is shown to a person as it is."""

    exit_code = 1


class ConfigError(RecloopError):
    """A setting is unknown or out of range; the text names key, value and fix."""

    exit_code = 2


class DataError(RecloopError):
    """A dataset or raw file is missing, malformed or of another shape than declared."""

    exit_code = 3


class RegistryError(RecloopError):
    """A version cannot be written, found or read."""

    exit_code = 4


class NoVersionError(RegistryError):
    """The registry has no published version."""


class CorruptVersionError(RegistryError):
    """A published file differs from its manifest; the text names the file."""


class NothingToLearnError(RegistryError):
    """A version answers from a classical system, which is fitted once."""


class EngineError(RecloopError):
    """Ray, a port, the storage or the event log is not usable."""

    exit_code = 5


class PortTakenError(EngineError):
    """Another process listens on the requested address."""


class RefusedError(EngineError):
    """A server has refused a request; the text is its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class GateError(RecloopError):
    """The run finished and its result breaks a promise (an event lost, an arm below its bar)."""

    exit_code = 6


class InvalidEventError(RecloopError):
    """One feedback event is refused; ``field`` is the offending field."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
