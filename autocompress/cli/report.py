"""`autocompress report`: one self-contained HTML page about a run."""

import argparse
from pathlib import Path

from autocompress.cli import arguments


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("report", help="write one HTML page about a run")
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="RUN", help="directory of a run")
    parser.add_argument("--out", metavar="FILE.html", help="file to write (default: report.html in the run)")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from autocompress.report.page import write_report
    from autocompress.run import open_run

    found = open_run(args.path)
    out = Path(args.out) if args.out else found.path / "report.html"
    write_report(found, out)
    if args.json:
        arguments.print_json({"schema": 1, "report": str(out)})
    else:
        print(out)
    return 0
