"""What users and servers get wrong: names, endpoints, answers. Each ends at once, with a line that says what to do."""

from __future__ import annotations

import re
import shutil
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import verify_folder
from data_pipeline.stores import helper
from tests.fixtures.buckets import Bucket
from tests.stores.servers import MemoryS3, serve_memory


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "50%25", "a%20b", "a b", "日本 é", "[x]*~", "@a:b"])
def test_names_in_a_bucket_are_taken_as_they_are(bucket: Bucket, name: str) -> None:
    """As other tools take them; `#` and `?` ended the name, and another folder was read and written."""
    bucket.store.objects[f"bucket/{name}/x"] = b"1"
    storage = open_storage(f"s3://bucket/{name}")
    assert storage.read("x") == b"1"
    assert storage.read_range("x", 0, 1) == b"1"
    assert list(storage.list()) == ["x"]
    storage.write("y", b"2")
    assert bucket.store.objects == {f"bucket/{name}/x": b"1", f"bucket/{name}/y": b"2"}


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///docs",
        "http:///docs",
        "s3://bucket//docs",
        "s3://bucket/a\tb",
        "http://[::1/docs",
        "http://h:99999/x",
    ],
)
def test_what_is_no_url_is_named(bucket: Bucket, url: str) -> None:
    with pytest.raises(DataError, match=re.escape(url)):
        open_storage(url).read("x")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://", " http://127.0.0.1", "http://[::1", "ftp://h"])
def test_an_endpoint_that_is_none_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """The client panics at some of them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    helper.stop()
    with pytest.raises(LoadError, match=rf"AWS_ENDPOINT_URL='{re.escape(endpoint)}' is not http://HOST:PORT or"):
        open_storage("s3://bucket/docs").read("x")


def test_an_endpoint_of_another_cloud_is_of_no_account(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.store.objects["bucket/docs/x"] = b"1"
    for name in ("AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL"):
        monkeypatch.setenv(name, "no address")
    helper.stop()
    assert open_storage("s3://bucket/docs").read("x") == b"1"
    with pytest.raises(LoadError, match=r"AZURE_STORAGE_ENDPOINT='no address' is not http://HOST:PORT or"):
        open_storage("az://bucket/docs").read("x")


def test_an_endpoint_without_tls_needs_the_variable_of_its_own_cloud(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NAME": "tests", "KEY": "a2V5"}.items():
        monkeypatch.setenv(f"AZURE_STORAGE_ACCOUNT_{name}", value)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", bucket.endpoint)
    helper.stop()
    with pytest.raises(LoadError, match=r"an http: endpoint needs AZURE_ALLOW_HTTP=true$"):
        open_storage("az://bucket/docs").read("x")


@pytest.mark.parametrize(
    ("name", "value"),
    [("PATIENCE", "5m"), ("PATIENCE", "nan"), ("RETRIES", "-1"), ("READ_TIMEOUT", "0"), ("READ_TIMEOUT", "inf")],
)
def test_a_variable_that_is_no_number_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"ALIGNVLM_{name}", value)
    helper.stop()
    with pytest.raises(DataError, match=rf"^ALIGNVLM_{name}='{value}' is no number of at least 0"):
        open_storage("s3://bucket/docs").read("x")


@pytest.mark.parametrize("name", ["/x.tar", "../x.tar", "a\tb"])
def test_a_name_that_cannot_be_listed_is_said_at_once(bucket: Bucket, name: str) -> None:
    bucket.store.objects |= {"bucket/docs/a.tar": b"", f"bucket/docs/{name}": b""}
    with pytest.raises(LoadError, match=r"s3://bucket/docs: Encountered object .*: move or rename that object"):
        list(open_storage("s3://bucket/docs").list())


SKEW = b"<Error><Code>RequestTimeTooSkewed</Code></Error>"
ARCHIVED = b"<Error><Code>InvalidObjectState</Code></Error>"
REGION = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>m</Message><Region>eu-west-1</Region></Error>"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((403, {}, SKEW), r"access is denied \(RequestTimeTooSkewed\): this machine's clock"),
        ((403, {}, ARCHIVED), r"access is denied \(InvalidObjectState\): the object is archived; restore it"),
        ((400, {}, REGION), r"another region; let AWS_REGION be eu-west-1$"),
        ((301, {}, b"<Error><Code>PermanentRedirect</Code></Error>"), "another region; let AWS_REGION name it$"),
        ((501, {}, b""), r"501 Not Implemented"),
        ((302, {"location": "/bucket/docs/x"}, b""), "redirects without end"),
        (
            (302, {"location": "file:///etc/passwd"}, b""),
            "302 Found: the server redirects to where the client does not",
        ),
    ],
)
def test_answers_that_no_patience_changes(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str
) -> None:
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    monkeypatch.setattr(bucket.store, "answer", lambda *_: answer)
    began = time.monotonic()
    with pytest.raises(LoadError, match=f"s3://bucket/docs.*{said}"):
        open_storage("s3://bucket/docs").read("x")
    with pytest.raises(LoadError, match=r"s3://bucket/docs(: | cannot be listed)"):
        index_shards("s3://bucket/docs")
    assert time.monotonic() - began < 10, "without patience"


def test_a_web_server_that_knows_no_lists_is_not_waited_for(
    bucket: Bucket, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's answers 501, others 405."""
    answer = bucket.store.answer
    monkeypatch.setattr(bucket.store, "answer", lambda *all: (501, {}, b"") if all[0] == "PROPFIND" else answer(*all))
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    bucket.upload(shard_folder, "docs")
    began = time.monotonic()
    assert verify_folder(f"{bucket.endpoint}/bucket/docs", num_processes=1) == []
    with pytest.raises(LoadError, match=r"bucket/docs cannot be listed; name a file, or put the manifest\.json"):
        index_shards(f"{bucket.endpoint}/bucket/docs")
    assert time.monotonic() - began < 10


