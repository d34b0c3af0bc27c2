"""Evaluation: replies against the model's `generate` alone, held-out loss against forward passes, a TSV of 2 GB.

    python benchmarks/evaluation.py throughput
    python benchmarks/evaluation.py loss
    python benchmarks/evaluation.py tsv --folder SCRATCH

`throughput` and `loss` alternate both in one process, on the same batches of a small model. `tsv` makes a file
of 5,000 questions with pictures, opens it and reads it to its end with a stand-in for the model.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import write

COLUMNS = "index\timage\tquestion\tanswer\n"


class Silent:
    """Stands in for a model: prepares pictures as one does, and says nothing."""

    def prepare(self, items: Sequence[Any]) -> int:
        return len(items)

    def generate(self, count: int, max_new_tokens: int, until: Sequence[str] = ()) -> list[str]:
        return [""] * count

    def visual_tokens(self, width: int, height: int) -> int:
        return width * height


def page(number: int, side: int) -> bytes:
    """A PNG with lines of text, of another height for every number modulo four."""
    image = Image.new("RGB", (side, side + side * (number % 4) // 4), "white")
    draw = ImageDraw.Draw(image)
    for y in range(10, image.height - 10, 14):
        draw.text((10, y), f"line {y} of page {number}: total {number * y % 997}.50", fill="black")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_tsv(file: Path, rows: int, picture: Callable[[int], bytes]) -> None:
    with file.open("w") as stream:
        stream.write(COLUMNS)
        for number in range(rows):
            image = base64.b64encode(picture(number)).decode()
            stream.write(f"{number}\t{image}\twhat is the total {'of this page ' * (number % 3)}?\t1\n")


def small_model(threads: int) -> tuple[Any, Any]:
    """11 million random parameters, six layers of vision and six of language, and their processor."""
    import torch

    from tests.tiny import tiny_model

    torch.set_num_threads(threads)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 224, "patch_size": 16}
    return tiny_model(text={**sizes, "tie_word_embeddings": False}, vision=vision)


def throughput(questions: int, batch_size: int, rounds: int, side: int, threads: int) -> dict[str, Any]:
    """Seconds and CPU seconds of both, and the rate of the whole evaluation by that of `generate`.

    `preparing` is the part that reads, decodes, scales and encodes the questions, beside the model in a thread.
    """
    from alignvlm.evaluation.answering import ModelAnswerer
    from alignvlm.evaluation.benchmarks.job import Job
    from alignvlm.evaluation.benchmarks.replies import batches
    from alignvlm.evaluation.benchmarks.run import run_benchmarks

    answerer = ModelAnswerer(*small_model(threads), "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "DocVQA_VAL.tsv")
        write_tsv(file, questions, lambda number: page(number, side))
        job = Job.of("docvqa", file, "lmms_eval")
        prepare = lambda: list(batches(job, answerer, lambda number: True, set(), batch_size))
        asked = prepare()
        inputs = [each.batch.inputs for each in asked if each.batch]
        limit = job.benchmark.flavours[job.flavour].max_new_tokens

        def alone() -> None:
            for each in inputs:
                answerer.generate(each, limit)

        def whole(number: int) -> None:
            run_benchmarks("model", [job], Path(scratch, f"{number}"), batch_size=batch_size, answerer=answerer)

        alone()
        times: dict[str, list[tuple[float, float]]] = {"preparing": [], "generate": [], "evaluation": []}
        for number in range(rounds):
            times["preparing"].append(timed(prepare))
            times["generate"].append(timed(alone))
            times["evaluation"].append(timed(lambda number=number: whole(number)))
            print(f"round {number}: " + ", ".join(f"{name} {each[-1][0]:.2f} s" for name, each in times.items()))
    medians = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in times.items()}
    tiles = sum(len(each["pixel_values"]) for each in inputs)
    found: dict[str, Any] = {
        "questions": questions, "batch_size": batch_size, "tiles": tiles, "max_new_tokens": limit,
        "threads": threads, "rounds": rounds,
    }  # fmt: skip
    for place, unit in enumerate(("wall", "cpu")):
        seconds = {name: values[place] for name, values in medians.items()}
        found[f"{unit}_seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        found[f"{unit}_rate_of_generate"] = round(seconds["generate"] / seconds["evaluation"], 3)
    return found


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """(seconds, CPU seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def held_out_loss(num_packs: int, rounds: int, threads: int) -> dict[str, Any]:
    """CPU seconds of a stage's held-out loss, of the forward passes of its engine and of the model's without DeepSpeed.

    One rank, fp32. They alternate pack by pack; the least seconds of every pack count, since other work of the machine
    only adds. ZeRO-3 comes last: it replaces torch's linear layer for the rest of the process.
    """
    from steps.bench import make_pack
    from steps.variants import Pack

    from alignvlm.model import AlignVLMForConditionalGeneration
    from alignvlm.model.attention import SDPA
    from alignvlm.stage_data import HeldOutPacks
    from alignvlm.training import distributed
    from alignvlm.training.callbacks.held_out_loss import measure
    from tests.one_rank import trainer_of

    model, _ = small_model(threads)
    pack = Pack(tokens=1024, tiles=4, documents=2, supervised=120)
    batches = [make_pack(pack, model.config, seed) for seed in range(num_packs)]
    world = distributed.start(timeout_minutes=5)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()), "packs": num_packs, "tokens_per_pack": pack.tokens,
        "tiles_per_pack": pack.tiles, "threads": threads, "rounds": rounds,
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            attention = {"text_config": SDPA, "vision_config": "sdpa"}
            plain = AlignVLMForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
            for strategy in ("zero2", "cpu_zero3"):
                trainer = trainer_of(Path(folder), strategy, world, "train.precision=fp32")
                state: Any = SimpleNamespace(trainer=trainer, world=world, validated=0)
                sums = {"plain_forward": 0.0, "forward": 0.0, "held_out": 0.0}
                for batch in batches:
                    pack_alone = HeldOutPacks(["text"], [batch])
                    parts = partial(forward, plain, batch), partial(forward, trainer.engine, batch)
                    taken = [
                        [timed(part)[1] for part in (*parts, partial(measure, state, pack_alone))]
                        for _ in range(rounds)
                    ]
                    for name, seconds in zip(sums, zip(*taken, strict=True), strict=True):
                        sums[name] += min(seconds)
                trainer.close()
                found[strategy] = {
                    "cpu_seconds": {name: round(value, 3) for name, value in sums.items()},
                    "cpu_of_forward": round(sums["held_out"] / sums["forward"], 3),
                }
    finally:
        distributed.stop()
    return found


