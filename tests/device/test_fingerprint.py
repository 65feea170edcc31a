"""Facts and disturbances, here and on machines laid out as files."""

from pathlib import Path

import psutil
import pytest

from autocompress.device.fingerprint import Machine, disturbances, fingerprint

RASPBERRY = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 asimdrdm asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b
"""
INTEL = "model name\t: Intel(R) Core(TM) i7\nflags\t\t: fpu avx2 fma avx_vnni ht\n"


def machine(root: Path, **files: str) -> Machine:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root=root)


def test_facts_of_this_machine_are_stable_and_name_the_runtime() -> None:
    first, second = fingerprint("onnxruntime", "1.0"), fingerprint("onnxruntime", "1.0")
    assert first == second
    assert first.facts["runtime"] == "onnxruntime 1.0"
    assert {"cpu_model", "cores", "flags", "memory", "os", "kernel", "python"} <= first.facts.keys()
    assert all(first.facts[name] for name in ("cpu_model", "cores", "memory", "os"))


def test_only_flags_that_choose_kernels_are_kept(tmp_path: Path) -> None:
    facts = fingerprint("r", "1", machine(tmp_path, proc__cpuinfo=INTEL)).facts
    assert facts["cpu_model"] == "Intel(R) Core(TM) i7"
    assert facts["flags"] == "avx2 fma avx_vnni"


def test_an_arm_board_has_its_name_and_features(tmp_path: Path) -> None:
    board = machine(tmp_path, proc__cpuinfo=RASPBERRY)
    (tmp_path / "proc/device-tree").mkdir()
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B\0")
    facts = fingerprint("r", "1", board).facts
    assert facts["cpu_model"] == "Raspberry Pi 5 Model B, implementer 0x41 part 0xd0b"
    assert facts["flags"] == "asimd asimddp"


@pytest.mark.parametrize(
    ("name", "text", "quota"),
    [
        ("sys__fs__cgroup__cpu.max", "150000 100000", 1.5),
        ("sys__fs__cgroup__cpu.max", "max 100000", None),
        ("proc__cpuinfo", "", None),
    ],
)
def test_quota_of_the_container(tmp_path: Path, name: str, text: str, quota: float | None) -> None:
    assert machine(tmp_path, **{name: text}).cpu_quota == quota


def test_quota_of_an_old_container(tmp_path: Path) -> None:
    old = {"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "50000", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"}
    assert machine(tmp_path, **old).cpu_quota == 0.5


def test_a_quiet_machine_has_nothing_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    cpufreq = "sys__devices__system__cpu__cpu0__cpufreq__scaling_governor"
    assert disturbances(machine(tmp_path, proc__cpuinfo=INTEL, **{cpufreq: "performance"})) == []


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "sys__devices__system__cpu__cpu0__cpufreq__scaling_governor",
            "powersave",
            "Frequency governor is 'powersave'",
        ),
        ("sys__devices__system__cpu__intel_pstate__no_turbo", "0", "Turbo is on"),
        ("sys__devices__system__cpu__cpufreq__boost", "1", "Turbo is on"),
        ("sys__fs__cgroup__cpu.max", "150000 100000", "may use 1.5 cores"),
        ("sys__class__power_supply__BAT0__status", "Discharging", "Running on battery (BAT0 discharging)"),
        ("proc__cpuinfo", "flags : avx2 hypervisor", "virtual machine"),
    ],
)
def test_each_disturbance_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, sentence: str
) -> None:
    quiet(monkeypatch)
    found = disturbances(machine(tmp_path, **{name: text}))
    assert len(found) == 1
    assert sentence in found[0]


def test_load_is_said_against_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (7.25, 0.0, 0.0))
    assert disturbances(machine(tmp_path)) == ["Load average is 7.2 on 4 cores: other programs are running."]


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs, nothing is swapped, four cores."""
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("autocompress.device.fingerprint.usable_cores", lambda: 4)
    swap = psutil.swap_memory()
    monkeypatch.setattr(psutil, "swap_memory", lambda: swap._replace(used=0))
