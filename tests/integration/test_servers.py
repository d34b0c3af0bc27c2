"""Real servers: a folder of shards in each is indexed, planned and streamed as on disk; what is wrong is one line.

SeaweedFS (S3) and fake-gcs-server come with the extra `dev`; Azurite, s3rver and nginx are of `make test-cluster`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignvlm.cli import main
from data_pipeline.errors import DataError, LoadError
from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.read_mode import Read
from data_pipeline.shards.index import index_shards, look
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import Source, measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import verify_folder
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.failures import AccessError, MissingObjectError, ReplacedError
from data_pipeline.stores.object_storage import ObjectStorage
from tests.data_pipeline.loading.test_loader import same
from tests.data_pipeline.stores.test_loading import plan_of
from tests.stores import real
from tests.stores.real import Server
from tests.stores.seaweed import READER

OTHERS = {"azurite": real.azurite, "s3rver": real.s3rver, "nginx": real.nginx, "https": lambda: real.nginx(tls=True)}


@pytest.fixture(scope="module")
def seaweed() -> Iterator[Server]:
    with real.seaweed_server() as server:
        yield server


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the environment of a server, with an empty cache; what is given besides comes on top."""

    def use(server: Server, **more: str) -> Server:
        for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
            monkeypatch.delenv(name)
        cache = {"ALIGNVLM_CACHE": str(tmp_path / "node-cache"), "ALIGNVLM_PATIENCE": "20"}
        for name, value in {**cache, **server.environment, **more}.items():
            monkeypatch.setenv(name, value)
        helper.stop()
        return server

    yield use
    helper.stop()


@pytest.fixture(params=["seaweed", "gcs", *(pytest.param(name, marks=pytest.mark.cluster) for name in OTHERS)])
def server(request: pytest.FixtureRequest, use: Any) -> Iterator[Server]:
    if request.param == "seaweed":
        yield use(request.getfixturevalue("seaweed"))
    else:
        with (real.fake_gcs if request.param == "gcs" else OTHERS[request.param])() as server:
            yield use(server)


def test_streamed_as_from_disk_and_a_replaced_shard_is_named(
    server: Server, shard_folder: Path, source: Source, encoder: Any
) -> None:
    if server.is_written:
        url = server.upload(shard_folder, "letters", ".tar")
        manifest = index_shards(url, num_processes=1)
        measure_source(url, encoder, num_processes=1)
        storage = open_storage(url)
        assert isinstance(storage, ObjectStorage)
        assert all(seen.shard.matches(seen.etag) for seen in look(storage))  # the list tells, nobody is asked
        assert index_shards(url, num_processes=1) == manifest
        published = set(storage.list(""))
        assert {"manifest.json", "etags.json", "000007.index.jsonl"} < published
        assert [name for name in published if name.startswith("measures-") and name.endswith(".npy")]
    else:
        url = server.upload(shard_folder, "letters")
    near, far = plan_of(source), plan_of(open_source("letters", url, encoder))
    assert far.fingerprint == near.fingerprint
    reference = [list(step) for step in build_loader(near, encoder, num_workers=0)]
    reads: list[Read] = ["ranges", "shards"]
    for read in reads:
        steps = [list(step) for step in build_loader(far, encoder, num_workers=2, reads={"letters": read})]
        assert len(steps) == len(reference)
        assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    with pytest.raises(MissingObjectError, match=r"letters/none\.tar: no such object$"):
        open_storage(url).read("none.tar")

    data = (shard_folder / "000003.tar").read_bytes()
    is_pinned = server.is_written and server.has_preconditions  # else the size tells, and each sample's checksum
    server.put(url, "000003.tar", data[::-1] if is_pinned else data + bytes(10240))
    with pytest.raises(ReplacedError, match=r"letters/000003\.tar was replaced since it was indexed .* now") as caught:
        list(build_loader(far, encoder, num_workers=1, reads={"letters": "ranges"}))
    assert "\n" not in str(caught.value)