def test_a_web_server_without_head_requests_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its objects are not missing."""
    answer = bucket.store.answer
    bucket.store.objects["bucket/docs/x"] = b"1"
    monkeypatch.setattr(bucket.store, "answer", lambda *all: (405, {}, b"") if all[0] == "HEAD" else answer(*all))
    storage = open_storage(f"{bucket.endpoint}/bucket/docs")
    assert storage.read("x") == b"1"
    with pytest.raises(LoadError, match=r"docs/x: the server answers no HEAD requests \(405\), which are needed"):
        storage.exists("x")


def test_the_login_of_a_url_goes_to_its_server_and_to_no_other(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client left it out, and each server that asks for one refused."""
    bucket.store.objects["docs/x y"], asked = b"1", list[tuple[str, str]]()

    def answer(method: str, target: str, headers: dict[str, str], body: bytes) -> Any:
        asked.append((headers["host"], headers.get("authorization", "")))
        if headers["host"] == bucket.endpoint.removeprefix("http://"):
            return MemoryS3.answer(bucket.store, method, target, headers, body)
        return 302, {"location": f"{bucket.endpoint}{target}"}, b""

    other = MemoryS3()
    monkeypatch.setattr(bucket.store, "answer", answer)
    monkeypatch.setattr(other, "answer", answer)
    with serve_memory(other) as endpoint:
        assert open_storage(endpoint.replace("://", "://me:a%20b@") + "/docs").read("x y") == b"1"
    first, second = asked
    assert first == (endpoint.removeprefix("http://"), "Basic " + b64encode(b"me:a b").decode())
    assert second == (bucket.endpoint.removeprefix("http://"), "")


def test_the_login_of_a_url_is_neither_kept_nor_said(bucket: Bucket, shard_folder: Path, tmp_path: Path) -> None:
    bucket.upload(shard_folder, "docs")
    url = f"{bucket.endpoint}/bucket/docs".replace("://", "://me:hidden-word@")
    assert SourceReader(url)[0].key == SourceReader(shard_folder)[0].key
    kept = [path for path in (tmp_path / "node-cache").rglob("*") if path.is_file()]
    assert any(path.name == "current.json" for path in kept)
    assert not [path for path in kept if b"hidden-word" in path.read_bytes()]
    with pytest.raises(LoadError, match=r"//me:\*\*\*@.*/docsx: no manifest\.json") as error:
        SourceReader(f"{url}x")
    assert "hidden-word" not in str(error.value)