def forward(model: Any, batch: Any) -> float:
    """The mean loss per supervised token of a pack, by a forward pass and nothing else."""
    import torch

    from alignvlm.training.step import inputs_of

    model.eval()
    with torch.no_grad():
        return float(model(**inputs_of(batch), num_items_in_batch=1).loss) / batch.num_supervised


def large_tsv(folder: Path, rows: int, gigabytes: float) -> dict[str, Any]:
    """Seconds and memory of opening a large file, and memory of reading it to its end in batches."""
    from alignvlm.evaluation.benchmarks.job import Job
    from alignvlm.evaluation.benchmarks.replies import ask
    from alignvlm.system.ranks import ALONE

    side = int((gigabytes * 1e9 / rows * 0.75 / 3) ** 0.5)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG", compress_level=0)
    file = folder / "DocVQA_VAL.tsv"
    write_tsv(file, rows, lambda number: buffer.getvalue())
    before = reset_peak()
    opened = timed(lambda: Job.of("docvqa", file).described())
    at_open = peak() - before
    job = Job.of("docvqa", file)
    read = timed(lambda: ask(job, Silent, folder / "parts", 16, ALONE))  # type: ignore[arg-type]
    found = {
        "rows": rows,
        "gigabytes": round(file.stat().st_size / 1e9, 2),
        "open_seconds": round(opened[0], 3),
        "open_megabytes": round(at_open / 1e6, 1),
        "read_seconds": round(read[0], 1),
        "read_cpu_seconds": round(read[1], 1),
        "read_megabytes": round((peak() - before) / 1e6, 1),
    }
    file.unlink()
    return found


def reset_peak() -> int:
    """The process's memory in bytes; the peak is counted from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "loss", "tsv"])
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packs", type=int, default=8, help="of the held-out loss")
    parser.add_argument("--side", type=int, default=800, help="width of the pages, pixels")
    parser.add_argument("--threads", type=int, default=1, help="of torch; preparing takes another one")
    parser.add_argument("--rows", type=int, default=5000, help="of the TSV")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the TSV")
    parser.add_argument("--folder", type=Path, help="where the TSV is made and removed (default: a temporary folder)")
    arguments = parser.parse_args()
    if arguments.what == "throughput":
        found = throughput(
            arguments.questions, arguments.batch_size, arguments.rounds, arguments.side, arguments.threads
        )
    elif arguments.what == "loss":
        found = held_out_loss(arguments.packs, arguments.rounds, arguments.threads)
    else:
        if arguments.folder is not None:
            arguments.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            found = large_tsv(Path(scratch), arguments.rows, arguments.gigabytes)
    print(json.dumps(found, indent=1))
    print(write(f"evaluation-{arguments.what}", found))


if __name__ == "__main__":
    main()
