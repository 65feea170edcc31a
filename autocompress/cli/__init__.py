"""The command line: one file a command. Results go to stdout, progress, logs and errors to stderr.

Exit codes: 0 done · 1 nothing meets the limits, or a package no longer gives its figures · 2 bad usage, file or task ·
3 target or runtime not usable here · 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from autocompress.cli import doctor, front, pick, profile, report, reprofile, search, sensitivity, verify, worker
from autocompress.core.errors import AutocompressError

COMMANDS = (doctor, profile, sensitivity, search, front, pick, verify, reprofile, report, worker)
DEBUG_VARIABLE = "AUTOCOMPRESS_DEBUG"
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    parser = argparse.ArgumentParser(
        prog="autocompress",
        description="Search for compressed models on a device: every point is a real file, scored and timed there.",
        epilog="exit codes: 0 done, 1 nothing meets the limits, 2 bad usage, file or task, "
        "3 target or runtime not usable here, 130 interrupted",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The one place where an error becomes a line and a code."""
    # torch's threads wait for each other by spinning, which beside a busy program made a forward pass 3.3 times
    # slower; read when OpenMP is loaded, so it is said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # numpy's matrices are small here, and its threads spin as well.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        args = build_parser().parse_args(argv)
        return int(args.run(args) or 0)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after bad usage
        return stop.code if isinstance(stop.code, int) else 2
    except AutocompressError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt as stop:
        return _fail(f"{str(stop) or 'interrupted'}; everything finished is kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        said = " ".join(str(error).split())
        return _fail(f"{type(error).__name__}: {said} (run with {DEBUG_VARIABLE}=1 for the traceback)", 2)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
