"""Hypothesis with examples that are the same on every machine, and no deadline: a loaded machine is no failure."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "same", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
