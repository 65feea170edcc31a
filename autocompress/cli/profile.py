"""`autocompress profile`: the shipped profiles, and one for this machine."""

import argparse
import re
from typing import TYPE_CHECKING

from autocompress.cli import arguments
from autocompress.core.errors import InputError

if TYPE_CHECKING:
    from autocompress.core.measurement import Fingerprint

BASE = "cpu-onnxruntime"
DOT_PRODUCT_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("profile", help="list, show or detect hardware profiles")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("list", run_list, "names of the shipped profiles"),
        ("show", run_show, "one profile"),
        ("detect", run_detect, "write a profile for this machine to stdout"),
        ("probe", run_probe, "measure which choices pay on a target (not in this version)"),
    ):
        action = actions.add_parser(name, help=text)
        action.set_defaults(run=run)
        if name == "show":
            action.add_argument("name", metavar="NAME", help="name of a profile, or a YAML file")
        if name == "probe":
            action.add_argument("--target", required=True, metavar="NAME")
            action.add_argument("--task", required=True, metavar="TASK")
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
    """Print the shipped profile with this machine's name and facts in it."""
    from autocompress.core.record import to_json
    from autocompress.device.fingerprint import fingerprint
    from autocompress.device.runtime import get_runtime

    runtime = get_runtime("onnxruntime").available()
    found = fingerprint("onnxruntime", runtime.version or "not installed")
    if args.json:
        arguments.print_json({"schema": 1, "fingerprint": to_json(found), "profile": detected(found)})
    else:
        print(detected(found), end="")
    return 0


def run_probe(_: argparse.Namespace) -> int:
    """Not in this version."""
    raise InputError("`profile probe` is not in this version: `profile show` says what was measured for each profile")


def detected(machine: "Fingerprint") -> str:
    """YAML of a profile for this machine: the shipped one, renamed, under what the machine says of itself."""
    from autocompress.config import profile_file

    facts = machine.facts
    model = facts.get("cpu_model", "cpu")
    name = re.sub(r"[^a-z0-9]+", "-", f"{model}-onnxruntime".lower()).strip("-")
    fast = [flag for flag in DOT_PRODUCT_FLAGS if flag in facts.get("flags", "").split()]
    if fast:
        note = f"8-bit dot products in hardware ({', '.join(fast)}): w8a8 runs faster than float here."
    else:
        note = (
            "No 8-bit dot products in hardware were found: w8a8 gains less here. Without them 8-bit weights overflow\n"
            "# on x86, where a search takes 7 bits; it measures what that is worth, nothing needs to be changed here."
        )
    lines = [f"# {key}: {' '.join(value.split())}" for key, value in facts.items()]
    text = profile_file(BASE).read_text(encoding="utf-8")
    body = text[text.index("\nname:") + 1 :]
    body = re.sub(r"^name: .*$", f"name: {name}", body, count=1, flags=re.M)
    shown = model.replace('"', "'")
    body = re.sub(
        r"^description: .*$", lambda _: f'description: "ONNX Runtime on {shown}, one thread"', body, count=1, flags=re.M
    )
    return "\n".join(["# Detected on this machine:", *lines, "#", f"# {note}", body])
