"""The loader against pure decoding of the same images and against a plain webdataset pipeline on the same shards.

Run alone: `python benchmarks/loader.py`. One working process each, repetitions interleaved, ratios of medians. Beside
them ratios of CPU time, which other programs on the machine change less: all processes of the loader against decoding.
Writes benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import write

from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.malloc import keep_memory
from data_pipeline.order.packing import pack_lengths
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.parallel import single_threaded
from data_pipeline.samples.schema import Encoded, Sample
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.writer import write_shards

TILE = 364
SIZES = {"page": (1240, 1754), "crop": (364, 364)}
"""A4 scanned at 150 dpi, which the targets are for, and one tile, where everything but decoding weighs most."""
SHARDS = {"page": 100, "crop": 1000}
"""Samples per shard, both about 100 MB."""


class PageEncoder:
    """One tile per image without resizing, 196 visual tokens, one token per letter: nothing costly besides decoding."""

    fingerprint = "benchmark-pages"
    tile_size = TILE

    def measure(self, messages: Any, image_sizes: Any) -> tuple[int, int]:
        letters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        return letters + 196 * len(image_sizes), len(image_sizes)

    def encode(self, sample: Sample) -> Encoded:
        tokens, _ = self.measure(sample.messages, sample.images)
        ids = np.arange(tokens, dtype=np.int64)
        return Encoded(ids, ids, view(sample.images[0])[None], ids[:196])


def view(image: Image.Image) -> np.ndarray:
    """The first tile, uint8 [3, S, S], as it lies in the image: colours last."""
    return np.asarray(image.crop((0, 0, TILE, TILE))).transpose(2, 0, 1)


def cut(image: Image.Image) -> np.ndarray:
    """The first tile, uint8 [3, S, S]."""
    return np.ascontiguousarray(view(image))


def pages(count: int, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """JPEG pages with lines of ink: about as costly to decode as scans of text."""
    rng = np.random.default_rng(0)
    width, height = size
    for number in range(count):
        page = np.full((height, width, 3), 245, dtype=np.uint8)
        for line in range(12, height - 12, 14):
            ink = rng.integers(0, 2, (8, width // 4)).repeat(4, axis=1)[:, : width - 20]
            page[line : line + 8, 10 : 10 + ink.shape[1]] -= (ink[..., None] * rng.integers(120, 220)).astype(np.uint8)
        buffer = BytesIO()
        Image.fromarray(page).save(buffer, "JPEG", quality=88)
        text = "x" * int(rng.integers(20, 400))
        yield {
            "key": f"{number:06d}",
            "messages": [{"role": "user", "content": "<image>read"}, {"role": "assistant", "content": text}],
            "images": [buffer.getvalue()],
        }


def pure_decode(images: list[bytes]) -> Iterator[int]:
    """Nothing but decoding (the JPEGs are RGB) and cutting the tile, in this process; images in memory."""
    for data in images:
        image = Image.open(BytesIO(data))
        image.load()
        cut(image)
        yield 1


def plain_webdataset(urls: list[str]) -> Iterator[int]:
    """The usual pipeline: shuffle buffer, decode, tile; batches of 16 by one worker of its loader."""
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100, seed=0, empty_check=False)
        .shuffle(1000)
        .decode("pilrgb")
        .map(lambda sample: (sample["json"], cut(sample["0.jpg"])))
        .batched(16, collation_fn=collate_pages)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4, worker_init_fn=one_thread)
    for _, tiles in loader:
        yield len(tiles)


def collate_pages(samples: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """Conversations, and tiles uint8 [K, 3, S, S]."""
    records, tiles = zip(*samples, strict=True)
    return list(records), torch.from_numpy(np.stack(tiles))


def one_thread(worker: int) -> None:
    """As the loader's own workers."""
    single_threaded()


def packed_loader(plan: Plan, encoder: PageEncoder) -> Iterator[int]:
    """Planned, verified, decoded, encoded, packed and collated by one worker."""
    for step in build_loader(plan, encoder, micro_batch_packs=1, num_workers=1, prefetch=4):
        yield sum(batch.num_samples for batch in step)


def rate(work: Iterator[int]) -> float:
    """Samples per second once it runs: from the first batch to the last; starting and ending processes do not count."""
    next(work)
    began = end = time.perf_counter()
    count = 0
    for number in work:
        count, end = count + number, time.perf_counter()
    return count / (end - began)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def compare(folder: Path, name: str, samples: int, repeats: int) -> dict[str, Any]:
    """Median rates and ratios on `samples` images of one size."""
    encoder, size = PageEncoder(), SIZES[name]
    write_shards(pages(samples, size), folder, samples_per_shard=SHARDS[name])
    measure_source(folder, encoder)
    source = open_source("pages", folder, encoder)
    plan = Plan({"pages": source}, {"pages": 1}, PlanSettings(sequence_length=8192, global_batch_packs=1))
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    images = [sample["0.jpg"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    works: dict[str, Callable[[], Iterator[int]]] = {
        "decode": lambda: pure_decode(images),
        "webdataset": lambda: plain_webdataset(urls),
        "loader": lambda: packed_loader(plan, encoder),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            began = cpu_seconds()
            value = rate(work())
            if repeat:  # the first round warms the page cache
                rates[name].append(value)
                cpu[name].append((cpu_seconds() - began) / samples * 1e3)
    pairs = {name: zip(rates["loader"], rates[name], strict=True) for name in ("decode", "webdataset")}
    return {
        "image": list(size),
        "samples": samples,
        "samples_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "loader_over": {name: statistics.median(ours / other for ours, other in pair) for name, pair in pairs.items()},
        "cpu_ms_per_sample": {name: min(values) for name, values in cpu.items()},
        "decode_over_loader_cpu": min(cpu["decode"]) / min(cpu["loader"]),
        "all_rates": rates,
    }


def fill_like_docvqa() -> float:
    """Fill of one window at 8K: pages of 2 to 10 tiles of 196 visual tokens and lognormal text."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 11, 65536) * 196 + rng.lognormal(5, 0.6, 65536).astype(np.int64)
    lengths = np.minimum(lengths, 8192)
    return float(lengths.sum() / (pack_lengths(lengths, 8192)[1] * 8192))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=400)
    parser.add_argument("--crops", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="webdataset")
    torch.set_num_threads(1)
    keep_memory()  # for all three: without it, which of them meets page faults is luck
    counts = {"page": arguments.pages, "crop": arguments.crops}
    with tempfile.TemporaryDirectory() as temporary:
        results: dict[str, Any] = {
            name: compare(Path(temporary) / name, name, counts[name], arguments.repeats) for name in SIZES
        }
    results["fill_docvqa_8k"] = fill_like_docvqa()
    targets = {
        "loader/decode, pages >= 0.97": results["page"]["loader_over"]["decode"] >= 0.97,
        "loader/decode, crops >= 0.85": results["crop"]["loader_over"]["decode"] >= 0.85,
        "loader/webdataset >= 1.0": results["page"]["loader_over"]["webdataset"] >= 1.0,
        "fill >= 0.99": results["fill_docvqa_8k"] >= 0.99,
    }
    path = write("loader", {"results": results, "targets": targets})
    for name in SIZES:
        print(name, results[name]["samples_per_second"], results[name]["loader_over"])
        print(name, results[name]["cpu_ms_per_sample"], results[name]["decode_over_loader_cpu"])
    print(f"fill {results['fill_docvqa_8k']:.4f}", targets)
    print(f"wrote {path}")
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
