"""Profiles for this machine: the shipped ones that fit it, renamed, under what the machine says of itself."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autocompress.core.errors import TargetError
from autocompress.core.measurement import Fingerprint

DOT_PRODUCT_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A shipped profile, and how a machine that it is for is recognised.

    Attributes:
        says: pattern of what stands in the processor's name or architecture; empty for any.
        device: of its own beside the processor: it is offered beside the one for the processor.
    """

    profile: str
    runtime: str
    says: str = ""
    device: bool = False


# For the processor the first row of a runtime that fits is taken.
BASES = (
    Base(profile="raspberry-pi-5-onnxruntime", runtime="onnxruntime", says="Raspberry Pi 5"),
    Base(profile="aarch64-onnxruntime", runtime="onnxruntime", says="aarch64"),
    Base(profile="cpu-onnxruntime", runtime="onnxruntime"),
    Base(profile="cuda-onnxruntime", runtime="onnxruntime", device=True),
    Base(profile="cpu-openvino", runtime="openvino"),
    Base(profile="gpu-openvino", runtime="openvino", device=True),
    Base(profile="npu-openvino", runtime="openvino", device=True),
    Base(profile="raspberry-pi-5-litert", runtime="litert", says="Raspberry Pi 5"),
    Base(profile="aarch64-litert", runtime="litert", says="aarch64"),
    Base(profile="cpu-litert", runtime="litert"),
    Base(profile="jetson-tensorrt", runtime="tensorrt", says="Jetson|Orin"),
    Base(profile="nvidia-tensorrt", runtime="tensorrt"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """A profile for this machine as YAML, made from the shipped one named `base`."""

    name: str
    runtime: str
    base: str
    fingerprint: Fingerprint
    text: str


def detect() -> list[Detected]:
    """One profile for each usable runtime and device, in the order of BASES.

    Raises:
        TargetError: no runtime is usable here.
    """
    found: list[Detected] = []
    for base, facts in _fitting():
        name, text = profile_text(base, facts)
        found.append(Detected(name=name, runtime=base.runtime, base=base.profile, fingerprint=facts, text=text))
    if not found:
        raise TargetError("no runtime is usable here: `autocompress doctor` says how to install one")
    return found


def _fitting() -> Iterator[tuple[Base, Fingerprint]]:
    """Rows of BASES that this machine can use, with its facts and its device's."""
    from autocompress.config import load_profile, profile_names
    from autocompress.device.fingerprint import fingerprint
    from autocompress.device.runtime import RUNTIMES, TellsFacts, get_runtime

    shipped, taken = profile_names(), set()
    for base in BASES:
        if base.runtime not in RUNTIMES or base.profile not in shipped or (base.runtime in taken and not base.device):
            continue
        runtime = get_runtime(base.runtime)
        available = runtime.available()
        if not available.usable:
            continue
        facts = dict(fingerprint(base.runtime, available.version or "unknown").facts)
        if not re.search(base.says, f"{facts['cpu_model']}, {facts['arch']}"):
            continue
        if isinstance(runtime, TellsFacts):
            try:
                facts |= runtime.facts(load_profile(base.profile).options)
            except TargetError:  # the runtime does not see this device
                continue
        elif base.device:
            continue
        if not base.device:
            taken.add(base.runtime)
        yield base, Fingerprint(facts=facts)


def profile_text(base: Base, machine: Fingerprint) -> tuple[str, str]:
    """Name and YAML of the shipped profile for this machine: renamed, with the arithmetic that its device has."""
    from autocompress.config import load_profile, profile_file

    facts, shipped = machine.facts, load_profile(base.profile)
    model = facts.get("device" if base.device else "cpu_model", base.profile)
    name = re.sub(r"[^a-z0-9]+", "-", f"{model}-{base.runtime}".lower()).strip("-")
    text = profile_file(base.profile).read_text(encoding="utf-8")
    body = text[text.index("\nname:") + 1 :]
    values = {"name": name, "description": json.dumps(f"{shipped.description}, detected on {model}")}
    if has := facts.get("float_precisions", "").split():
        values["float_precisions"] = f"[{', '.join(p for p in shipped.float_precisions if p in has)}]"
    for key, value in values.items():
        line = f"{key}: {value}".replace("\\", r"\\")
        body = re.sub(rf"^{key}: .*$", line, body, count=1, flags=re.M)
    lines = [f"# {key}: {' '.join(fact.split())}" for key, fact in facts.items()]
    note = [] if base.device else [f"# {line}" for line in _note(base, facts)]
    return name, "\n".join(["# Detected on this machine:", *lines, "#", *note, body])


def _note(base: Base, facts: Mapping[str, str]) -> list[str]:
    """What 8 bits gain on this processor, as far as its flags tell."""
    fast = [flag for flag in DOT_PRODUCT_FLAGS if flag in facts.get("flags", "").split()]
    if fast:
        return [f"8-bit dot products in hardware ({', '.join(fast)}): w8a8 runs faster than float here."]
    lines = ["No 8-bit dot products in hardware were found: w8a8 gains less here."]
    if base.runtime == "onnxruntime" and facts.get("arch") == "x86_64":
        lines += [
            "Without them 8-bit weights overflow, and a search takes 7 bits by itself;",
            "it measures what that is worth, nothing needs to be changed here.",
        ]
    return lines
