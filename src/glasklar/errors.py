"""The errors a caller may meet.

    GlasklarError
    ├── RecipeError        a recipe or another configuration is wrong
    ├── DataError          a source cannot be read or holds nothing usable
    ├── CheckpointError    weights or a run folder are damaged, incomplete or of another recipe
    ├── CapacityError      the machine or a limit does not allow it: memory, disk, cache, context
    │   └── BusyError      not now: too many requests, or more than a key's share; come again later
    ├── RecordError        a signature, a receipt or another part of the record cannot be read or used
    └── RequestError       what was asked of a model makes no sense: ids, sampling settings, messages

Every message names the offending value and the remedy. The command line turns them into exit code 2, the server
into HTTP 4xx (`BusyError`: 429, `CapacityError`: 503), once, at the edge.
"""


class GlasklarError(Exception):
    """Base of all errors that are the caller's to mend."""


class RecipeError(GlasklarError):
    pass


class DataError(GlasklarError):
    pass


class CheckpointError(GlasklarError):
    pass


class CapacityError(GlasklarError):
    pass


class BusyError(CapacityError):
    """`retry_after`: seconds after which it may be worth another try."""

    def __init__(self, message: str, retry_after: int = 2) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RecordError(GlasklarError):
    pass


class RequestError(GlasklarError):
    pass
