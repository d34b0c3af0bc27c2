"""The loader: the same batches for any worker count, world size and start; bad samples leave a gap and a line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.files import read_json_lines
from data_pipeline.loading.collate import MicroBatch, collate
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.loader import build_loader, load_packs
from data_pipeline.loading.worker import MicroBatches, prepare_process
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.samples.schema import Encoded
from data_pipeline.shards.sources import BadSample, Source, measure_source, open_source
from data_pipeline.shards.writer import write_shards
from tests.fixtures.damage import full_disk
from tests.waiting import runs, until

SMALL = PlanSettings(sequence_length=120, global_batch_packs=8, window_shards=3, mix_block=32, pack_window=100)


@pytest.fixture(scope="module")
def plan(source: Source) -> Plan:
    return Plan({"letters": source}, {"letters": 1.0}, replace(SMALL, seed=3, epochs=2))


def same(a: MicroBatch, b: MicroBatch) -> bool:
    tensors = (
        "input_ids", "position_ids", "cu_seqlens", "tiles", "visual_positions", "target_positions", "targets"
    )  # fmt: skip
    return a.keys == b.keys and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_any_worker_count_gives_the_same_batches(plan: Plan, encoder: Any) -> None:
    reference = list(build_loader(plan, encoder, num_workers=0, micro_batch_packs=2))
    assert len(reference) == plan.num_steps
    assert all(len(step) == 4 for step in reference)
    for workers in (1, 3):
        loader = build_loader(plan, encoder, num_workers=workers, prefetch=2, micro_batch_packs=2)
        steps = list(loader)
        assert len(steps) == len(loader) == len(reference)
        assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
        assert loader.wait_seconds > 0


def test_starting_anywhere_continues(plan: Plan, encoder: Any) -> None:
    reference = list(build_loader(plan, encoder, num_workers=0, micro_batch_packs=4))
    for step in (1, plan.num_steps // 2, plan.num_steps // 2 + 1, plan.num_steps - 1, plan.num_steps):
        rest = list(build_loader(plan, encoder, num_workers=0, micro_batch_packs=4, start_step=step))
        assert len(rest) == plan.num_steps - step
        assert all(same(a, b) for x, y in zip(rest, reference[step:], strict=True) for a, b in zip(x, y, strict=True))


def test_any_world_size_sees_the_same_global_batches(plan: Plan, encoder: Any) -> None:
    def keys_per_step(world: int, micro: int) -> list[list[str]]:
        steps: list[list[str]] = [[] for _ in range(plan.num_steps)]
        for rank in range(world):
            loader = build_loader(plan, encoder, rank=rank, world_size=world, micro_batch_packs=micro, num_workers=0)
            for keys, batches in zip(steps, loader, strict=True):
                keys += [key for batch in batches for key in batch.keys]
        return [sorted(keys) for keys in steps]

    reference = keys_per_step(1, 1)
    assert sorted(key for keys in reference for key in keys) == sorted(
        2 * [f"letters/{e.shard}/{e.key}" for e in entries(plan)]
    )
    for world, micro in ((2, 2), (4, 1), (8, 1)):
        assert keys_per_step(world, micro) == reference


@pytest.mark.parametrize("workers", [0, 2])
def test_kept_packs_are_those_of_the_plan_and_take_no_random_number(plan: Plan, encoder: Any, workers: int) -> None:
    [reference] = next(iter(build_loader(plan, encoder, num_workers=0, micro_batch_packs=8)))
    packs = next(plan.batches()).packs
    state, ledger = torch.get_rng_state(), Ledger("none")
    numbers = np.asarray([3, 0, len(packs) + 1])  # the last one does not exist
    third, first, filler = load_packs(packs, numbers, plan.sources, encoder, num_workers=workers, ledger=ledger)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys == reference.keys[: first.num_samples]
    assert torch.equal(first.input_ids, reference.input_ids[:, : first.input_ids.shape[1]])
    assert torch.equal(first.tiles, reference.tiles[: len(first.tiles)])
    assert set(third.keys) < set(reference.keys) - set(first.keys)
    assert (filler.keys, filler.num_samples, filler.num_supervised, len(filler.tiles)) == ([], 0, 0, 0)
    assert ledger.num_seen == first.num_samples + third.num_samples


def entries(plan: Plan) -> list[Any]:
    source = plan.sources["letters"]
    assert isinstance(source, Source)
    return [source.reader.entry(i) for i in range(len(source))]


def test_documents_are_isolated_and_right(plan: Plan, source: Source, encoder: Any) -> None:
    numbers = {source.reader.label(i): i for i in range(len(source))}
    for batch in next(iter(build_loader(plan, encoder, num_workers=0, micro_batch_packs=4))):
        ends = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert ends[-1] == batch.input_ids.shape[1] <= 4 * 120
        assert batch.num_samples == len(batch.keys) == len(ends) - 1
        assert batch.max_seqlen == int(np.diff(ends).max())
        tile, targets, visual = 0, [], []
        for key, begin, end in zip(batch.keys, ends, ends[1:], strict=False):
            expected = encoder.encode(source.reader[numbers[key]])
            assert batch.input_ids[0, begin:end].tolist() == expected.input_ids.tolist()
            targets += [(begin + i - 1, int(label)) for i, label in enumerate(expected.labels) if i and label != -100]
            visual += (begin + expected.visual_positions).tolist()
            assert batch.position_ids[0, begin:end].tolist() == list(range(end - begin))
            assert (batch.tiles[tile : tile + len(expected.tiles)].numpy() == expected.tiles).all()
            tile += len(expected.tiles)
        assert tile == len(batch.tiles)
        assert list(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True)) == targets
        assert batch.visual_positions.tolist() == visual
        assert batch.num_supervised == len(targets) > 0


def test_an_empty_micro_batch_is_one_pad_token() -> None:
    batch = collate([], [], step=0, epoch=0)
    assert batch.input_ids.shape == (1, 1)
    assert len(batch.visual_positions) == len(batch.target_positions) == 0
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert (len(batch.tiles), batch.num_supervised, batch.num_samples, batch.max_seqlen) == (0, 0, 0, 1)
    assert batch.to("cpu").keys == []


def test_a_first_token_is_never_counted_as_supervised() -> None:
    """It is predicted from nothing: the shift inside the document drops its label."""
    none = np.zeros(0, np.int64)
    document = Encoded(np.arange(3), np.asarray([0, 1, -100]), np.zeros((0, 3, 8, 8), np.uint8), none)
    assert collate([document, document], ["a", "b"], step=0, epoch=0).num_supervised == 2


def test_the_last_batch_is_filled_with_empty_packs(plan: Plan, encoder: Any) -> None:
    last = list(build_loader(plan, encoder, num_workers=0, micro_batch_packs=1))[-1]
    assert len(last) == 8
    assert last[-1].num_samples == 0


def test_processes_are_started_before_the_threads_that_follow(plan: Plan, encoder: Any) -> None:
    expected = list(build_loader(plan, encoder, num_workers=0, micro_batch_packs=8))
    before = set(multiprocessing.active_children())
    loader = build_loader(plan, encoder, num_workers=2, micro_batch_packs=8).start()
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches = list(loader.start())
    assert all(same(mine, other) for (mine,), (other,) in zip(batches, expected, strict=True))
    assert set(multiprocessing.active_children()) == before, "ended with the last batch"
    assert len(list(loader)) == len(expected), "and it may be iterated again"


def test_processes_end_with_a_killed_parent() -> None:
    """Within three seconds; torch's own look at the parent comes five seconds after the last work item."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)

    def load_and_die() -> None:
        numbers = DataLoader(range(1000), batch_size=None, num_workers=1, worker_init_fn=prepare_process)
        batches = iter(numbers)
        next(batches)
        time.sleep(0.5)  # the process has made what it may make ahead, and waits
        send.send([process.pid for process in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)

    parent = fork.Process(target=load_and_die)
    parent.start()
    send.close()
    (worker,) = receive.recv()
    parent.join()
    until(lambda: not runs(worker), seconds=3)


@pytest.fixture
def damaged(tmp_path: Path, records: Any, encoder: Any) -> Source:
    """100 samples; every 20th refuses to be encoded and one is damaged on disk after it was indexed."""
    folder = tmp_path / "damaged"
    rows = list(records(100))
    for row in rows[::20]:
        row["refuse"] = True
    write_shards(rows, folder, samples_per_shard=40, num_processes=1)
    measure_source(folder, encoder, num_processes=1)
    source = open_source("damaged", folder, encoder)
    entry = source.reader.entry(50)
    with (folder / entry.shard).open("r+b") as file:
        file.seek(entry.members["json"][0] + 5)
        file.write(b"\x00")
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_leave_a_gap_and_one_line_each(damaged: Source, encoder: Any, tmp_path: Path, workers: int) -> None:
    plan = Plan({"damaged": damaged}, {"damaged": 1}, replace(SMALL, epochs=2))
    path = tmp_path / "run" / "quarantine.jsonl"
    loaders = [build_loader(plan, encoder, num_workers=workers, ledger=Ledger(path, 0.5)) for _ in range(2)]
    keys = [key.split("/")[-1] for loader in loaders for step in loader for batch in step for key in batch.keys]
    bad = {"s00000", "s00020", "s00040", "s00060", "s00080", "s00050"}
    assert not bad & set(keys)
    assert len(keys) == 4 * 94
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == sorted(bad)
    assert {row["source"] for row in rows} == {"damaged"}
    assert "checksum" in next(row["error"] for row in rows if row["key"] == "s00050")


def test_a_gap_moves_nothing_else(damaged: Source, encoder: Any) -> None:
    plan = Plan({"damaged": damaged}, {"damaged": 1}, SMALL)
    planned = [[damaged.reader.label(i) for i in batch.packs.index.tolist()] for batch in plan.batches()]
    for keys, (batch,) in zip(planned, build_loader(plan, encoder, num_workers=0, micro_batch_packs=8), strict=True):
        gone = set(keys) - set(batch.keys)
        assert set(batch.keys) <= set(keys)
        assert all(key[-5:] in ("00000", "00020", "00040", "00060", "00080", "00050") for key in gone)


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "q.jsonl", max_bad_fraction=0.1)
    for i in range(10):
        ledger.record(5, [BadSample("a", "0.tar", f"k{i}", "broken")])
    with pytest.raises(DataError, match=r"11 of 55 samples were bad.*max_bad_fraction 0\.1"):
        ledger.record(5, [BadSample("a", "0.tar", "k10", "broken")])
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 11


