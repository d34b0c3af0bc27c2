"""An estimate as tables for a terminal. Numbers come from estimate.py; nothing is computed here but units and sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from alignvlm.config.schema import PARTS
from alignvlm.estimates.estimate import RunEstimate, StageEstimate
from alignvlm.estimates.memory import GIB


def render(run: RunEstimate) -> Iterator[RenderableType]:
    """Tables and lines in the order they are printed."""
    yield (
        f"[bold]{escape(run.recipe)}[/] on {run.world_size} GPU{'s' * (run.world_size > 1)} of {run.gpu_memory:g} GiB, "
        f"{run.peak_tflops:g} TFLOPS at {run.mfu:.0%}: {_hours(run.hours)}"
    )
    yield _parameters(run)
    yield _network(run)
    yield _volume(run)
    yield _compute(run)
    yield _memory(run)
    yield _host(run)
    yield _disk(run)
    yield _fused_layers(run)
    yield from _remarks(run)


def _parameters(run: RunEstimate) -> Table:
    table = _table("Parameters", "", "all", *(stage.name for stage in run.stages))
    for part in PARTS:
        table.add_row(part, _millions(run.parameters[part]), *(_millions(s.trainable[part]) for s in run.stages))
    totals = (_millions(sum(stage.trainable.values())) for stage in run.stages)
    table.add_row("total", _millions(sum(run.parameters.values())), *totals, style="bold")
    return table


def _network(run: RunEstimate) -> str:
    text = f"{run.tokens_per_tile} visual tokens per tile, at most {run.max_tokens_per_image:,} per image"
    if run.w2_parameters:
        text += f"; the connector's logits come from {_millions(run.w2_parameters)} parameters"
    return text


def _volume(run: RunEstimate) -> Table:
    rows: list[tuple[str, Callable[[StageEstimate], str]]] = [
        ("steps", lambda s: f"{s.volume.steps:,}{'' if s.volume.exact else ' (estimate)'}"),
        ("samples", lambda s: f"{s.volume.samples:,.0f}"),
        ("samples per step", lambda s: f"{s.samples_per_step:,.0f}"),
        ("tokens per sample", lambda s: f"{s.volume.tokens / s.volume.samples:,.0f}"),
        ("visual tokens per sample", lambda s: f"{s.volume.tiles * run.tokens_per_tile / s.volume.samples:,.0f}"),
        ("tokens", lambda s: f"{s.volume.tokens / 1e9:,.2f} B"),
        ("fill of packs", lambda s: f"{s.volume.fill:.1%}"),
        ("micro-batches per step", lambda s: "does not divide" if s.accumulation is None else str(s.accumulation)),
    ]
    return _rows("Data", run, rows)


def _compute(run: RunEstimate) -> Table:
    rows: list[tuple[str, Callable[[StageEstimate], str]]] = []
    for part in PARTS:
        rows.append((f"{part} forward", lambda s, part=part: _exa(s.flops[part].forward)))  # type: ignore[misc]
        rows.append((f"{part} backward", lambda s, part=part: _exa(s.flops[part].backward)))  # type: ignore[misc]
    rows += [
        ("all", lambda s: _exa(s.total_flops)),
        ("recomputed besides", lambda s: _exa(sum(part.recomputed for part in s.flops.values()))),
        ("time", lambda s: _hours(s.hours)),
    ]
    return _rows("ExaFLOPs", run, rows)


def _memory(run: RunEstimate) -> Table:
    kinds = list(dict.fromkeys(kind for stage in run.stages for kind in stage.memory.gpu))
    rows: list[tuple[str, Callable[[StageEstimate], str]]] = [("strategy", lambda s: s.strategy)]
    rows += [(kind, lambda s, kind=kind: _gib(s.memory.gpu.get(kind, 0.0))) for kind in kinds]  # type: ignore[misc]
    rows.append(("total", lambda s: _gib(s.memory.gpu_total)))
    # On two lines: three stages and the labels fit into 80 columns.
    rows.append(("fullest in", lambda s: s.memory.peak.replace("'s ", "'s\n")))
    rows.append((f"fits in {run.stages[0].fit.available / GIB:.1f}", lambda s: "yes" if s.fit.fits else "NO"))
    if run.w2_parameters:
        rows.append(("one plain N x V tensor", lambda s: _gib(s.naive_vocabulary)))
        rows.append(("our N x block instead", lambda s: _gib(s.our_vocabulary)))
    return _rows("GiB per GPU", run, rows)


def _host(run: RunEstimate) -> Table:
    kinds = dict.fromkeys(kind for stage in run.stages for kind in stage.host)
    rows: list[tuple[str, Callable[[StageEstimate], str]]] = [
        (kind, lambda s, kind=kind: _gib(s.host.get(kind, 0.0)))  # type: ignore[misc]
        for kind in kinds
    ]
    if len(rows) > 1:
        rows.append(("total", lambda s: _gib(sum(s.host.values()))))
    return _rows(f"GiB of host memory on a node of {run.gpus_per_node} GPU{'s' * (run.gpus_per_node > 1)}", run, rows)


def _disk(run: RunEstimate) -> Table:
    rows: list[tuple[str, Callable[[StageEstimate], str]]] = [
        ("a checkpoint", lambda s: _gib(s.disk.checkpoint)),
        ("checkpoints at once", lambda s: str(s.disk.num_checkpoints)),
        ("export", lambda s: _gib(s.disk.export)),
    ]
    if any(stage.disk.masters for stage in run.stages):
        rows.append(("fp32 masters for the next stage", lambda s: _gib(s.disk.masters)))
    rows.append(("total at most", lambda s: _gib(s.disk.total)))
    return _rows("GiB on the run's disk", run, rows)


def _fused_layers(run: RunEstimate) -> Table:
    table = _table("Fused by liger-kernel on CUDA", "", "number", "class")
    for kind, classes in run.fused_layers.items():
        table.add_row(kind, str(sum(classes.values())), ", ".join(classes) or "none is as Llama's")
    return table


def _remarks(run: RunEstimate) -> Iterator[str]:
    assumed = list(dict.fromkeys(figure for stage in run.stages for figure in stage.volume.assumed))
    if assumed:
        yield f"Assumed, because neither recipe nor shards state it: {escape(', '.join(assumed))}"
    if not all(stage.volume.exact for stage in run.stages):
        yield "Estimates follow the recipe's figures per sample; after `alignvlm data plan` on the shards it is exact."
    for stage in run.stages:
        for name, read in stage.volume.reads.items():
            yield f"{escape(stage.name)}: {escape(name)} is read by {escape(read)}"
    yield f"Disk of the run's folder, the initial model included: at most {_gib(run.disk)} GiB"
    yield from _recomputation(run)
    yield from _lower_strategies(run)
    problems = [problem for stage in run.stages for problem in stage.problems]
    for problem in problems:
        yield f"[bold red]does not fit:[/] {escape(problem)}"
    if not problems:
        yield "[green]Everything fits.[/]"


def _recomputation(run: RunEstimate) -> Iterator[str]:
    """The least that fits, beside what the recipe says."""
    least = run.least_recomputation
    if run.recompute is None:
        chosen = "; ".join(f"{stage.name} {stage.recompute.words}" for stage in run.stages)
        yield f"Recomputed layers, chosen as training would (auto): {escape(chosen)}"
        return
    if least is None:
        return
    words = least.recompute.words
    if least.recompute == run.recompute:
        yield f"Recomputed layers: {words}, as the recipe says: the least that fits."
    else:
        cost = f"{_exa(least.flops)} ExaFLOPs of layers computed twice"
        yield f"Recomputed layers: {words} is the least that fits ({cost}): set {least.overrides}"


def _lower_strategies(run: RunEstimate) -> Iterator[str]:
    """Which stages need no ZeRO-3."""
    found: dict[str, list[tuple[str, float]]] = {}
    for stage in run.stages:
        if stage.lower is not None:
            found.setdefault(stage.lower[0], []).append((stage.name, stage.lower[1]))
    for strategy, stages in found.items():
        names, most = [name for name, _ in stages], max(size for _, size in stages)
        keys = " ".join(f"stages.{name}.deepspeed={strategy}" for name in names)
        yield (
            f"{escape(', '.join(names))} would fit under {strategy} too, in {_gib(most)} GiB, with less work for the "
            f"host in every micro-batch: for a new run, {escape(keys)}"
        )


def _rows(title: str, run: RunEstimate, rows: list[tuple[str, Callable[[StageEstimate], str]]]) -> Table:
    table = _table(title, "", *(stage.name for stage in run.stages))
    for label, cell in rows:
        bold = label in ("all", "total", "time", "steps")
        table.add_row(label, *(cell(stage) for stage in run.stages), style="bold" if bold else None)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number else "left", no_wrap=number > 0)
    return table


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,.0f}"


def _exa(flops: float) -> str:
    return f"{flops / 1e18:,.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _hours(hours: float) -> str:
    return (
        f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.1f} min" if hours >= 1 / 60 else f"{hours * 3600:,.1f} s"
    )
