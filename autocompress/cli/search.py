"""`autocompress search`: search, then print the front."""

import argparse
from pathlib import Path

from autocompress.cli import arguments


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("search", help="search for compressed models of a task on a target")
    parser.set_defaults(run=run)
    parser.add_argument("task", metavar="TASK", help="built-in name, file.py, file.py:name or module:name")
    parser.add_argument("--target", required=True, metavar="NAME|FILE", help="profile to search for")
    parser.add_argument("--space", default="default", metavar="NAME|FILE", help="search space (default: default)")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="how candidates are made (default: as the space says)")
    parser.add_argument(
        "--objectives",
        type=arguments.names,
        default=("accuracy", "latency"),
        metavar="A,B",
        help="accuracy,latency and optionally size, memory, energy",
    )
    parser.add_argument("--trials", type=int, metavar="N", help="trials to end at (default: 100; none with --timeout)")
    parser.add_argument("--timeout", type=arguments.duration, metavar="30m", help="time for all of it")
    arguments.add_limits(parser, ("--max-latency-ms", "--max-accuracy-drop", "--max-size-mb", "--max-memory-mb"))
    parser.add_argument(
        "--fidelity", choices=("oneshot", "recover"), default="oneshot", help="recover: a ladder up to full training"
    )
    parser.add_argument(
        "--recover-steps", type=int, default=0, metavar="N", help="steps of a full recovery (default: by --timeout)"
    )
    parser.add_argument(
        "--sampler",
        choices=("surrogate", "nsga2", "tpe", "random"),
        default="surrogate",
        help="what proposes candidates",
    )
    parser.add_argument("--warm-start", metavar="RUN", help="begin with the weights and candidates of an earlier run")
    parser.add_argument("--storage", metavar="URL", help="database of the record (default: SQLite in the run)")
    parser.add_argument("--study", metavar="NAME", help="name in the storage (default: the run's)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the search")
    arguments.add_host(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling")
    parser.add_argument("--out", metavar="RUN", help="directory of the run (default: runs/<task>-<target>-<time>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Search and print the front of the run."""
    from autocompress.cli.front import show
    from autocompress.driver import search

    trials = 100 if args.trials is None and args.timeout is None else args.trials
    found = search(
        anchored(args.task),
        args.target,
        space=args.space,
        recipe=args.recipe,
        trials=trials,
        timeout=args.timeout,
        objectives=args.objectives,
        limits=arguments.limits_of(args),
        fidelity=args.fidelity,
        recover_steps=args.recover_steps,
        sampler=args.sampler,
        warm_start=args.warm_start,
        storage=args.storage,
        study=args.study,
        workers=args.workers,
        on=args.on,
        seed=args.seed,
        out=args.out,
        resume=args.resume,
        progress=True,
    )
    arguments.note(f"run: {found.path}")
    show(found, as_json=args.json)
    return 0


def anchored(task: str) -> str:
    """A reference to a file with an absolute path, so that the run can be used from anywhere; others as they are."""
    file, colon, name = task.partition(":")
    return f"{Path(file).resolve()}{colon}{name}" if file.endswith(".py") else task
