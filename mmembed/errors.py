"""Errors a user can act on.

Every message answers three questions: where (file:line of the record, key of the config), what was found, what to do.
"""

import difflib
from collections.abc import Iterable


class MmembedError(ValueError):
    """Base of every error that mmembed raises on purpose."""


class ConfigError(MmembedError):
    """A configuration key, value or combination that cannot work."""


class RecordError(MmembedError):
    """A data record that cannot be used. `where` is `file:line`; `kind` groups errors that are counted.

    One argument alone is the message: so a DataLoader passes on what a worker process raised.
    """

    def __init__(self, where: str, found: str = "", remedy: str = "", kind: str = "bad record") -> None:
        super().__init__(f"{where}: {found}. {remedy}" if found else where)
        self.where, self.found, self.remedy, self.kind = where, found, remedy, kind

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.where, self.found, self.remedy, self.kind)


class MediaError(MmembedError):
    """An image, video or audio that cannot be opened within the limits. `kind` groups errors that are counted."""

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


class CheckpointError(MmembedError):
    """A saved model that cannot be written, read, or does not fit."""


class Preempted(MmembedError):
    """A run that was asked to stop, did so with a complete checkpoint, and goes on when it is started again."""


class WorkerLost(MmembedError):
    """A process of a run is gone; the run goes on from its last checkpoint when it is started again."""


class CacheError(MmembedError):
    """A cache folder that cannot be written, mostly because the disk is full."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Says which known name was probably meant: `did you mean 'mean'?`, or lists them all.

    The only name that begins so is nearer than one that is alike: `latent` means latent_attention, not last_token.
    """
    names = sorted(known)
    longer = [other for other in names if name and other.startswith(name)]
    close = longer if len(longer) == 1 else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
