"""`autocompress doctor`: what works here, what does not and how to install it, and what disturbs measuring."""

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autocompress.cli import arguments

EXTRAS = {
    "search": ("torch", "optuna", "onnx", "onnxscript", "torch-pruning", "safetensors"),
    "digits": ("scikit-learn",),
    "report": ("plotly", "matplotlib"),
}


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
    """Runtimes, machine, disturbances and extras."""
    import psutil

    from autocompress.core.record import to_json
    from autocompress.device.fingerprint import disturbances, fingerprint
    from autocompress.device.runtime import RUNTIMES, get_runtime
    from autocompress.run import library_versions

    runtimes = {name: to_json(get_runtime(name).available()) for name in RUNTIMES}
    usable = next(((name, found["version"]) for name, found in runtimes.items() if found["usable"]), ("no runtime", ""))
    return {
        "schema": 1,
        "runtimes": runtimes,
        "machine": dict(fingerprint(*usable).facts),
        "load": psutil.getloadavg()[0],
        "frequency_mhz": _frequency(),
        "disturbances": disturbances(),
        "extras": {extra: _missing(packages) for extra, packages in EXTRAS.items()},
        "versions": library_versions(),
    }


def _frequency() -> float | None:
    """Megahertz now, None where the kernel shows none."""
    import psutil

    shown: Any = psutil.cpu_freq()  # None in many containers, which its stubs do not say
    return None if shown is None else float(shown.current)


def _missing(packages: tuple[str, ...]) -> list[str]:
    missing = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    return missing


def _print(found: dict[str, Any]) -> None:
    print("Runtimes")
    for name, runtime in found["runtimes"].items():
        if runtime["usable"]:
            print(f"  {name} {runtime['version']}: usable")
        else:
            print(f"  {name}: not usable: {runtime['reason']}\n    {runtime['install']}")
    print("Extras")
    for extra, missing in found["extras"].items():
        state = f"missing {', '.join(missing)}\n    pip install 'autocompress[{extra}]'" if missing else "installed"
        print(f"  {extra}: {state}")
    print("Machine")
    for name, value in found["machine"].items():
        print(f"  {name}: {value}")
    mhz = found["frequency_mhz"]
    print(f"  load: {found['load']:.2f}\n  frequency: {'not shown' if mhz is None else f'{mhz:.0f} MHz'}")
    print("What disturbs measuring")
    for sentence in found["disturbances"] or ("Nothing was seen.",):
        print(f"  {sentence}")
    print("Versions")
    print(f"  {', '.join(f'{name} {text}' for name, text in found['versions'].items())}")