def test_a_web_server_with_weak_etags_is_read(
    bucket: Bucket, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that compresses: a read with `If-Match` is refused there, whatever it names. Sizes still tell."""
    answer = bucket.store.answer

    def weak(method: str, target: str, headers: dict[str, str], body: bytes) -> Any:
        if "if-match" in headers:
            return 412, {}, b""
        status, more, data = answer(method, target, headers, body)
        return status, more | {"etag": f"W/{more.get('etag', '')}"}, data

    bucket.upload(shard_folder, "docs")
    monkeypatch.setattr(bucket.store, "answer", weak)
    reader = SourceReader(f"{bucket.endpoint}/bucket/docs")
    assert [reader[number].key for number in (0, 1)] == [SourceReader(shard_folder)[number].key for number in (0, 1)]
    assert verify_folder(f"{bucket.endpoint}/bucket/docs", decode=True, num_processes=1) == []
    bucket.store.objects[f"bucket/docs/{reader.entry(0).shard}"] += bytes(10240)
    with pytest.raises(LoadError, match="was replaced since it was indexed"):
        reader[0]


def test_a_weak_etag_that_changes_is_a_problem_neither_to_read_nor_to_verify(
    bucket: Bucket, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, version = bucket.store.answer, 1

    def weak(method: str, target: str, headers: dict[str, str], body: bytes) -> Any:
        status, more, data = answer(method, target, headers, body)
        return status, more | ({"etag": f'W/"{version}"'} if target.endswith(".tar") else {}), data

    monkeypatch.setattr(bucket.store, "answer", weak)
    url = bucket.upload(shard_folder, "docs")
    index_shards(url, num_processes=1)
    version = 2
    assert SourceReader(url)[0].key == SourceReader(shard_folder)[0].key
    assert verify_folder(url, num_processes=1) == []


def test_a_shard_that_is_gone_or_was_uploaded_again_is_named(
    bucket: Bucket, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "docs"
    shutil.copytree(shard_folder, folder)
    url = bucket.upload(folder, "docs")
    index_shards(url, num_processes=1)
    entry = SourceReader(url).entry(40)
    place, size, _ = entry.members["json"]
    assert (place + size) % 512, "padding follows, which is no content"
    data = bytearray(bucket.store.objects[f"bucket/docs/{entry.shard}"])
    data[place + size] = 1
    bucket.store.objects[f"bucket/docs/{entry.shard}"] = bytes(data)
    (line,) = verify_folder(url, num_processes=1)
    assert re.fullmatch(r"000001\.tar: what was indexed, with another ETag \(\"\w+\"; now \"\w+\"\); index again", line)
    index_shards(url, num_processes=1)
    assert verify_folder(url, num_processes=1) == []
    del bucket.store.objects["bucket/docs/000000.tar"]
    with pytest.raises(DataError, match=r"docs/000000\.tar is gone since it was indexed; put the shard back, or run"):
        SourceReader(url)[0]


def test_one_shard_that_may_not_be_read_is_a_problem_and_an_outage_is_none(
    bucket: Bucket, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage that began with a shard's bytes called it damaged, or passed it over while its samples were decoded."""
    url, answer, began = bucket.upload(shard_folder, "docs"), bucket.store.answer, list[str]()
    status, methods = 403, ("GET", "HEAD")

    def refuse(method: str, target: str, headers: dict[str, str], body: bytes) -> Any:
        if target.endswith("/000001.tar") and method in methods:
            began.append(method)
            if len(began) > allowed:
                return status, {}, b""
        return answer(method, target, headers, body)

    allowed = 0
    monkeypatch.setattr(bucket.store, "answer", refuse)
    for decode in (False, True):
        (line,) = verify_folder(url, decode=decode, num_processes=1)
        assert re.match(r"000001\.tar: cannot be read: s3://bucket/docs/000001\.tar: access is denied", line)
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "0")
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    status, methods = 500, ("GET",)
    for number in (0, 1):  # in the first pass, in the second
        began.clear()
        allowed = number
        with pytest.raises(UnreachableError, match=r"docs/000001\.tar: .*no answer for 0 s"):
            verify_folder(url, decode=True, num_processes=1)
