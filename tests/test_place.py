"""Where a profile's device is."""

from dataclasses import replace

import pytest

from autocompress.core.errors import InputError, TargetError
from autocompress.core.measurement import Fingerprint
from autocompress.place import check_kind, check_runtime, placed
from tests.scripted import PROFILE


def test_on_goes_before_the_profile() -> None:
    there = replace(PROFILE, host="ssh:pi@board")
    assert placed(there, None).host == "ssh:pi@board"
    assert placed(there, "local").host == "local"
    with pytest.raises(InputError, match="got 'board'"):
        placed(replace(PROFILE, host="board"), None)


def test_a_runtime_is_needed_here_only_where_it_measures_here() -> None:
    missing = replace(PROFILE, runtime="tests.fakes:UnusableRuntime")
    with pytest.raises(TargetError, match="is not usable: fake is not installed"):
        check_runtime(missing)
    check_runtime(replace(missing, host="ssh:pi@board"))


def test_devices_of_one_search_are_of_one_kind() -> None:
    known = Fingerprint(facts={"cpu_model": "Pi 5", "arch": "aarch64", "memory": "8 GiB"})
    check_kind("ssh:pi@b", Fingerprint(facts={**known.facts, "memory": "4 GiB"}), known)
    with pytest.raises(TargetError, match=r"ssh:pi@b is not the kind of device .*: cpu_model is 'Pi 4', not 'Pi 5'"):
        check_kind("ssh:pi@b", Fingerprint(facts={**known.facts, "cpu_model": "Pi 4"}), known)
