"""`autocompress front`: the front of a run as a table, as JSON, or as a picture."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.cli import arguments

if TYPE_CHECKING:
    from autocompress.run import Run


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("front", help="show the front of a run")
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="RUN", help="directory of a run")
    arguments.add_json(parser)
    parser.add_argument("--plot", metavar="FILE", help="write a picture: .html (self-contained) or .png")


def run(args: argparse.Namespace) -> int:
    """Print the front; with --plot also draw it."""
    from autocompress.run import open_run

    found = open_run(args.path)
    if args.plot is not None:
        from autocompress.report.plot import write_plot

        write_plot(found.front(), f"{found.config.task_name} on {found.config.profile.name}", Path(args.plot))
        arguments.note(f"wrote {args.plot}")
    show(found, as_json=args.json)
    return 0


def show(found: "Run", *, as_json: bool) -> None:
    """Print the front of a run on stdout."""
    trials, front = found.trials(), found.front()
    if as_json:
        from autocompress.report.document import front_json

        arguments.print_json(front_json(found, front, trials))
        return
    from autocompress.report.facts import facts_of, footer
    from autocompress.report.table import print_front

    facts = facts_of(found, front, trials)
    machine = f", {facts.fingerprint.label}" if facts.fingerprint else ""
    title = f"{found.config.task_name} on {found.config.profile.name}: {facts.trials} trials{machine}"
    print_front(front, title, footer(facts, front, trials))
