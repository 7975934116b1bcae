"""Who sees GPUs: tests marked gpu, in a run of their own (`pytest -m gpu`); to all others a machine with GPUs is one without.

Ranks of tests are gloo's and their tensors the CPU's: where they saw GPUs, the engine would take them.
"""

import os
from pathlib import Path


def _alone(config) -> bool:
    return config.option.markexpr.strip() == "gpu"


def pytest_configure(config) -> None:
    """Hide the GPUs before anything asks for them, here and in every process that a test starts."""
    if not _alone(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """Pass over files that would only be deselected: a machine with GPUs may lack what they import."""
    if not _alone(config) or collection_path.suffix != ".py":
        return None
    return None if "pytest.mark.gpu" in collection_path.read_text() else True
