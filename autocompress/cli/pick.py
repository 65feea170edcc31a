"""`autocompress pick`: choose a point of a front and write it as a package."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.cli import arguments
from autocompress.core.errors import InputError

if TYPE_CHECKING:
    from autocompress.core.front import Front
    from autocompress.core.trial import Trial

PREFERENCES = ("knee", "fastest", "smallest", "most-accurate")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("pick", help="write the point that meets the limits as a package")
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="RUN", help="directory of a run")
    arguments.add_limits(parser)
    which = parser.add_mutually_exclusive_group()
    for name in PREFERENCES:
        which.add_argument(f"--{name}", dest="prefer", action="store_const", const=name, help=f"the {name} point")
    which.add_argument("--trial", type=int, metavar="N", help="this trial")
    parser.add_argument("--out", required=True, metavar="PACKAGE", help="directory to write")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Pick, write the package, and print what was picked."""
    from autocompress.core.front import Limits, point_json
    from autocompress.pack import write_package
    from autocompress.report import text
    from autocompress.run import open_run

    limits = arguments.limits_of(args)
    if args.trial is None and args.prefer is None and limits == Limits():
        raise InputError(f"say what to pick: a limit such as --max-accuracy-drop 0.5, --{', --'.join(PREFERENCES)}")
    if args.trial is not None and limits != Limits():
        raise InputError("--trial names the point itself: give it without limits")
    found = open_run(args.path)
    front = found.front()
    trial = front.pick(limits, prefer=args.prefer) if args.trial is None else _numbered(front, args.trial)
    package = write_package(found, trial, Path(args.out), limits=limits)
    assert trial.score is not None
    if args.json:
        arguments.print_json({"schema": 1, "package": str(package), "point": point_json(trial, front)})
        return 0
    fp32, int8 = text.baseline(front, "fp32"), text.baseline(front, "uniform-int8")
    lost = text.drop(trial.score, fp32)
    print(f"picked trial {trial.number}: {text.described(trial)}")
    print(f"  accuracy {text.accuracy(trial.score)}" + ("" if lost is None else f", {lost:.2f} points below fp32"))
    print(
        f"  latency {text.latency(trial.score)} ms: {text.compared(text.against_fp32(trial.score))} against fp32,",
        end=" ",
    )
    print(f"{text.compared(text.against(trial.score, int8) if int8 else None)} against uniform-int8")
    print(f"  size {text.size(trial.score.size_bytes)}, peak memory {text.size(trial.score.peak_memory_bytes)}")
    print(f"package: {package}")
    return 0


def _numbered(front: "Front", number: int) -> "Trial":
    known = {t.number: t for t in (*front.baselines.values(), *front.points)}
    if number not in known:
        shown = ", ".join(str(n) for n in sorted(known)) or "none"
        raise InputError(f"trial {number} is neither on the front nor a baseline; those are: {shown}")
    return known[number]
