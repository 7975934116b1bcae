"""Guard laws: through the stock libraries too, an epoch is whole, every sample is checked, and nothing waits for ever."""

import importlib.util
import os
import sys
import time

import numpy as np
import pytest
import torch

from data_pipeline import convert, stock, wds
from tests.shards import SHARDS, make_dataset
from tests.test_wds import flip

N = sum(SHARDS)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    return folder, make_dataset(folder)


def test_stream_is_whole_and_the_same_on_every_layout(dataset):
    folder, samples = dataset
    with stock.StockWebDataset(folder, 3) as source:
        whole = source.batch(np.arange(3 * N))
    by_value = {sample[1].tobytes(): number for number, sample in enumerate(samples)}
    found = [by_value[array.tobytes()] for array in whole.stored.numpy()]
    epochs = [found[k * N : (k + 1) * N] for k in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    assert whole.labels.tolist() == [samples[i][2] for i in found]
    for rank in range(2):  # two ranks, each with its half of every batch of 10
        mine = np.concatenate([np.arange(k + 5 * rank, k + 5 * rank + 5) for k in range(0, 2 * N, 10)])
        with stock.StockWebDataset(folder, 3) as source:
            parts = [source.batch(part) for part in np.split(mine, 6)]
        assert torch.equal(torch.cat([p.stored for p in parts]), whole.stored[mine])
    with stock.StockWebDataset(folder, 3) as source:  # a resumed run
        assert torch.equal(source.batch(np.arange(40, 50)).stored, whole.stored[40:50])
        with pytest.raises(ValueError, match="cannot go back"):
            source.batch(np.arange(5))


def test_flipped_byte_is_found(dataset):
    folder, _ = dataset
    with wds.open_source(folder, 0, 1) as source:
        flip(folder / "shard-000001.tar", source._get(1).offsets[3])
    with stock.StockWebDataset(folder, 3) as source, pytest.raises(ValueError, match="'00000016' fails its checksum"):
        source.batch(np.arange(N))


def cut_at_a_sample(path):
    members = list(wds.walk_tar(path.read_bytes()))
    os.truncate(path, members[4].offset - 512)


def zero_a_header(path):
    members = list(wds.walk_tar(path.read_bytes()))
    data = bytearray(path.read_bytes())
    data[members[4].offset - 512 : members[4].offset] = bytes(512)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_at_a_sample, zero_a_header, lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_a_short_epoch_is_an_error(dataset, damage):
    """The library takes these for the end of an archive, or stops: silently in part."""
    folder, _ = dataset
    damage(folder / "shard-000001.tar")
    with stock.StockWebDataset(folder, 3) as source, pytest.raises(ValueError, match="stock reader failed") as error:
        source.batch(np.arange(2 * N))
    assert "\n" not in str(error.value)


def test_a_stalled_source_is_given_up(dataset):
    folder, _ = dataset
    with stock.StockWebDataset(folder, 3, shards=["pipe:sleep 60"], timeout_seconds=0.3) as source:
        start = time.monotonic()
        with pytest.raises(ValueError, match="brought nothing for 0.3 s"):
            source.batch(np.arange(4))
        assert time.monotonic() - start < 30


@pytest.mark.extras
def test_streaming_gives_our_stream(dataset, tmp_path):
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed: pip install '.[mds]'")
    folder, _ = dataset
    convert.write_folder(convert.open_shards(folder, None), tmp_path / "mds", "mds", None)
    positions = np.arange(50, 50 + 2 * N)
    with wds.open_source(folder, 4, 2) as ours, stock.StockStreaming(tmp_path / "mds", 4, 2) as theirs:
        a, b = ours.batch(positions), theirs.batch(positions)
        assert torch.equal(a.stored, b.stored) and torch.equal(a.labels, b.labels)
    with wds.open_source(tmp_path / "mds", 0, 1) as source:
        flip(tmp_path / "mds" / "shard.00001.mds", source._get(1).offsets[3])
    with stock.StockStreaming(tmp_path / "mds", 4, 2) as theirs, pytest.raises(ValueError, match="fails its checksum"):
        theirs.batch(positions)


def test_streaming_that_is_not_there_is_one_line(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(ValueError, match="is not installed; install it with: pip install"):
        stock.StockStreaming(dataset[0], 0, 1)
