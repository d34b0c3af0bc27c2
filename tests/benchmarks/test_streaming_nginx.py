"""`benchmarks/streaming/nginx_s3.py`: nginx answers as an S3 server at a distance does, and counts what was asked."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.failures import ReplacedError
from tests.stores.servers import CREDENTIALS


@pytest.mark.cluster
def test_shards_in_nginx(benchmark_module: Any, tmp_path: Path) -> None:
    module = benchmark_module("nginx_s3")
    records = benchmark_module("loader").pages(6, (32, 32))
    write_shards(records, tmp_path / "here", samples_per_shard=3)
    with module.nginx_s3() as endpoint, patch.dict(os.environ, CREDENTIALS, AWS_ENDPOINT_URL=endpoint):
        os.environ["ALIGNVLM_CACHE"] = str(tmp_path / "cache")
        storage = open_storage("s3://bucket/there")
        for path in sorted((tmp_path / "here").glob("*.tar")):
            storage.write(path.name, path.read_bytes())
        assert index_shards("s3://bucket/there", num_processes=1).fingerprint
        there, here = SourceReader("s3://bucket/there"), SourceReader(tmp_path / "here")
        module.move(endpoint, {"latency": 0.2, "bandwidth": 1e6})
        began = time.perf_counter()
        assert there.read(there.entry(4)) == here.read(here.entry(4))
        begin, end = there.span(there.entry(4)) or (0, 0)
        assert time.perf_counter() - began >= 0.2 + (end - begin) / 1e6
        assert module.move(endpoint, {}) == {"requests": 1, "bytes": end - begin}
        time.sleep(1.1)  # its ETags know seconds
        storage.write("000001.tar", (tmp_path / "here" / "000000.tar").read_bytes())
        with pytest.raises(ReplacedError, match=r"000001\.tar was replaced"):
            there.read(there.entry(4))
        with pytest.raises(ValueError, match="nginx has no busy"):
            module.move(endpoint, {"busy": 0.1})
        helper.stop()
