"""`autocompress pick`: choose a point of a front and write it as a package."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.cli import arguments
from autocompress.core.errors import InputError

if TYPE_CHECKING:
    from autocompress.core.cascade import CascadeRecord
    from autocompress.core.front import Front, Limits
    from autocompress.core.trial import Score, Trial
    from autocompress.run import Run

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
    which.add_argument(
        "--cascade",
        action="store_true",
        help="two points: the large one answers where the small one is unsure; measured before it is written",
    )
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
    if args.cascade:
        return _pick_cascade(found, front, limits, args)
    trial = front.pick(limits, prefer=args.prefer) if args.trial is None else _numbered(front, args.trial)
    package = write_package(found, trial, Path(args.out), limits=limits)
    assert trial.score is not None
    if args.json:
        arguments.print_json({"schema": 1, "package": str(package), "point": point_json(trial, front)})
        return 0
    _show(f"trial {trial.number}: {text.described(trial)}", trial.score, front)
    print(f"package: {package}")
    return 0


def _pick_cascade(found: "Run", front: "Front", limits: "Limits", args: argparse.Namespace) -> int:
    from autocompress.cascade import find_cascade
    from autocompress.core.front import point_json
    from autocompress.core.record import to_json
    from autocompress.pack import refuse_taken, write_package

    refuse_taken(args.out)  # before minutes of measuring
    cascade = find_cascade(found, limits, progress=arguments.note)
    package = write_package(found, cascade, Path(args.out), limits=limits)
    if args.json:
        told = {
            name: value for name, value in to_json(cascade).items() if name not in ("small", "large", "measurement")
        }
        members = {name: point_json(getattr(cascade, name), front) for name in ("small", "large")}
        arguments.print_json({"schema": 1, "package": str(package), "cascade": members | told})
        return 0
    _show(f"a cascade: {cascade.name}", cascade.score, front)
    _show_members(cascade)
    print(f"package: {package}")
    return 0


def _show(what: str, score: "Score", front: "Front") -> None:
    from autocompress.report import text

    fp32, int8 = text.baseline(front, "fp32"), text.baseline(front, "uniform-int8")
    lost = text.drop(score, fp32)
    print(f"picked {what}")
    print(f"  accuracy {text.accuracy(score)}" + ("" if lost is None else f", {lost:.2f} points below fp32"))
    print(f"  latency {text.latency(score)} ms: {text.compared(text.against_fp32(score))} against fp32,", end=" ")
    print(f"{text.compared(text.against(score, int8) if int8 else None)} against uniform-int8")
    print(f"  size {text.size(score.size_bytes)}, peak memory {text.size(score.peak_memory_bytes)}")


def _show_members(cascade: "CascadeRecord") -> None:
    """What the two are, what was expected of them, and the single point that they beat."""
    from autocompress.report import text

    for trial in (cascade.small, cascade.large):
        assert trial.score is not None
        print(f"  trial {trial.number}: {text.described(trial)}; accuracy {trial.score.accuracy:.4f},", end=" ")
        print(f"{text.latency(trial.score)} ms")
    print(f"  trial {cascade.large.number} answers {cascade.share:.1%} of validation; expected were", end=" ")
    print(f"{cascade.expected_share:.1%}, accuracy {cascade.expected_accuracy:.4f} and", end=" ")
    print(f"{cascade.expected_latency_ms:.3g} ms")
    if cascade.score.test_accuracy is not None:
        print(f"  accuracy on test {cascade.score.test_accuracy:.4f}")
    if cascade.single is not None:
        faster = text.compared(text.against(cascade.score, cascade.single))
        print(f"  {faster} against trial {cascade.single.trial} alone, measured in turn")


def _numbered(front: "Front", number: int) -> "Trial":
    known = {t.number: t for t in (*front.baselines.values(), *front.points)}
    if number not in known:
        shown = ", ".join(str(n) for n in sorted(known)) or "none"
        raise InputError(f"trial {number} is neither on the front nor a baseline; those are: {shown}")
    return known[number]