def test_the_ledger_is_shared_and_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    one, two = Ledger(path, 1.0), Ledger(path, 1.0)
    sample = [BadSample("a", "0.tar", "k", "broken")]
    one.record(1, sample)
    two.record(1, sample)
    with path.open("a") as file:
        file.write('{"source": "a", "sh')
    Ledger(path, 1.0).record(2, [*sample, BadSample("a", "0.tar", "l", "é")])
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["error"] == "é"


def test_a_full_disk_keeps_bad_samples_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "q.jsonl"
    ledger, other = Ledger(path, 1.0), Ledger(path, 1.0)
    bad = [BadSample("a", "0.tar", f"k{i}", "broken \udc80") for i in range(4)]
    ledger.record(1, bad[:1])
    with full_disk(path.stat().st_size + 30):
        ledger.record(1, bad[1:2])
        ledger.record(1, bad[2:3])
    assert caplog.text.count("its lines wait in memory") == 1
    other.record(1, bad[:1])
    ledger.record(1, bad[2:])
    assert [row["key"] for row in read_json_lines(path)] == ["k0", "k1", "k2", "k3"]


def test_stale_measures_are_named(source: Source, plan: Plan, encoder: Any, tmp_path: Path) -> None:
    class Longer(type(encoder)):  # type: ignore[misc]
        def encode(self, sample: Any) -> Any:
            encoded = super().encode(sample)
            return replace(encoded, input_ids=np.append(encoded.input_ids, 1), labels=np.append(encoded.labels, 1))

    with pytest.raises(DataError, match="but measured as"):
        list(build_loader(plan, Longer(), num_workers=0, ledger=Ledger(tmp_path / "q", 0.01)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_shard_is_one_clear_line(tmp_path: Path, records: Any, encoder: Any, workers: int) -> None:
    write_shards(records(40), tmp_path / "cut", samples_per_shard=20, num_processes=1)
    measure_source(tmp_path / "cut", encoder, num_processes=1)
    plan = Plan({"cut": open_source("cut", tmp_path / "cut", encoder)}, {"cut": 1}, SMALL)
    os.truncate(tmp_path / "cut" / "000001.tar", 5000)
    with pytest.raises(LoadError, match=r"000001\.tar has 5,000 bytes, but [\d,]+ were indexed$") as caught:
        list(build_loader(plan, encoder, num_workers=workers))
    assert "\n" not in str(caught.value)


class Deadly:
    """Kills its own loader process at the fifth sample."""

    fingerprint = "letters-1"
    tile_size = 8

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.count = encoder, 0

    def measure(self, messages: Any, sizes: Any) -> tuple[int, int]:
        return self.encoder.measure(messages, sizes)

    def encode(self, sample: Any) -> Any:
        self.count += 1
        if self.count == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.encoder.encode(sample)


def test_nothing_is_read_behind_a_sample_that_cannot_be(encoder: Any) -> None:
    """Each read behind it would wait for its store in its turn, five minutes."""
    asked = list[int]()

    class Unreachable:
        def entry(self, number: int) -> Any:
            asked.append(number)
            raise UnreachableError("no answer")

    batches = MicroBatches(cast(Any, [Unreachable()]), encoder)
    documents = np.array([[0, number, 10, 1] for number in range(9)])
    with ThreadPoolExecutor(1) as thread, pytest.raises(UnreachableError):
        list(batches._reading(documents, thread))
    assert asked == [0]


def test_a_dead_worker_is_a_clear_error(plan: Plan, encoder: Any) -> None:
    with pytest.raises(DataError, match="loader process died"):
        list(build_loader(plan, Deadly(encoder), num_workers=1))


def test_settings_that_cannot_work_are_refused(plan: Plan, encoder: Any, synthetic: Any) -> None:
    with pytest.raises(DataError, match="rank 2 of 2 ranks"):
        build_loader(plan, encoder, rank=2, world_size=2)
    with pytest.raises(DataError, match="cannot share evenly; set it to"):
        build_loader(plan, encoder, world_size=3)
    only_planned = Plan({"a": synthetic(100)}, {"a": 1}, PlanSettings(sequence_length=900, global_batch_packs=1))
    with pytest.raises(DataError, match="only be planned"):
        build_loader(only_planned, encoder)
