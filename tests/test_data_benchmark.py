"""The speed table of the data pipeline runs, and a large dataset starts quickly."""

import time

from data_pipeline import benchmark


def test_the_table_has_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPE", (8, 4, 4))
    monkeypatch.setattr(benchmark, "PER_SHARD", 64)
    lines = benchmark.rows(samples=64, rounds=1, folder=tmp_path)
    table = [line for line in lines if line.startswith("|")]
    assert len(table) >= 12 and "(the limit)" in table[2]
    assert any("stock webdataset" in line for line in table) and any("times stock webdataset" in line for line in lines)
    shares = [float(line.split("|")[4].split()[0]) for line in table[2:]]
    assert all(share > 0 for share in shares)
    assert not list(tmp_path.iterdir())


def test_first_batch_of_a_million_samples_comes_soon(tmp_path, monkeypatch):
    """1,251 shards of 1,024 samples, as ImageNet."""
    monkeypatch.setattr(benchmark, "SHAPE", (8, 4, 4))
    benchmark.make_data(tmp_path, benchmark.PER_SHARD)
    before = time.process_time()  # of processors: a busy machine must not fail the test
    _, mebibytes = benchmark.first_batch_seconds(tmp_path)
    assert time.process_time() - before < 4 and mebibytes < 200, "0.6 s, most of it to make the files"


def test_errors_are_one_line(capsys):
    assert benchmark.main(["--samples", "100"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
