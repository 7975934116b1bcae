"""Remote laws: whatever the network does, the stream is that of the local files; the cache is bounded; nothing waits for ever."""

import http.server
import multiprocessing
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data_pipeline import convert, fetch, manifest, order, remote, wds
from tests.shards import SHARDS, make_dataset

N = sum(SHARDS)


class Server:
    """A local HTTP server of a folder; `trouble` maps a file's name to what goes wrong on its n-th request."""

    def __init__(self, folder):
        self.folder, self.trouble, self.requests = folder, {}, []
        outer, self.stop = self, threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                outer.requests.append(name)
                kind = outer.trouble.get(name, lambda n: None)(outer.requests.count(name))
                path = outer.folder / name
                data = path.read_bytes() if path.exists() else b""
                status = kind if isinstance(kind, int) else 200 if path.exists() else 404
                if kind == "html":
                    data = b"<html>sign in</html>"
                if kind == "flipped":
                    data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
                self.send_response(status)
                if kind != "cut without length":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if kind == "stalled":
                    self.wfile.write(data[:100])
                    self.wfile.flush()
                    outer.stop.wait(600)
                elif status == 200:
                    self.wfile.write(data[: len(data) // 2] if str(kind).startswith("cut") else data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "data"
    make_dataset(folder)
    with wds.open_source(folder, 3, 1) as source:
        return folder, source.batch(np.arange(2 * N))


@pytest.fixture
def server(dataset):
    made = Server(dataset[0])
    yield made
    made.close()


def quick(tmp_path, **changes):
    return {"folder": tmp_path / "cache", "timeout_seconds": 60, "pause_seconds": 0.01, "attempts": 3} | changes


# where something stalls; elsewhere a busy machine would look like it
SHORT = {"timeout_seconds": 0.3}


def read(server, tmp_path, waits=None, **options):
    with wds.open_source(server.url, 3, 1, cache=quick(tmp_path, **(waits or {})), **options) as source:
        return source.batch(np.arange(2 * N)), source.counters()


def test_remote_is_local(dataset, server, tmp_path):
    batch, _ = read(server, tmp_path)
    assert torch.equal(batch.stored, dataset[1].stored) and torch.equal(batch.labels, dataset[1].labels)
    assert server.requests.count("shard-000001.tar") == 1
    read(server, tmp_path)
    assert server.requests.count("shard-000001.tar") == 1 and server.requests.count("manifest.json") == 2
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("kind", [500, 503, "cut", "cut without length", "flipped", "html", "stalled"])
@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx", "manifest.json"])
def test_passing_trouble_changes_nothing(dataset, server, tmp_path, kind, name):
    server.trouble[name] = lambda n: kind if n == 1 else None
    batch, counters = read(server, tmp_path, SHORT | {"attempts": 20} if kind == "stalled" else None)
    assert torch.equal(batch.stored, dataset[1].stored) and counters["replaced"] == 0
    asked = server.requests.count(name)
    assert asked == 2 or kind == "stalled" and asked > 2, "once more, unless the machine itself stalled"


@pytest.mark.parametrize("kind", ["html", "flipped", "cut without length"])
def test_a_bad_manifest_is_refused(server, tmp_path, kind):
    server.trouble["manifest.json"] = lambda n: kind
    with pytest.raises(ValueError, match="manifest.json"):
        read(server, tmp_path)


@pytest.mark.parametrize("kind", [404, 403, 503, "cut", "stalled", "flipped"])
def test_lasting_trouble_stops_or_is_replaced_in_bounded_time(server, tmp_path, kind):
    server.trouble["shard-000001.tar"] = lambda n: kind
    waits, start = SHORT if kind == "stalled" else None, time.monotonic()
    with pytest.raises(ValueError, match=r"shard-000001\.tar") as error:
        read(server, tmp_path, waits)
    assert time.monotonic() - start < 120 and "\n" not in str(error.value), (
        "a server that stalls does so for ten minutes"
    )
    if kind in (404, 403):  # asking again does not help; the read and the fetch ahead each asked
        assert server.requests.count("shard-000001.tar") <= 2
    batch, counters = read(server, tmp_path, waits, on_bad="replace", max_bad=7)
    assert len(batch.labels) == 2 * N and counters["quarantined_shards"] == 1


@pytest.mark.parametrize("kind", [None, 404, 403, "cut", "flipped"])
def test_mds_comes_the_same_way(dataset, tmp_path, kind):
    convert.write_folder(convert.open_shards(dataset[0], None), tmp_path / "mds", "mds", None)
    remote_mds = Server(tmp_path / "mds")
    remote_mds.trouble["shard.00001.mds"] = lambda n: kind
    try:
        if kind is None:
            assert torch.equal(read(remote_mds, tmp_path)[0].stored, dataset[1].stored)
            return
        with pytest.raises(ValueError, match="shard.00001.mds cannot be fetched"):
            read(remote_mds, tmp_path)
        _, counters = read(remote_mds, tmp_path, on_bad="replace", max_bad=7)
        assert (counters["replaced"], counters["quarantined_shards"]) == (14, 1)
    finally:
        remote_mds.close()


def test_a_copy_that_went_bad_is_fetched_again(dataset, server, tmp_path):
    read(server, tmp_path)
    copy = next((tmp_path / "cache").rglob("shard-000001.tar"))
    data = bytearray(copy.read_bytes())
    data[1700] ^= 1  # inside the first array
    copy.write_bytes(data)
    batch, counters = read(server, tmp_path)
    assert torch.equal(batch.stored, dataset[1].stored) and counters["checksum_failures"] == 0
    assert server.requests.count("shard-000001.tar") == 2


def test_the_cache_is_bounded(dataset, server, tmp_path):
    sizes = [p.stat().st_size for p in sorted(dataset[0].glob("*.tar"))]
    bound = sum(sorted(sizes)[-2:])
    with wds.open_source(server.url, 3, 1, cache=quick(tmp_path, max_bytes=bound), max_open=1) as source:
        for start in range(0, 2 * N, 5):
            batch = source.batch(np.arange(start, start + 5))
            assert torch.equal(batch.stored, dataset[1].stored[start : start + 5])
        evicted = source.files.evicted
    # Several files may be on their way at once; each made room for itself.
    assert evicted > 0 and sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.tar")) <= bound
    with pytest.raises(ValueError, match="too small for two windows"):
        wds.open_source(server.url, 3, 2, cache=quick(tmp_path, max_bytes=bound))


def read_in_process(url, folder, results):
    with wds.open_source(url, 3, 1, cache={"folder": folder}) as source:
        results.put(int(source.batch(np.arange(2 * N)).stored.view(torch.int16).sum()))


@pytest.mark.slow  # three processes import torch
def test_ranks_of_a_node_share_the_cache(dataset, server, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=read_in_process, args=(server.url, tmp_path / "c", results)) for _ in range(3)]
    [rank.start() for rank in ranks]
    assert {results.get(timeout=120) for _ in ranks} == {int(dataset[1].stored.view(torch.int16).sum())}
    [rank.join() for rank in ranks]
    for k in range(len(SHARDS)):
        assert server.requests.count(f"shard-{k:06d}.tar") == 1


def test_staged_shards_are_copied_once_by_the_ranks_of_a_node_and_then_local(dataset, tmp_path, monkeypatch):
    shared, rank = tmp_path / "shared", {"folder": "$NODE_DISK/cache"}
    shutil.copytree(dataset[0], shared)
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "node"))
    with (
        wds.open_source(shared, 3, 1, cache=rank, stage=True) as one,
        wds.open_source(shared, 3, 1, cache=rank, stage=True) as two,
        ThreadPoolExecutor(2) as both,
    ):
        first = list(both.map(lambda source: source.batch(np.arange(N)).stored, (one, two)))
        shutil.rmtree(shared)
        second = list(both.map(lambda source: source.batch(np.arange(N, 2 * N)).stored, (one, two)))
        fetched = sum(source.counters()["fetched_bytes"] for source in (one, two))
    assert all(torch.equal(stored, dataset[1].stored[:N]) for stored in first)
    assert all(torch.equal(stored, dataset[1].stored[N:]) for stored in second)
    once = sum(
        (dataset[0] / f"shard-{k:06d}{end}").stat().st_size for k in range(len(SHARDS)) for end in (".tar", ".idx")
    )
    own = (dataset[0] / manifest.NAME).stat().st_size  # each asks for the manifest anew
    assert fetched == once + 2 * own
    assert any((tmp_path / "node/cache").rglob("shard-000000.tar"))


