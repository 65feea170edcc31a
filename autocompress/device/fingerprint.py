"""What a machine says of itself, and what on it disturbs measuring."""

import os
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from autocompress.core.measurement import Fingerprint

# Instruction sets that decide which kernels a runtime takes: the same file is another program without them.
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

# Arm Ltd.'s cores by the number in their "CPU part", as in lscpu's table (util-linux, sys-utils/lscpu-arm.c).
_ARM_LTD = "0x41"
_ARM_CORES = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78", "0xd42": "Cortex-A78AE", "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510", "0xd47": "Cortex-A710", "0xd48": "Cortex-X2", "0xd49": "Neoverse-N2",
    "0xd4d": "Cortex-A715", "0xd4e": "Cortex-X3", "0xd4f": "Neoverse-V2",
}  # fmt: skip

# What the low bits of a Raspberry Pi's get_throttled say of now (raspberrypi.com, vcgencmd get_throttled).
_THROTTLED = ("its voltage is too low", "its clock is capped", "it is throttled", "it is at its soft temperature limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the kernel's files are; another root for a machine that is not this one."""

    root: Path = Path("/")

    def text(self, path: str) -> str | None:
        """A file's text without surrounding blanks, None where there is none."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip(" \n\0")
        except OSError:
            return None

    def paths(self, pattern: str) -> list[str]:
        """Files that fit a pattern, as `text` takes them, sorted."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))

    def number(self, path: str) -> int | None:
        """A file's whole number, None where there is none."""
        text = self.text(path)
        return int(text) if text and re.fullmatch(r"-?\d+", text) else None

    @property
    def cpuinfo(self) -> dict[str, str]:
        """/proc/cpuinfo: the first value of each key, keys in lower case."""
        found: dict[str, str] = {}
        for line in (self.text("proc/cpuinfo") or "").splitlines():
            key, separator, value = line.partition(":")
            if separator:
                found.setdefault(key.strip().lower(), value.strip())
        return found

    @property
    def cpu_model(self) -> str:
        """The processor's name; on ARM, where it has none, the board's, and how many cores of which kind."""
        info = self.cpuinfo
        if "model name" in info:
            return info["model name"]
        parts = (self.text("proc/device-tree/model"), self._arm_cores)
        return ", ".join(part for part in parts if part) or platform.processor() or platform.machine()

    @property
    def _arm_cores(self) -> str:
        text = self.text("proc/cpuinfo") or ""
        values = [re.findall(rf"^CPU {key}\s*: (\S+)", text, re.M) for key in ("implementer", "part")]
        counts = Counter(zip(*values, strict=False))
        return " + ".join(f"{n}x {_core_name(*core)}" for core, n in counts.items())

    @property
    def governor(self) -> str | None:
        """The frequency governor, of all that cores have; None where the kernel shows none."""
        found = {self.text(path) for path in self.paths("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
        return ", ".join(sorted(name for name in found if name)) or None

    @property
    def cpu_quota(self) -> float | None:
        """How many cores the container may use, None for no limit."""
        words = (self.text("sys/fs/cgroup/cpu.max") or "max").split()
        if words[0] != "max" and len(words) == 2:
            return int(words[0]) / int(words[1])
        quota, period = (self.text(f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
        return int(quota) / int(period) if quota and period and int(quota) > 0 else None

    @property
    def emulator(self) -> str | None:
        """The program that acts as another kind of processor for this one; None where the processor itself runs it.

        qemu-user speaks for the guest in /proc/self, and not in /proc/thread-self (its linux-user/syscall.c): the
        program that is really there is made for another processor than the one that believes to be.
        """
        real, claimed = (self.root / "proc" / name / "exe" for name in ("thread-self", "self"))
        try:
            if _elf_machine(real) == _elf_machine(claimed):
                return None
        except OSError:
            return None
        return real.resolve().name


def _elf_machine(program: Path) -> bytes:
    """For which processor a program is: `e_machine` in the header of an ELF file (man 5 elf)."""
    with program.open("rb") as file:
        return file.read(20)[18:]


def _core_name(implementer: str, part: str) -> str:
    known = _ARM_CORES.get(part) if implementer == _ARM_LTD else None
    return known or f"implementer {implementer} part {part}"


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint(runtime: str, version: str, machine: Machine | None = None) -> Fingerprint:
    """Facts that stay as long as the machine and its software do; no load, no clock readings."""
    machine = machine or Machine()
    info = machine.cpuinfo
    flags = set((info.get("flags") or info.get("features") or "").split())
    quota = machine.cpu_quota
    facts: dict[str, str | None] = {
        "cpu_model": machine.cpu_model,
        "arch": platform.machine(),
        "emulator": machine.emulator,
        "cores": str(usable_cores()),
        "cpu_quota": None if quota is None else f"{quota:g}",
        "flags": " ".join(f for f in _FLAGS if f in flags),
        "microcode": info.get("microcode"),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "os": _os(machine),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "runtime": f"{runtime} {version}",
        "governor": machine.governor,
    }
    return Fingerprint(facts={name: value for name, value in facts.items() if value is not None})


def _os(machine: Machine) -> str:
    for line in (machine.text("etc/os-release") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "PRETTY_NAME":
            return value.strip('"')
    return platform.platform(terse=True)


def disturbances(machine: Machine | None = None) -> list[str]:
    """What disturbs measuring on this machine now, a sentence each; empty where nothing is seen."""
    machine = machine or Machine()
    cores, load = usable_cores(), psutil.getloadavg()[0]
    quota, governor = machine.cpu_quota, machine.governor
    swapped, battery = psutil.swap_memory().used, _battery(machine)
    virtual = "hypervisor" in machine.cpuinfo.get("flags", "").split()
    found = (
        (load > 0.5 * cores, f"Load average is {load:.1f} on {cores} cores: other programs are running."),
        (cores == 1, "One core only: the system's own work interrupts every measurement."),
        (
            governor not in (None, "performance"),
            f"Frequency governor is {governor!r}: latencies move with the clock; 'performance' holds it.",
        ),
        *((True, sentence) for sentence in (*_hot(machine), *_held_down(machine))),
        (_turbo(machine), "Turbo is on: the clock depends on temperature and on the other cores."),
        (quota is not None, f"The container may use {quota} cores: it is stopped when it has used them up."),
        (swapped > 64 * 2**20, f"{swapped / 2**20:.0f} MiB are swapped out: memory is short."),
        (battery is not None, f"Running on battery ({battery}): the clock may be held down."),
        (virtual, "This is a virtual machine: its neighbours share the processor and do not show in the load."),
    )
    return [sentence for holds, sentence in found if holds]


def _hot(machine: Machine) -> list[str]:
    """Thermal zones at a temperature from which the kernel slows the machine down: a trip point of type passive."""
    found = []
    for zone in machine.paths("sys/class/thermal/thermal_zone*"):
        now = machine.number(f"{zone}/temp")
        kinds = [path for path in machine.paths(f"{zone}/trip_point_*_type") if machine.text(path) == "passive"]
        limits = [t for path in kinds if (t := machine.number(path.replace("_type", "_temp"))) is not None and t > 0]
        if now is not None and limits and now >= min(limits):
            name = machine.text(f"{zone}/type") or zone
            found.append(f"{name} is at {now / 1000:.0f} °C: from {min(limits) / 1000:.0f} °C on the clock is lowered.")
    return found


def _held_down(machine: Machine) -> list[str]:
    """A clock that may not go as high as it could, and what a Raspberry Pi's firmware says of itself."""
    cpufreq = "sys/devices/system/cpu/cpu0/cpufreq"
    allowed, top = (machine.number(f"{cpufreq}/{name}_max_freq") for name in ("scaling", "cpuinfo"))
    found = []
    if allowed is not None and top is not None and allowed < top:
        found.append(f"The clock may go to {allowed / 1000:.0f} MHz only, of {top / 1000:.0f} MHz.")
    for path in machine.paths("sys/devices/platform/soc*/*firmware*/get_throttled"):
        bits = int(machine.text(path) or "0", 16)
        found += [f"The board says that {what}." for i, what in enumerate(_THROTTLED) if bits >> i & 1]
    return found


def _turbo(machine: Machine) -> bool:
    boost = machine.text("sys/devices/system/cpu/cpufreq/boost")
    no_turbo = machine.text("sys/devices/system/cpu/intel_pstate/no_turbo")
    return boost == "1" or no_turbo == "0"


def _battery(machine: Machine) -> str | None:
    for supply in sorted((machine.root / "sys/class/power_supply").glob("BAT*")):
        status = machine.text(str(supply.relative_to(machine.root) / "status"))
        if status == "Discharging":
            return f"{supply.name} discharging"
    return None