def test_a_bucket_that_may_only_be_read(
    seaweed: Server, use: Any, shard_folder: Path, encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = use(seaweed).upload(shard_folder, "read-only", ".tar")
    before = list(open_storage(url).list(""))
    use(seaweed, **READER)
    index_shards(url, num_processes=1)
    measure_source(url, encoder, num_processes=1)
    assert len(open_source("letters", url, encoder)) == 300
    assert "cannot be written: its index and sample lengths are kept in" in caplog.text
    assert list(open_storage(url).list("")) == before


@pytest.fixture
def google(seaweed: Server, use: Any, tmp_path: Path) -> Iterator[Server]:
    with real.as_google(seaweed, tmp_path) as server:
        yield use(server)


@pytest.mark.parametrize("client", ["s3", "gs"])
def test_a_large_file_goes_up_in_parts(
    seaweed: Server, use: Any, tmp_path: Path, client: str, request: pytest.FixtureRequest
) -> None:
    server = use(seaweed) if client == "s3" else request.getfixturevalue("google")
    storage = open_storage(f"{server.url}/large")
    assert isinstance(storage, ObjectStorage)
    data = os.urandom(17 * 1024**2)
    (tmp_path / "x").write_bytes(data)
    storage.upload([("x", tmp_path / "x")])
    assert storage.head("x").etag.endswith('-2"')
    assert storage.read("x") == data
    storage.delete("x")
    assert not storage.exists("x")


def test_google_cloud_storage_is_written(google: Server, records: Any) -> None:
    url = f"{google.url}/mine"
    made = write_shards(records(30), url, samples_per_shard=10, num_processes=1)
    assert verify_folder(url, decode=True, num_processes=1) == []
    assert index_shards(url, num_processes=1) == made
    reader = SourceReader(url)
    assert reader[29].key == "s00029"
    data = open_storage(url).read("000000.tar")
    google.put(url, "000000.tar", data[::-1])
    with pytest.raises(ReplacedError, match=r"gs://unsigned/mine/000000\.tar was replaced since it was indexed"):
        reader[0]


def test_what_is_wrong_is_one_line_and_no_secret(
    seaweed: Server, use: Any, shard_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = []

    def said(*words: str) -> str:
        """What a command that fails prints: one line."""
        assert main(["data", *words]) == 2
        out, error = capfd.readouterr()
        printed.append(out + error)
        assert error.count("\n") == 1
        return error

    use(seaweed).upload(shard_folder, "letters", "000000.tar")
    assert "s3://no-such-bucket: there is no such bucket" in said("index", "s3://no-such-bucket/letters")
    assert "s3://no-such-bucket: there is no such bucket" in said("verify", "s3://no-such-bucket/letters")
    assert "s3://bucket/no-such-folder: no .tar shards here" in said("index", "s3://bucket/no-such-folder")
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "another-secret-987"}, {"AWS_ACCESS_KEY_ID": "another-key-987"}):
        use(seaweed, **wrong)
        line = said("fetch", "s3://bucket/letters", str(tmp_path / "here"))
        assert re.search("access is denied .* looked for AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", line)
    assert not [word for word in ("test-secret", "another-secret", "another-key") if word in "".join(printed)]


@pytest.mark.cluster
def test_keys_of_azure_that_are_wrong(use: Any) -> None:
    with real.azurite() as server:
        use(server, AZURE_STORAGE_ACCOUNT_KEY="YW5vdGhlci1zZWNyZXQ=")
        with pytest.raises(AccessError, match=r"access is denied .* looked for AZURE_STORAGE_ACC") as caught:
            open_storage(server.url).read("x")
        assert "YW5vdGhlci1zZWNyZXQ" not in str(caught.value)
        use(server)
        with pytest.raises(DataError, match="az://none: there is no such container"):
            index_shards("az://none")


@pytest.mark.cluster
def test_a_certificate_that_is_not_trusted_is_said_at_once(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with real.nginx(tls=True) as server:
        use(server)
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(LoadError, match=r"certificate is not trusted .* SSL_CERT_FILE"):
            open_storage(server.url).read("x")