def test_a_cache_folder_of_another_machine_is_one_line(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"\$NOT_SET_HERE is not set on this machine"):
        wds.open_source(dataset[0], 3, 1, cache={"folder": "$NOT_SET_HERE/x"}, stage=True)


@pytest.mark.extras
def test_other_file_systems_go_through_fsspec(dataset, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in dataset[0].iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert manifest.load("memory://bucket") == manifest.load(dataset[0])
    with wds.open_source("memory://bucket", 3, 1, cache=quick(tmp_path)) as source:
        assert torch.equal(source.batch(np.arange(2 * N)).stored, dataset[1].stored)
    memory.rm("/bucket/shard-000001.tar")
    with (
        pytest.raises(ValueError, match="shard-000001.tar cannot be fetched"),
        wds.open_source("memory://bucket", 3, 1, cache=quick(tmp_path / "other")) as source,
    ):
        source.batch(np.arange(2 * N))


@pytest.mark.parametrize("kind", [503, "cut", "cut without length", "stalled"])
def test_a_manifest_is_read_from_a_url(dataset, server, monkeypatch, kind):
    """What the login node does: no cache, bounded time, no torch (test_layout.py)."""
    monkeypatch.setattr(remote.load, "__defaults__", (0.3, 4))
    expected = manifest.load(dataset[0])
    server.trouble["manifest.json"] = lambda n: kind if n == 1 and kind != "cut without length" else None
    assert manifest.load(server.url) == manifest.load(server.url + "/manifest.json") == expected
    server.trouble["manifest.json"] = lambda n: kind
    start = time.monotonic()
    with pytest.raises(ValueError, match="manifest.json") as error:
        manifest.load(server.url)
    assert "\n" not in str(error.value) and time.monotonic() - start < 120


def test_a_manifest_that_is_not_there_names_the_remedy(server):
    for url, words in (
        (server.url + "/nothing", "nothing/manifest.json not found; upload"),
        ("http://127.0.0.1:1", "cannot be read in 3 attempts"),
        ("nothing://x", "nothing:// is unknown"),
    ):
        if words.startswith("nothing://"):
            pytest.importorskip("fsspec")
        with pytest.raises(ValueError, match=words) as error:
            manifest.load(url)
        assert "\n" not in str(error.value)


def test_a_missing_library_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for opening in (
        lambda: manifest.load("s3://b/d"),
        lambda: wds.open_source("s3://b/d", 0, 1, cache=quick(tmp_path)),
    ):
        with pytest.raises(ValueError, match=r"s3://b/d/manifest.json.*pip install '\.\[remote\]'") as error:
            opening()
        assert "\n" not in str(error.value)


@pytest.mark.extras
def test_a_stalled_file_system_is_given_up(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(fsspec, "url_to_fs", lambda *_, **__: time.sleep(600))
    cache = fetch.Cache("memory://x", **quick(tmp_path, attempts=2, **SHORT))
    start = time.monotonic()
    with pytest.raises(ValueError, match="no byte for 0.3 s"):
        cache.load_manifest()
    assert time.monotonic() - start < 120
    cache.close()


def test_shards_ahead_are_those_that_come():
    sizes = [5] * 7
    for position in range(0, 70):
        ahead = set(order.shards_ahead(1, position, sizes, 3))
        coming = order.sample_at(1, np.arange(position, position + 5), sizes, 3) // 5
        assert set(coming.tolist()) <= ahead
