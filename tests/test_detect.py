"""A detected profile is a shipped one that fits the machine, and loads."""

from pathlib import Path

import pytest

from autocompress import detect
from autocompress.config import load_profile
from autocompress.core.errors import TargetError
from autocompress.core.measurement import Fingerprint
from autocompress.detect import BASES, Base
from autocompress.device import runtime
from autocompress.device.runtime import Availability, Options

ONNX = next(base for base in BASES if base.profile == "cpu-onnxruntime")


class Described:
    """A runtime whose device has facts; it sees one only where the profile's options are empty."""

    version = "1.0"

    def available(self) -> Availability:
        return Availability(usable=bool(self.version), version=self.version, reason="", install="")

    def facts(self, options: Options) -> dict[str, str]:
        if options:
            raise TargetError("there is no such device")
        return {"device": "Card 7", "float_precisions": "fp32"}


class Absent(Described):
    """The same, not installed."""

    version = ""


def written(path: Path, base: Base, **facts: str) -> str:
    """The profile's text, also in a file."""
    name, text = detect.profile_text(base, Fingerprint(facts=facts))
    path.write_text(text)
    assert load_profile(str(path)).name == name
    return text


@pytest.mark.parametrize(
    ("flags", "said"), [("avx2 avx512_vnni", "w8a8 runs faster than float here"), ("avx2", "w8a8 gains less here")]
)
def test_what_8_bits_gain_is_told(tmp_path: Path, flags: str, said: str) -> None:
    text = written(tmp_path / "mine.yaml", ONNX, cpu_model='Odd "CPU": #1 \\1 two', flags=flags)
    assert said in text
    found = load_profile(str(tmp_path / "mine.yaml"))
    assert found.name == "odd-cpu-1-1-two-onnxruntime"
    assert found.description.endswith('detected on Odd "CPU": #1 \\1 two')


def test_everything_but_the_names_stays_as_it_is_shipped(tmp_path: Path) -> None:
    written(tmp_path / "mine.yaml", ONNX, cpu_model="CPU", flags="")
    found, shipped = load_profile(str(tmp_path / "mine.yaml")), load_profile("cpu-onnxruntime")
    assert (found.precisions, found.measure, found.options) == (shipped.precisions, shipped.measure, shipped.options)


def test_a_profile_for_a_device_is_named_after_it(tmp_path: Path) -> None:
    base = Base(profile="cpu-onnxruntime", runtime="onnxruntime", device=True)
    text = written(tmp_path / "mine.yaml", base, cpu_model="CPU", device="Card 7")
    assert "name: card-7-onnxruntime" in text
    assert "dot products" not in text


def test_each_profile_that_is_detected_here_loads(tmp_path: Path) -> None:
    found = detect.detect()
    assert "cpu-onnxruntime" in [d.base for d in found]
    for made in found:
        (tmp_path / "mine.yaml").write_text(made.text)
        profile = load_profile(str(tmp_path / "mine.yaml"))
        assert (profile.name, profile.runtime) == (made.name, made.runtime)
        assert f"# runtime: {made.runtime} " in made.text
        assert set(profile.float_precisions) <= set(load_profile(made.base).float_precisions)


def offered(monkeypatch: pytest.MonkeyPatch, *bases: Base, kind: type = Described) -> list[str]:
    """Which rows are taken when these are all there are, of a runtime called `r`."""
    monkeypatch.setattr(runtime, "RUNTIMES", {"r": f"tests.test_detect:{kind.__name__}"})
    monkeypatch.setattr(detect, "BASES", bases)
    return [d.base for d in detect.detect()]


def test_the_first_row_that_fits_the_processor_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Base(profile="cpu-onnxruntime", runtime="r", says="No such board")
    here = Base(profile="cpu-onnxruntime", runtime="r")
    assert offered(monkeypatch, elsewhere, here, here) == ["cpu-onnxruntime"]


def test_a_device_is_offered_beside_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Base(profile="cpu-onnxruntime", runtime="r", device=device) for device in (False, True)]
    assert len(offered(monkeypatch, *rows)) == 2
    assert "name: card-7-r" in detect.detect()[1].text


def test_without_a_usable_runtime_doctor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="`autocompress doctor` says how to install one"):
        offered(monkeypatch, Base(profile="cpu-onnxruntime", runtime="r"), kind=Absent)
