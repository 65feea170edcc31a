"""`autocompress reprofile`: measure a front or a package again, here or with another profile, and search on."""

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
    parser.add_argument("--research", type=int, default=0, metavar="N", help="N further trials where ranks flipped")
    parser.add_argument("--out", metavar="RUN", help="directory of that search (default: beside the run)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what changed."""
    from autocompress.core.record import dump
    from autocompress.report.changes import print_changes
    from autocompress.reprofile import SCHEMA, reprofile
    from autocompress.research import open_researchable, research

    if args.research < 0:
        raise InputError(f"--research must be at least 0 trials, got {args.research}")
    source = open_researchable(args.path) if args.research else None
    result = reprofile(args.path, args.target, args.on, progress=arguments.note)
    found = None
    if source is not None:
        found = research(source, result, args.research, target=args.target, on=args.on, out=args.out, progress=True)
        arguments.note("no rank flipped: there is nothing to search for" if found is None else f"run: {found.path}")
    if args.json:
        document = dump(result, SCHEMA)
        if source is not None:
            document["research"] = None if found is None else str(found.path)
        arguments.print_json(document)
        return 0
    print_changes(result)
    if found is not None:
        from autocompress.cli.front import show

        show(found, as_json=False)
    return 0
