"""Which vocabulary tokens a trained ALIGN connector uses, and what a smaller vocabulary costs."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import asdict
from typing import Any

from alignvlm.config.schema import Recipe
from alignvlm.report.charts import format_number
from alignvlm.report.points import Points, draw_points
from alignvlm.studies.analysis import evaluation_place, held_out_images, kept, scores_of, task_settings, without_gallery
from alignvlm.studies.cells.grid import Cell, Variant
from alignvlm.studies.connectors import align
from alignvlm.studies.results.published import VOCABULARY
from alignvlm.studies.results.records import Record, Results
from alignvlm.studies.results.statistics import estimate, paired_difference
from alignvlm.studies.results.tables import Section, Table, shown
from alignvlm.studies.study import Study

MASSES = (0.9, 0.99, 0.999)
HALVINGS = 8
"""Sizes of the pruning curve: the whole vocabulary, half of it, a quarter, …"""
IMAGES = 100
"""How many images, as in the paper; they are evenly spread over the tasks."""
TOP = 30
CURVE_POINTS = 60


class Vocabulary(Study):
    """What P_vocab looks like."""

    name = "vocabulary"
    title = "Vocabulary of ALIGN"
    question = (
        "Which tokens of the language model's vocabulary do the visual tokens consist of, and what does it cost to "
        "keep only the most used ones? Nothing is trained again: the connector is restricted and evaluated."
    )

    def variants(self, recipe: Recipe) -> list[Variant]:
        return [align(recipe)]

    def analyse(self, cell: Cell) -> dict[str, Any]:
        settings = [list(MASSES), HALVINGS, IMAGES, TOP, task_settings(cell.recipe)]
        return kept(cell, "vocabulary", settings, lambda: _measure(cell))

    def sections(self, results: Results) -> list[Section]:
        records = [record for record in results.records if record.analysis]
        return [_mass(results, records), _pruning(records), _top(records)] if records else []


def _measure(cell: Cell) -> dict[str, Any]:
    import torch

    from alignvlm.evaluation.answering import ModelAnswerer
    from alignvlm.evaluation.vocabulary_mass import measure_mass
    from alignvlm.evaluation.vocabulary_view import token_text
    from alignvlm.studies.image_information import image_information

    images = held_out_images(cell.recipe, IMAGES)
    answerer = ModelAnswerer.load(cell.last_stage.export)
    measured = measure_mass(answerer.model, answerer.processor, images)
    mass, ids = measured.mass.sort(descending=True, stable=True)
    running = mass.cumsum(0)
    size = len(mass)
    ranks = sorted({max(1, round(size ** (i / (CURVE_POINTS - 1)))) for i in range(CURVE_POINTS)})
    information = image_information(answerer.model, answerer.processor, images)
    return {
        "vocabulary": size,
        "images": measured.num_images,
        "visual_tokens": measured.num_visual_tokens,
        "entropy_of_mean": float(-torch.xlogy(mass, mass).sum()),
        "mean_entropy": measured.mean_entropy,
        "largest_mean_probability": float(mass[0]),
        "holding": {f"{share:g}": len(measured.active(share)) for share in MASSES},
        "curve": [[rank, float(running[rank - 1])] for rank in ranks],
        "top": [[token_text(answerer.processor.tokenizer, i), float(measured.mass[i])] for i in ids[:TOP].tolist()],
        "pruning": _prune(cell, answerer, ids, running),
        "image_information": None if information is None else asdict(information),
    }


def _prune(cell: Cell, answerer: Any, ids: Any, running: Any) -> list[dict[str, Any]]:
    """Scores with the most used tokens only, size by size. The model is as it was afterwards."""
    from alignvlm.evaluation.evaluate import evaluate

    model, whole = answerer.model.model, answerer.model.model.connector
    recipe, export = without_gallery(cell.recipe), cell.last_stage.export
    found = []
    for size in (max(1, len(ids) >> halving) for halving in range(HALVINGS)):
        if size < len(ids):
            model.connector = copy.deepcopy(whole)
            model.connector.keep_tokens(ids[:size])
        tokens = zlib.crc32(ids[:size].cpu().numpy().tobytes())  # results of other tokens are none of these
        place = evaluation_place(cell, "vocabulary") / f"kept-{size}-{tokens:08x}"
        try:
            scores = scores_of(evaluate(export, recipe, place, answerer=answerer, progress=True))
            tensors = [*model.connector.parameters(), *model.connector.buffers()]
        finally:
            model.connector = whole
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found.append({"kept": size, "mass": float(running[size - 1]), "bytes": size_bytes, "scores": scores})
    return found


def _number(*keys: Any) -> Any:
    """A number inside the analysis of a record."""

    def find(record: Record) -> float | None:
        found: Any = record.analysis
        for key in keys:
            found = None if found is None else found[key]
        return found

    return find


def _mass(results: Results, records: list[Record]) -> Section:
    name = results.grid.reference.name
    size = records[0].analysis["vocabulary"]
    rows = [
        ("vocabulary", f"{size:,}"),
        ("largest mean probability", shown(results.mean(name, _number("largest_mean_probability")), 4, 1.0)),
        *(
            (
                f"tokens that hold {share:g} of the mass",
                shown(results.mean(name, _number("holding", f"{share:g}")), 0, 1.0),
            )
            for share in MASSES
        ),
        ("entropy of the mean distribution, nats", shown(results.mean(name, _number("entropy_of_mean")), 3, 1.0)),
        ("mean entropy of a visual token, nats", shown(results.mean(name, _number("mean_entropy")), 3, 1.0)),
        ("entropy of the uniform distribution, nats", f"{math.log(size):.3f}"),
        (
            "variance of the visual tokens between images at the same place, % of all",
            shown(results.mean(name, _number("image_information", "variance_share"))),
        ),
        (
            "visual tokens that tell images apart, %",
            shown(results.mean(name, _number("image_information", "token_share"))),
        ),
    ]
    lines = {f"seed {r.cell.seed}": [(x, 100 * y) for x, y in r.analysis["curve"]] for r in records}
    figure = draw_points(Points("Mass of the most used tokens, %", lines, "number of tokens", log_x=True, zero=True))
    images = f"{records[0].analysis['images']} held-out images ({records[0].analysis['visual_tokens']:,} visual tokens)"
    return Section(
        "Probability mass",
        f"P_vocab averaged over {images}; mean over seeds.",
        [Table(("P_vocab", "mean"), rows)],
        [figure] if figure else [],
        notes=[
            "A visual token tells images apart when the variance between images at its place is at least one percent "
            "of the variance of all visual tokens. Images with as many tiles are compared.",
            f"The paper, of {VOCABULARY[3]:,} tokens: largest mean probability 0.0118, about {VOCABULARY[2]:,} matter.",
        ],
    )


def _pruning(records: list[Record]) -> Section:
    def score(record: Record, number: int) -> float:
        scores = record.analysis["pruning"][number]["scores"]
        return sum(scores.values()) / len(scores)

    rows, whole = [], {record.cell.seed: score(record, 0) for record in records}
    for number, first in enumerate(records[0].analysis["pruning"]):
        values = {record.cell.seed: score(record, number) for record in records}
        rows.append((
            f"{first['kept']:,}",
            shown(estimate([record.analysis["pruning"][number]["mass"] for record in records]), 2),
            format_number(first["bytes"]),
            shown(estimate(list(values.values()))),
            shown(paired_difference(values, whole), sign=True) if number else "–",
        ))  # fmt: skip
    lines = {
        f"seed {record.cell.seed}": [
            (float(each["kept"]), 100 * score(record, number)) for number, each in enumerate(record.analysis["pruning"])
        ]
        for record in records
    }
    figure = draw_points(Points("Score by kept tokens, %", lines, "number of tokens", log_x=True, zero=True))
    return Section(
        "Pruning",
        "Average score of the same model when its connector keeps the most used tokens only.",
        [Table(("Tokens kept", "Mass, %", "Bytes of the connector", "Score, %", "Difference"), rows)],
        [figure] if figure else [],
        notes=[
            f"The paper: {VOCABULARY[0]} with all tokens, {VOCABULARY[1]} with {VOCABULARY[2]:,}.",
            "An export with as many tokens: alignvlm analyze vocab EXPORT --data FOLDER --num-active N.",
        ],
    )


def _top(records: list[Record]) -> Section:
    tables = [
        Table((f"Seed {r.cell.seed}", "Mean probability, %"), [(t, f"{100 * p:.2f}") for t, p in r.analysis["top"]])
        for r in records[:1]
    ]
    lead = f"The {TOP} tokens with the largest mean probability. ␣ is a space, ⏎ a line break, \\x a byte."
    return Section("Top tokens", lead, tables)


STUDY = Vocabulary()
