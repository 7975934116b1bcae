"""S3 laws: through s3fs and our cache the stream is that of the local files, whatever the object store does.

moto's server on loopback speaks S3; a layer in front of it makes trouble.
"""

import logging
import threading
import time

import numpy as np
import pytest
import torch

from data_pipeline import manifest, wds
from tests.shards import SHARDS, make_dataset

pytestmark = pytest.mark.extras
N = sum(SHARDS)
ERRORS = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}


class Store:
    """An S3 server; `trouble` maps an object's name to what goes wrong on the n-th GET of it."""

    def __init__(self):
        werkzeug = pytest.importorskip("moto.moto_server.werkzeug_app", reason="pip install '.[remote,test-extras]'")
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.store = werkzeug.DomainDispatcherApplication(werkzeug.create_backend_app)
        self.trouble, self.reads, self.stop = {}, [], threading.Event()
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, environ, start_response):
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] != "GET" or "." not in name:
            return self.store(environ, start_response)
        self.reads.append(name)
        kind = self.trouble.get(name, lambda n: None)(self.reads.count(name))
        if kind in ERRORS:
            start_response(f"{kind} No", [("Content-Type", "application/xml")])
            return [f"<?xml version='1.0'?><Error><Code>{ERRORS[kind]}</Code><Message>No.</Message></Error>".encode()]
        if kind == "stalled":
            self.stop.wait(600)
        body = b"".join(self.store(environ, start_response))
        if kind == "flipped":
            body = body[:700] + bytes([body[700] ^ 1]) + body[701:]
        return [body[: len(body) // 2]] if kind == "cut" else [body]

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A dataset in a bucket, and its stream as read from local files."""
    s3fs = pytest.importorskip("s3fs", reason="pip install '.[remote,test-extras]'")
    store = Store()
    with pytest.MonkeyPatch.context() as patch:
        # As a user sets it for MinIO, Ceph or R2.
        for name, value in (("ENDPOINT_URL", store.url), ("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        folder = tmp_path_factory.mktemp("s3") / "data"
        make_dataset(folder)
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        system.put(str(folder), "bucket/", recursive=True)
        with wds.open_source(folder, 3, 1) as source:
            yield store, "s3://bucket/data", source.batch(np.arange(2 * N)), folder
        s3fs.S3FileSystem.clear_instance_cache()
    store.close()


@pytest.fixture
def store(bucket):
    bucket[0].trouble.clear()
    bucket[0].reads.clear()
    return bucket[0]


def read(url, tmp_path, kind=None, **options):
    seconds = 2 if kind == "stalled" else 60  # elsewhere a busy machine would look like it
    cache = {"folder": tmp_path / "cache", "timeout_seconds": seconds, "pause_seconds": 0.01, "attempts": 2}
    with wds.open_source(url, 3, 1, cache=cache, **options) as source:
        return source.batch(np.arange(2 * N)), source.counters()


def test_cold_and_warm(bucket, store, tmp_path):
    _, url, local, folder = bucket
    assert manifest.load(url) == manifest.load(folder)
    cold, _ = read(url, tmp_path)
    assert torch.equal(cold.stored, local.stored) and torch.equal(cold.labels, local.labels)
    shards = [f"shard-{k:06d}.{suffix}" for k in range(len(SHARDS)) for suffix in ("tar", "idx")]
    assert [store.reads.count(name) for name in shards] == [1] * len(shards)
    store.reads.clear()
    warm, _ = read(url, tmp_path)
    assert torch.equal(warm.stored, local.stored)
    assert set(store.reads) == {"manifest.json"}, "what is in the cache is not fetched again"


@pytest.mark.parametrize("kind", [503, "cut", "flipped", "stalled"])
def test_passing_trouble_changes_nothing(bucket, store, tmp_path, kind):
    _, url, local, _ = bucket
    store.trouble["shard-000001.tar"] = lambda n: kind if n == 1 else None
    found, _ = read(url, tmp_path, kind)
    assert torch.equal(found.stored, local.stored) and store.reads.count("shard-000001.tar") > 1


@pytest.mark.parametrize("kind", [404, 403, "cut", "flipped", "stalled"])
def test_lasting_trouble_stops_or_is_replaced_in_bounded_time(bucket, store, tmp_path, kind):
    _, url, _, _ = bucket
    store.trouble["shard-000001.tar"] = lambda n: kind
    start = time.monotonic()
    with pytest.raises(ValueError, match="shard-000001.tar cannot be fetched") as error:
        read(url, tmp_path, kind)
    assert "\n" not in str(error.value)
    batch, counters = read(url, tmp_path, kind, on_bad="replace", max_bad=7)
    assert len(batch.stored) == 2 * N and (counters["replaced"], counters["quarantined_shards"]) == (14, 1)
    assert time.monotonic() - start < 240


def test_what_is_not_there_is_one_line(bucket, store, tmp_path):
    for url in ("s3://bucket/nothing", "s3://no-such-bucket/data"):
        for opening in (lambda: manifest.load(url), lambda: read(url, tmp_path)):  # noqa: B023
            with pytest.raises(ValueError, match=r"manifest.json (not found|cannot be fetched)") as error:
                opening()
            assert "\n" not in str(error.value)
