"""A profile and its device: where that is, by the profile or by `--on`, and what of the profile it can do."""

import dataclasses
from collections.abc import Mapping

from autocompress.core.errors import TargetError
from autocompress.core.measurement import Fingerprint
from autocompress.core.profile import Profile
from autocompress.device.hosts import LOCAL, parse_hosts
from autocompress.device.runtime import get_runtime

SATURATING = ("onnxruntime", "openvino")  # their x86 kernels without VNNI add products in saturating 16 bits
# Facts that devices of one kind share, so that each may time a part of one search.
KIND = ("cpu_model", "arch", "flags", "runtime")


def placed(profile: Profile, on: str | None) -> Profile:
    """The profile with its device at `on`, or where the profile says it is.

    Raises:
        InputError: that is no host.
    """
    profile = profile if on is None else dataclasses.replace(profile, host=on)
    parse_hosts(profile.host)
    return profile


def check_runtime(profile: Profile) -> None:
    """Say at once that the runtime is missing on this machine, where it is the device; another says so itself.

    Raises:
        TargetError: it is missing.
    """
    if parse_hosts(profile.host)[0] != LOCAL:
        return
    found = get_runtime(profile.runtime).available()
    if not found.usable:
        raise TargetError(f"runtime {profile.runtime!r} of {profile.name!r} is not usable: {found.reason}")


def check_kind(on: str, found: Fingerprint, known: Fingerprint) -> None:
    """Refuse to add to a record the latencies of another kind of device than those in it.

    Raises:
        TargetError: the fingerprints differ in what decides a latency.
    """
    changes = known.changes(found)
    differs = [f"{name} is {changes[name][1]!r}, not {changes[name][0]!r}" for name in KIND if name in changes]
    if differs:
        raise TargetError(f"{on} is not the kind of device that this run is measured on: {'; '.join(differs)}")


def fitted(profile: Profile, facts: Mapping[str, str]) -> tuple[Profile, dict[str, str]]:
    """The profile without what the device, by its fingerprint's facts, cannot do; what that is, and why."""
    from autocompress.export.qdq import integer_weight_bits

    has = facts.get("float_precisions", " ".join(profile.float_precisions)).split()
    lacking: dict[str, str] = {p: "the device has no such arithmetic" for p in profile.float_precisions if p not in has}
    bits = profile.integer_weight_bits
    if profile.runtime in SATURATING:
        bits = min(bits, integer_weight_bits(facts))
    kept = tuple(p for p in profile.float_precisions if p in has)
    if not kept:
        raise TargetError(f"the device computes in {', '.join(has)}, profile {profile.name} in {', '.join(lacking)}")
    return dataclasses.replace(profile, integer_weight_bits=bits, float_precisions=kept), lacking
