"""What `pytest -m gpu` imports: the files with such tests alone, for a machine with GPUs may have little besides torch."""

from pathlib import Path


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """Pass over test files that would only be deselected."""
    if config.option.markexpr.strip() != "gpu" or collection_path.suffix != ".py":
        return None
    return None if "pytest.mark.gpu" in collection_path.read_text() else True
