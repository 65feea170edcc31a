"""`autocompress verify`: does a package still give its recorded figures, where it stands?"""

import argparse
from pathlib import Path

from autocompress.cli import arguments


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("verify", help="check a package: hashes, latency and accuracy where it stands")
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="PACKAGE", help="directory of a package")
    arguments.add_host(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the figures then and now; VerifyError when they part."""
    from autocompress.core.record import to_json
    from autocompress.verify import verify_package

    result = verify_package(Path(args.path), on=args.on, progress=arguments.note)
    if args.json:
        arguments.print_json({"schema": 1, **to_json(result), "faults": list(result.faults)})
    else:
        for line in result.lines():
            print(line)
    result.require()
    return 0
