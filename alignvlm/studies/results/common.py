"""What every study shows: scores with standard errors, costs, which batches the runs saw, learning curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from alignvlm.report.charts import PALETTE, Chart, Series, Value, draw, finite, format_number
from alignvlm.studies.cells.batches import Batches
from alignvlm.studies.results.records import NUMBERS, Record, Results, average_of, number_of, score_of
from alignvlm.studies.results.tables import Section, Table, shown

Chosen = Mapping[str, Batches]
"""Cell -> what it reads."""
CURVES = ("loss", "loss/held_out", "connector_entropy", "connector_top_mass")


def common_sections(results: Results, batches: Chosen) -> list[Section]:
    if not results.records:
        return [Section("Results", notes=["No run of this study is finished yet."])]
    return [_scores(results), _costs(results, batches), _curves(results)]


def _scores(results: Results) -> Section:
    """Every score with its standard error, and what differs from the reference."""
    several = len(results.tasks) > 1
    values = [(task, score_of(task)) for task in results.tasks] + (
        [("average", average_of(results.tasks))] if several else []
    )
    seeds = "Seeds"
    means, differences = [], []
    for variant in results.grid.variants:
        records = results.of(variant.name)
        if not records:
            continue
        means.append(
            (variant.name, *(shown(results.mean(variant.name, value)) for _, value in values), f"{len(records)}")
        )
        found = [results.difference(variant.name, value) for _, value in values]
        if variant != results.grid.reference and any(found):
            differences.append((variant.name, *(shown(each, sign=True) for each in found), _interval(found[-1])))
    names = [name for name, _ in values]
    tables = [Table(("Score, %", *names, seeds), means)]
    reference = results.grid.reference.name
    if differences:
        of_last = f"95 % of {names[-1]}" if names else ""
        tables.append(Table((f"Difference to {reference}", *names, of_last), differences))
    metrics = {task: title for record in results.records for task, title in record.titles.items()}
    notes = [
        "Scores after the last stage, in percent: "
        + "; ".join(f"{task}: {title}" for task, title in metrics.items())
        + ".",
        "± is the standard error of the mean over seeds. Differences are paired: seed by seed, between runs that saw "
        "the same samples in the same steps; the interval is Student's t.",
    ]
    notes += [f"{variant.name}: {variant.note}." for variant in results.grid.variants if variant.note]
    return Section("Results", "Held-out scores, mean over seeds.", tables, notes=notes)


def _interval(value: Any) -> str:
    if value is None or value.low is None:
        return "–"
    return f"{100 * value.low:+.1f} to {100 * value.high:+.1f}"


def _costs(results: Results, batches: Chosen) -> Section:
    rows = []
    for variant in results.grid.variants:
        if not results.of(variant.name):
            continue
        mean = {name: results.mean(variant.name, number_of(name)) for name in NUMBERS}
        rows.append((
            variant.name,
            format_number(mean["connector_parameters"].mean) if mean["connector_parameters"] else "–",
            *(shown(mean[name], 0, 1.0) for name in ("tokens_per_tile",)),
            shown(mean["visual_tokens_per_sample"], 1, 1.0),
            *(format_number(each.mean) if (each := mean[name]) else "–" for name in ("samples", "tokens")),
            shown(mean["steps"], 0, 1.0),
            shown(mean["training_seconds"], 0, 1.0),
            shown(mean["final_loss"], 3, 1.0),
        ))  # fmt: skip
    head = (
        "Cost", "Connector parameters", "Tokens per tile", "Visual tokens per sample", "Samples", "Tokens", "Steps",
        "Training seconds", "Loss at the end",
    )  # fmt: skip
    notes = [
        f"{head[i]}: {text}."
        for i, text in ((3, NUMBERS["visual_tokens_per_sample"]), (7, NUMBERS["training_seconds"]))
    ]
    return Section(
        "Cost",
        "What each variant took, mean over seeds.",
        [Table(head, rows)],
        notes=[*_same(results, batches), *notes, *_devices(results)],
    )


def _same(results: Results, batches: Chosen) -> list[str]:
    """Which variants saw the same batches as the reference, by their plans."""
    grid = results.grid
    if not batches:
        return ["The data is not here: whether all runs saw the same batches was not checked."]
    equal, fitted = [], []
    for variant in grid.variants:
        pairs = [
            (batches[cell.name], batches[grid.of_seed(cell.seed)[0].name])
            for cell in grid.cells
            if cell.variant == variant
        ]
        if all(mine == theirs for mine, theirs in pairs):
            equal.append(variant.name)
            continue
        mine, theirs = pairs[0]
        stages = ", ".join(
            f"{name} {theirs[name].sequence_length} → {each.sequence_length} tokens per pack, {each.samples:,} of "
            f"{theirs[name].samples:,} samples"
            for name, each in mine.items()
        )
        fitted.append(
            f"{variant.name} makes another number of visual tokens and is compared at equal samples: {stages}."
        )
    return [
        f"Same samples in the same packs at every step, by the fingerprints of their plans: {', '.join(equal)}.",
        *fitted,
    ]


def _devices(results: Results) -> list[str]:
    """Which devices trained the runs, and how many each: their seconds compare only on one."""
    known = Counter(record.device for record in results.records if record.device)
    return [f"Trained on {', '.join(f'{device} ({count})' for device, count in known.items())}."] if known else []


def _curves(results: Results) -> Section:
    """The training loss of every variant, mean over seeds, and the connector's entropy where it has one."""
    present = [variant.name for variant in results.grid.variants if results.of(variant.name)]
    merged = {name: _mean_curve(results.of(name)) for name in present}
    keys = list(dict.fromkeys(key for curve in merged.values() for key in curve))
    stages = {stage.name: stage.number for stage in results.grid.base.stages.values()}
    keys.sort(key=lambda key: (stages.get(key[0], len(stages)), key[1]))
    steps = [
        {"stage": stage, "step": step, **{n: c.get((stage, step), {}) for n, c in merged.items()}}
        for stage, step in keys
    ]

    def series(key: str, exact: bool = False) -> list[Series]:
        def value(name: str) -> Value:
            return lambda step: step[name].get(key)

        return [Series(name, colour % PALETTE, value(name), exact) for colour, name in enumerate(present)]

    charts = [
        Chart("Training loss", series("loss"), "mean over seeds, smoothed", log=True, smooth=True),
        Chart("Held-out loss", series("loss/held_out"), "mean over seeds", log=True),
        Chart("Connector entropy", series("connector_entropy"), "nats per visual token, mean over seeds"),
        Chart(
            "Connector top probability", series("connector_top_mass"), "mean over visual tokens and seeds", zero=True
        ),
    ]
    figures = [figure for chart in charts if (figure := draw(chart, steps)) is not None]
    return Section("Learning curves", "The horizontal axis counts optimizer steps over all stages.", figures=figures)


def _mean_curve(records: list[Record]) -> dict[tuple[str, int], dict[str, float]]:
    """(stage, step) -> means over seeds."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for record in records:
        for step in record.steps:
            entry = found.setdefault((step["stage"], step["step"]), {})
            for key in CURVES:
                if (value := finite(step.get(key))) is not None:
                    entry.setdefault(key, []).append(value)
    return {at: {key: math.fsum(v) / len(v) for key, v in entry.items()} for at, entry in found.items()}
