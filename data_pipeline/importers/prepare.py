"""Makes a source's folder ready: generates its shards, or indexes foreign ones. Idempotent, also after a crash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.masking import mask
from data_pipeline.parallel import pool
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.sidecars import is_indexed
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.writer import write_shards


@dataclass(frozen=True)
class FolderSpec:
    """One source's folder and where its shards come from."""

    name: str
    folder: str
    generator: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


def prepare_folders(specs: Sequence[FolderSpec], progress: Progress = silent) -> None:
    """`prepare_folder` for several sources; those to be generated are generated at the same time, one per core."""
    missing = [s for s in specs if s.generator is not None and not is_indexed(open_storage(s.folder))]
    with pool(None, len(missing)) as executor:
        if executor is not None:
            sizes = [int(spec.args.get("num_samples", 1)) for spec in missing]
            with progress(f"write {len(missing)} sources", sum(sizes)) as advance:
                for size, _ in zip(sizes, executor.map(_prepare_alone, missing), strict=True):
                    advance(size)
    for spec in specs:
        prepare_folder(spec.name, spec.folder, spec.generator, spec.args, progress=progress)


def _prepare_alone(spec: FolderSpec) -> None:
    prepare_folder(spec.name, spec.folder, spec.generator, spec.args, num_processes=1)


def prepare_folder(
    name: str,
    folder: str | os.PathLike[str],
    generator: str | None = None,
    args: Mapping[str, Any] | None = None,
    *,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """The manifest of a source's folder, made first where it is missing.

    Raises:
        DataError: neither shards nor a generator, or the folder was made with other arguments of the generator.
    """
    storage = open_storage(folder)
    if generator is not None:
        return write_generated(name, folder, generator, args or {}, num_processes=num_processes, progress=progress)
    if is_indexed(storage):
        return load_manifest(storage)
    if not any(True for _ in storage.list(".tar")):
        raise DataError(
            f"source {name!r}: {mask(storage.url)} has no tar shards; put them there, "
            "or write your own data with `alignvlm data write --from FILE`"
        )
    return index_shards(folder, source=name, num_processes=num_processes, progress=progress)


def write_generated(
    name: str,
    folder: str | os.PathLike[str],
    generator: str,
    args: Mapping[str, Any],
    *,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Shards of a generator, written unless the folder holds them already. Raises DataError when it holds others."""
    from data_pipeline.generators import generate

    origin = {"generator": generator, "args": dict(args)}
    storage = open_storage(folder)
    if is_indexed(storage):
        manifest = load_manifest(storage)
        if manifest.origin != origin:
            raise DataError(
                f"source {name!r}: {mask(storage.url)} was made with {manifest.origin or 'no generator'}, "
                f"the recipe asks for {origin}; delete the folder or give the source another path"
            )
        return manifest
    total = args.get("num_samples")
    with progress(f"write {name}", total if isinstance(total, int) else None) as advance:
        records = _counted(generate(generator, **args), advance)
        return write_shards(records, folder, source=name, origin=origin, num_processes=num_processes)


def _counted(records: Iterable[Mapping[str, Any]], advance: Callable[[int], None]) -> Iterator[Mapping[str, Any]]:
    for record in records:
        yield record
        advance(1)
