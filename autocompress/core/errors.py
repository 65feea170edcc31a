"""Everything autocompress raises on purpose.

::

    AutocompressError              exit code 2 unless said otherwise
    ├── InputError (ValueError)    bad usage, file or task
    │   ├── TaskError              the task does not do what a task must
    │   ├── ConfigError            a profile or a search space does not say what it must
    │   ├── RunError               a directory is no run, or the run is in use
    │   └── PackageError           a package is incomplete or was changed
    ├── TargetError (RuntimeError) exit code 3: target or runtime not usable here
    ├── NoPointError (LookupError) exit code 1: nothing meets the limits
    ├── VerifyError                exit code 1: a package no longer gives its recorded figures
    └── StageError (RuntimeError)  one candidate failed in one stage; the search goes on

A message says what was wrong, the value, and the way out, in one sentence or two.
"""

import difflib
from collections.abc import Iterable


class AutocompressError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(AutocompressError, ValueError):
    """Bad usage, file or task."""


class TaskError(InputError):
    """The task does not do what a task must."""


class ConfigError(InputError):
    """A profile or a search space does not say what it must."""


class RunError(InputError):
    """A directory is no run, or the run is in use."""


class PackageError(InputError):
    """A package is incomplete or was changed."""


class TargetError(AutocompressError, RuntimeError):
    """The target or its runtime is not usable here."""

    exit_code = 3


class NoPointError(AutocompressError, LookupError):
    """Nothing meets the limits."""

    exit_code = 1


class VerifyError(AutocompressError):
    """A package no longer gives its recorded figures."""

    exit_code = 1


class StageError(AutocompressError, RuntimeError):
    """One candidate failed in one stage of its evaluation."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: names the nearest one, then all."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {value!r}.{hint} I know: {', '.join(names) or 'none'}."
