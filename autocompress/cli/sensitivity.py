"""`autocompress sensitivity`: what each choice of a space loses and saves on a task's model, one at a time."""

import argparse
from pathlib import Path

from autocompress.cli import arguments


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("sensitivity", help="show what each choice of a space loses and saves by itself")
    parser.set_defaults(run=run)
    parser.add_argument("task", metavar="TASK", help="built-in name, file.py, file.py:name or module:name")
    parser.add_argument("--target", required=True, metavar="NAME|FILE", help="hardware profile")
    parser.add_argument("--space", default="default", metavar="NAME|FILE", help="search space (default: default)")
    parser.add_argument(
        "--timeout", type=arguments.duration, metavar="TIME", help="no probe is begun after it (default: 2m)"
    )
    arguments.add_host(parser)
    arguments.add_json(parser)
    parser.add_argument("--plot", metavar="FILE", help="write a picture: .html (self-contained) or .png")


def run(args: argparse.Namespace) -> int:
    """Probe, and print the table; with --plot also draw it."""
    from autocompress.cli.search import anchored
    from autocompress.core.record import dump
    from autocompress.core.sensitivity import SCHEMA
    from autocompress.progress import open_progress
    from autocompress.report.plot import check_path
    from autocompress.report.sensitivity import print_sensitivity, write_plot
    from autocompress.sensitivity import SECONDS, sensitivity

    if args.plot is not None:
        check_path(Path(args.plot))
    seconds = SECONDS if args.timeout is None else args.timeout
    shown = open_progress()
    try:
        found = sensitivity(
            anchored(args.task), args.target, space=args.space, on=args.on, seconds=seconds, progress=shown
        )
    finally:
        shown.close()
    if args.plot is not None:
        write_plot(found, Path(args.plot))
        arguments.note(f"wrote {args.plot}")
    if args.json:
        arguments.print_json(dump(found, SCHEMA))
    else:
        print_sensitivity(found)
    return 0
