"""`autocompress profile`: the shipped profiles, one for this machine, and what pays on a target."""

import argparse
from typing import TYPE_CHECKING

from autocompress.cli import arguments
from autocompress.core.errors import InputError

if TYPE_CHECKING:
    from autocompress.core.probe import Probe


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("profile", help="list, show, detect or probe hardware profiles")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("list", run_list, "names of the shipped profiles"),
        ("show", run_show, "one profile"),
        ("detect", run_detect, "write a profile for this machine to stdout"),
        ("probe", run_probe, "measure which choices pay for a task on a target"),
    ):
        action = actions.add_parser(name, help=text)
        action.set_defaults(run=run)
        if name == "show":
            action.add_argument("name", metavar="NAME", help="name of a profile, or a YAML file")
        if name == "detect":
            action.add_argument(
                "--base", metavar="NAME", help="start from this shipped profile: another runtime or device"
            )
        if name == "probe":
            action.add_argument("--target", required=True, metavar="NAME")
            action.add_argument("--task", required=True, metavar="TASK")
            arguments.add_host(action)
        arguments.add_json(action)


def run_list(args: argparse.Namespace) -> int:
    """Print name and description of each profile."""
    from autocompress.config import load_profile, profile_names

    found = {name: load_profile(name).description for name in profile_names()}
    if args.json:
        arguments.print_json({"schema": 1, "profiles": found})
    else:
        for name, description in found.items():
            print(f"{name}  {description}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print a profile: its file with all comments, or its values as JSON."""
    from autocompress.config import load_profile, profile_file
    from autocompress.core.record import dump

    profile = load_profile(args.name)
    if args.json:
        arguments.print_json(dump(profile, 1))
    else:
        print(profile_file(args.name).read_text(encoding="utf-8"), end="")
    return 0


def run_detect(args: argparse.Namespace) -> int:
    """Print the shipped profile that fits, with this machine's name and facts in it; say which others there are."""
    from autocompress.core.errors import unknown
    from autocompress.core.record import to_json
    from autocompress.detect import detect

    found = detect()
    if args.json:
        profiles = {d.name: {"runtime": d.runtime, "base": d.base, "profile": d.text} for d in found}
        machine = to_json(found[0].fingerprint)
        arguments.print_json({"schema": 1, "fingerprint": machine, "profile": found[0].text, "profiles": profiles})
        return 0
    bases = [d.base for d in found]
    if args.base not in (None, *bases):
        raise InputError(unknown("profile that fits this machine", args.base, bases))
    chosen = found[0] if args.base is None else found[bases.index(args.base)]
    print(chosen.text, end="")
    for other in found:
        if args.base is None and other is not chosen:
            arguments.note(f"{other.runtime} is usable too: autocompress profile detect --base {other.base}")
    return 0


def run_probe(args: argparse.Namespace) -> int:
    """Measure which choices pay for a task's model on a target, and keep that for its searches."""
    from autocompress.cli.search import anchored
    from autocompress.core.record import dump
    from autocompress.probe import SCHEMA, place, probe, write
    from autocompress.progress import open_progress

    shown = open_progress()
    try:
        found = probe(anchored(args.task), args.target, on=args.on, progress=shown)
    finally:
        shown.close()
    path = place(found)
    write(found, path)
    if args.json:
        arguments.print_json(dump(found, SCHEMA))
    else:
        print("\n".join(told(found)))
    arguments.note(f"kept in {path}: searches of {found.task} on {found.target} use it on this device")
    return 0


def told(probe: "Probe") -> list[str]:
    """Lines for people: what pays, what does not and why, where the stairs are."""
    from autocompress.core.probe import named

    lines = []
    for verdict in probe.verdicts:
        what = "pays" if verdict.faster and verdict.usable else "pays in bytes only" if verdict.pays(True) else "no"
        why = "" if what == "pays" else f": {verdict.why}"
        lines.append(f"{verdict.choice}{named(verdict.layers)}: {what}{why}")
    for stair in probe.stairs:
        widths = [f"[{w}]" if w in stair.edges else str(w) for w in stair.widths]
        lines.append(f"widths{named(stair.groups)}: {' '.join(widths)}")
    lines += [f"not measured, no time or nothing to time alone: {name}" for name in probe.left_out]
    return (
        [*lines, "widths in brackets are edges: the widest of those that run equally fast"] if probe.stairs else lines
    )
