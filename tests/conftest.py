"""What holds for every test: who sees GPUs, and that a test is the same one in every run, whatever ran before it and however fast.

GPUs are seen by tests marked gpu, in a run of their own (`pytest -m gpu`); to all others a machine with GPUs is one without: ranks
of tests are gloo's and their tensors the CPU's, and where they saw GPUs, the engine would take them.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def _alone(config) -> bool:
    return config.option.markexpr.strip() == "gpu"


def pytest_configure(config) -> None:
    """Hide the GPUs before anything asks for them, here and in every process that a test starts."""
    if not _alone(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if importlib.util.find_spec("hypothesis"):  # a machine with GPUs may lack it
        from hypothesis import HealthCheck, settings

        # a busy machine is no failure, and what is tried depends on the test alone
        settings.register_profile(
            "evenkeel", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.load_profile("evenkeel")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Begin every test with the same random numbers."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """Pass over files that would only be deselected: a machine with GPUs may lack what they import."""
    if not _alone(config) or collection_path.suffix != ".py":
        return None
    return None if "pytest.mark.gpu" in collection_path.read_text() else True
