"""`autocompress worker`: join a search whose record is in a database."""

import argparse

from autocompress.cli import arguments


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("worker", help="join a search as one more process")
    parser.set_defaults(run=run)
    parser.add_argument("--storage", required=True, metavar="URL", help="database of the record")
    parser.add_argument("--study", required=True, metavar="NAME", help="name of the study")
    parser.add_argument("--index", type=int, metavar="N", help="which of the workers that divide the seeds this is")
    parser.add_argument("--of", type=int, default=1, metavar="N", help="how many workers divide the seeds")
    parser.add_argument("--trials", type=int, metavar="N", help="trials to end at (default: the run's)")
    arguments.add_host(parser)
    parser.add_argument("--timeout", type=arguments.duration, metavar="30m", help="time after which no trial is begun")


def run(args: argparse.Namespace) -> int:
    """Work until the budget is spent."""
    from autocompress.driver import worker

    worker(args.storage, args.study, index=args.index, of=args.of, trials=args.trials, timeout=args.timeout, on=args.on)
    return 0
