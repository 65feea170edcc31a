"""What a machine says of itself, and what on it disturbs measuring."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from autocompress.core.measurement import Fingerprint

# Instruction sets that decide which kernels a runtime takes: the same file is another program without them.
_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


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
        """The processor's name; on ARM the board's, with the core's implementer and part."""
        info = self.cpuinfo
        if "model name" in info:
            return info["model name"]
        board = self.text("proc/device-tree/model")
        core = " ".join(f"{k} {info[f'cpu {k}']}" for k in ("implementer", "part") if f"cpu {k}" in info)
        return ", ".join(part for part in (board, core) if part) or platform.processor() or platform.machine()

    @property
    def governor(self) -> str | None:
        """The frequency governor of the first core, None where the kernel shows none."""
        return self.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

    @property
    def cpu_quota(self) -> float | None:
        """How many cores the container may use, None for no limit."""
        words = (self.text("sys/fs/cgroup/cpu.max") or "max").split()
        if words[0] != "max" and len(words) == 2:
            return int(words[0]) / int(words[1])
        quota, period = (self.text(f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
        return int(quota) / int(period) if quota and period and int(quota) > 0 else None


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
        (_turbo(machine), "Turbo is on: the clock depends on temperature and on the other cores."),
        (quota is not None, f"The container may use {quota} cores: it is stopped when it has used them up."),
        (swapped > 64 * 2**20, f"{swapped / 2**20:.0f} MiB are swapped out: memory is short."),
        (battery is not None, f"Running on battery ({battery}): the clock may be held down."),
        (virtual, "This is a virtual machine: its neighbours share the processor and do not show in the load."),
    )
    return [sentence for holds, sentence in found if holds]


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
