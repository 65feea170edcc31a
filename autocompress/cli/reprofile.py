"""`autocompress reprofile`: measure a front or a package again, here or with another profile."""

import argparse

from autocompress.cli import arguments
from autocompress.core.errors import InputError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("reprofile", help="measure a front or a package again: what changed, what still holds")
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="RUN|PACKAGE", help="directory of a run or of a package")
    parser.add_argument("--target", metavar="NAME|FILE", help="another profile (default: the recorded one)")
    arguments.add_host(parser)
    parser.add_argument("--research", type=int, default=0, metavar="N", help="further trials (not in this version)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what changed."""
    from autocompress.core.record import dump
    from autocompress.report.changes import print_changes
    from autocompress.reprofile import SCHEMA, reprofile

    if args.research:
        raise InputError(f"--research {args.research} is not in this version: reprofile measures what was found before")
    result = reprofile(args.path, args.target, args.on, progress=arguments.note)
    if args.json:
        arguments.print_json(dump(result, SCHEMA))
    else:
        print_changes(result)
    return 0
