"""The benchmark of reconstructions: its rows are of the same files, and it leaves nothing behind."""

import pytest

from tests.test_generate import TINY
from trainer import posthoc_benchmark


@pytest.mark.slow
def test_rows_are_of_the_same_files(tmp_path):
    rows = posthoc_benchmark.measure(tmp_path, TINY)
    assert [r["way"] for r in rows][:2] == ["plain reading", "reading and checksums"] and "19 lengths" in rows[2]["way"]
    assert rows[0]["of_plain"] == 1 and all(r["seconds"] > 0 and r["gigabytes"] == rows[0]["gigabytes"] for r in rows)
    assert len(list((tmp_path / "snapshots").iterdir())) == 32 and len(list((tmp_path / "made").iterdir())) == 19
