"""Hosts and artifacts for the device tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autocompress.core.artifact import Artifact
from autocompress.core.measurement import MeasurePlan
from autocompress.core.profile import Profile
from autocompress.device.local import LocalHost
from tests.models import artifact_of, write_fake, write_inputs

QUICK = {"warmup_s": 0.001, "warmup_runs": 2, "turn_s": 0.001, "min_blocks": 3, "max_duration_s": 0.1}

MakeArtifact = Callable[..., Artifact]


def profile_of(runtime: str, *, timeout_s: float = 60, **plan: Any) -> Profile:
    """A profile with a plan of milliseconds."""
    return Profile(
        name="test",
        description="",
        runtime=runtime,
        format="onnx",
        precisions={},
        width_multiple=8,
        measure=MeasurePlan(**{**QUICK, "timeout_s": timeout_s, **plan}),
    )


@pytest.fixture
def fake_host() -> Iterator[LocalHost]:
    """Runs the fake in the real worker process; a job is a hang after 4 seconds."""
    with LocalHost(profile_of("tests.fakes:FakeRuntime", timeout_s=4)) as host:
        yield host


@pytest.fixture
def fake_artifact(tmp_path: Path) -> MakeArtifact:
    """Makes a model of the fake runtime."""

    def make(name: str, **model: Any) -> Artifact:
        return artifact_of(write_fake(tmp_path / f"{name}.json", **model))

    return make


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """150 items of 4 numbers."""
    array = np.random.default_rng(0).normal(size=(150, 4)).astype(np.float32)
    return write_inputs(tmp_path / "inputs", input=array)
