"""`autocompress doctor`: what works here, what does not and how to install it, and what disturbs measuring."""

import argparse
import contextlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autocompress.cli import arguments

# Packages that an extra brings, beside the runtimes themselves, which are asked whether they work.
EXTRAS = {
    "search": ("torch", "optuna", "onnx", "onnxscript", "torch-pruning", "safetensors"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino", "nncf"),
    "tflite": ("ai-edge-litert", "litert-torch", "litert-quantizer"),
    "tensorrt": ("tensorrt", "cuda-bindings", "nvidia-ml-py"),
    "digits": ("scikit-learn",),
    "report": ("plotly", "matplotlib"),
}
# Programs that reach other devices: what prints their version, and the Debian package that brings them.
TOOLS = {"ssh": (("ssh", "-V"), "openssh-client"), "adb": (("adb", "version"), "adb")}


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's grammar."""
    parser = commands.add_parser("doctor", help="say what works here and what disturbs measuring")
    parser.set_defaults(run=run)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit code 3 where no runtime is usable."""
    found = examine()
    if args.json:
        arguments.print_json(found)
    else:
        _print(found)
    return 0 if any(runtime["usable"] for runtime in found["runtimes"].values()) else 3


def examine() -> dict[str, Any]:
    """Runtimes, ways to other devices, machine, disturbances, energy and extras."""
    import psutil

    from autocompress.device.fingerprint import disturbances, fingerprint
    from autocompress.device.meters import rapl_counter
    from autocompress.device.runtime import RUNTIMES
    from autocompress.run import library_versions

    runtimes = {name: _runtime(name) for name in RUNTIMES}
    usable = next(((name, found["version"]) for name, found in runtimes.items() if found["usable"]), ("no runtime", ""))
    counter = rapl_counter()
    return {
        "schema": 1,
        "runtimes": runtimes,
        "hosts": {name: _tool(*command) for name, command in TOOLS.items()},
        "machine": dict(fingerprint(*usable).facts),
        "load": psutil.getloadavg()[0],
        "frequency_mhz": _frequency(),
        "disturbances": disturbances(),
        "energy_reason": counter if isinstance(counter, str) else None,
        "extras": {extra: _missing(packages) for extra, packages in EXTRAS.items()},
        "versions": library_versions(),
    }


def _runtime(name: str) -> dict[str, Any]:
    """Whether it works here, and what its device says of itself where it has one."""
    from autocompress.core.errors import TargetError
    from autocompress.core.record import to_json
    from autocompress.device.runtime import TellsFacts, get_runtime

    runtime = get_runtime(name)
    found = runtime.available()
    device: dict[str, str] = {}
    if found.usable and isinstance(runtime, TellsFacts):
        with contextlib.suppress(TargetError):  # usable, but not with the options that it has by default
            device = dict(runtime.facts({}))
    return {**to_json(found), "device": device}


def _frequency() -> float | None:
    """Megahertz now, None where the kernel shows none."""
    import psutil

    shown: Any = psutil.cpu_freq()  # None in many containers, which its stubs do not say
    return None if shown is None else float(shown.current)


def _tool(command: tuple[str, ...], package: str) -> dict[str, Any]:
    """Whether a program runs, what it says of its version, and how to install it."""
    install = f"apt-get install {package}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"{command[0]} is not installed" if isinstance(error, FileNotFoundError) else str(error)
        return {"usable": False, "version": None, "reason": reason, "install": install}
    said = next(iter((done.stdout + done.stderr).splitlines()), "").strip()
    if done.returncode:
        return {"usable": False, "version": None, "reason": f"{command[0]} fails: {said}", "install": install}
    return {"usable": True, "version": said, "reason": "", "install": install}


def _missing(packages: tuple[str, ...]) -> list[str]:
    missing = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    return missing


def _print(found: dict[str, Any]) -> None:
    for title, what in (("Runtimes", found["runtimes"]), ("Other devices", found["hosts"])):
        print(title)
        for name, one in what.items():
            if one["usable"]:
                print(f"  {name} {one['version']}: usable")
                for key, value in one.get("device", {}).items():
                    print(f"    {key}: {value}")
            else:
                way_out = "" if one["install"] in one["reason"] else f"\n    {one['install']}"
                print(f"  {name}: not usable: {one['reason']}{way_out}")
    print("Extras")
    for extra, missing in found["extras"].items():
        state = f"missing {', '.join(missing)}\n    pip install 'autocompress[{extra}]'" if missing else "installed"
        print(f"  {extra}: {state}")
    print("Machine")
    for name, value in found["machine"].items():
        print(f"  {name}: {value}")
    mhz = found["frequency_mhz"]
    print(f"  load: {found['load']:.2f}\n  frequency: {'not shown' if mhz is None else f'{mhz:.0f} MHz'}")
    print(f"  energy: {'can be read' if found['energy_reason'] is None else found['energy_reason']}")
    print("What disturbs measuring")
    for sentence in found["disturbances"] or ("Nothing was seen.",):
        print(f"  {sentence}")
    print("Versions")
    print(f"  {', '.join(f'{name} {text}' for name, text in found['versions'].items())}")
