"""Arguments that several commands share, and how their text becomes values."""

import argparse
import json
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.core.front import Limits

LIMITS = {
    "--max-latency-ms": ("X", "latency at batch 1, milliseconds"),
    "--max-accuracy-drop": ("PP", "percentage points of the metric x 100 below fp32 on validation"),
    "--min-accuracy": ("A", "the metric on validation"),
    "--max-size-mb": ("X", "size of the file, megabytes (1,000,000 bytes)"),
    "--max-memory-mb": ("X", "peak memory, megabytes"),
}
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def duration(text: str) -> float:
    """Seconds from `90s`, `30m`, `1h30m` or a plain number of seconds."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise argparse.ArgumentTypeError(f"a duration is like 90s, 30m or 1h30m, got {text!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([hms])", text))


def names(text: str) -> tuple[str, ...]:
    """`accuracy,latency` as a tuple."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def host(text: str) -> str:
    """The name of one host, or of several, as it stands."""
    from autocompress.core.errors import InputError
    from autocompress.device.hosts import parse_hosts

    try:
        parse_hosts(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_host(parser: argparse.ArgumentParser) -> None:
    """`--on HOST`."""
    parser.add_argument(
        "--on",
        type=host,
        metavar="HOST",
        help="where the device is: local, ssh:user@host[:port] or adb:SERIAL (default: as the profile says)",
    )


def add_limits(parser: argparse.ArgumentParser, flags: tuple[str, ...] = tuple(LIMITS)) -> None:
    """Limits as numbers, None where not given."""
    for flag in flags:
        unit, text = LIMITS[flag]
        parser.add_argument(flag, type=float, metavar=unit, help=text)


def limits_of(args: argparse.Namespace) -> "Limits":
    """The limits that were given."""
    from autocompress.core.front import Limits

    given = {name: getattr(args, name, None) for name in (f[2:].replace("-", "_") for f in LIMITS)}
    return Limits(**given)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    json.dump(data, sys.stdout, indent=2)
    print()


def note(text: str) -> None:
    """A line for people who watch, on stderr."""
    print(text, file=sys.stderr, flush=True)
