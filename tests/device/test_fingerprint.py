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
    assert facts["cpu_model"] == "Raspberry Pi 5 Model B, 1x Cortex-A76"
    assert facts["flags"] == "asimd asimddp"


def test_cores_of_several_kinds_are_counted(tmp_path: Path) -> None:
    cores = [("0x41", "0xd05")] * 4 + [("0x41", "0xd41")] * 3 + [("0x51", "0x001")]
    text = "\n".join(f"processor : {i}\nCPU implementer : {m}\nCPU part : {p}\n" for i, (m, p) in enumerate(cores))
    model = machine(tmp_path, proc__cpuinfo=text).cpu_model
    assert model == "4x Cortex-A55 + 3x Cortex-A78 + 1x implementer 0x51 part 0x001"


def test_governors_of_several_kinds_of_cores_are_all_said(tmp_path: Path) -> None:
    of = "sys__devices__system__cpu__cpu{}__cpufreq__scaling_governor"
    files = {of.format(0): "schedutil", of.format(1): "schedutil", of.format(4): "performance"}
    assert machine(tmp_path, **files).governor == "performance, schedutil"


def test_a_zone_at_its_passive_trip_point_slows_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    zone = "sys__class__thermal__thermal_zone0__"
    files = {"type": "cpu-thermal", "temp": "84000", "trip_point_0_type": "critical", "trip_point_0_temp": "110000"}
    assert disturbances(machine(tmp_path, **{zone + k: v for k, v in files.items()})) == []
    passive = {"trip_point_1_type": "passive", "trip_point_1_temp": "80000"}
    found = disturbances(machine(tmp_path, **{zone + k: v for k, v in passive.items()}))
    assert found == ["cpu-thermal is at 84 °C: from 80 °C on the clock is lowered."]
    assert disturbances(machine(tmp_path, **{zone + "temp": "79000"})) == []


def test_a_clock_that_may_not_reach_its_top_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    of = "sys__devices__system__cpu__cpu0__cpufreq__{}_max_freq"
    held = machine(tmp_path, **{of.format("scaling"): "1500000", of.format("cpuinfo"): "2400000"})
    assert disturbances(held) == ["The clock may go to 1500 MHz only, of 2400 MHz."]
    assert disturbances(machine(tmp_path, **{of.format("scaling"): "2400000"})) == []


def test_what_a_board_says_of_its_power_and_heat_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    board = machine(tmp_path, **{"sys__devices__platform__soc__soc:firmware__get_throttled": "50005\n"})
    assert disturbances(board) == [
        "The board says that its voltage is too low.",
        "The board says that it is throttled.",
    ]


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


@pytest.mark.parametrize(("real", "claimed", "emulator"), [(62, 183, "qemu-aarch64"), (62, 62, None), (183, 183, None)])
def test_emulator_is_a_program_for_another_processor_than_what_it_runs(
    tmp_path: Path, real: int, claimed: int, emulator: str | None
) -> None:
    """The numbers are ELF's EM_X86_64 and EM_AARCH64."""
    for name, program, number in (("thread-self", "qemu-aarch64", real), ("self", "python", claimed)):
        (tmp_path / program).write_bytes(b"\x7fELF" + bytes(14) + number.to_bytes(2, "little") + bytes(44))
        (tmp_path / "proc" / name).mkdir(parents=True)
        (tmp_path / "proc" / name / "exe").symlink_to(tmp_path / program)
    assert Machine(root=tmp_path).emulator == emulator
    assert fingerprint("r", "1", Machine(root=tmp_path)).facts.get("emulator") == emulator


def test_nothing_emulates_this_machine_or_one_that_does_not_say(tmp_path: Path) -> None:
    assert Machine().emulator is None
    assert Machine(root=tmp_path).emulator is None
