"""What `benchmarks/connector.py` finds out about a method, as a table and as a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from _common import TENSORS, Shape

SWEPT, PLAIN = "floor: its products alone", "floor: 7 plain products"


@dataclass
class Result:
    method: str
    forward_ms: float | None = None
    total_ms: float | None = None
    extra_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    """Largest error by tensor, each relative to the largest float64 value."""
    note: str = ""


def show(shape: Shape, results: list[Result]) -> None:
    print(f"\nN={shape.tokens:,}  V={shape.vocab:,}  D={shape.width:,}  {shape.dtype}")
    print(f"{'':28}{'fwd ms':>10}{'fwd+bwd':>10}{'extra MiB':>11}" + "".join(f"{f'err {t}':>11}" for t in TENSORS))

    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    for r in results:
        print(
            f"{r.method:28}{number(r.forward_ms, ',.1f'):>10}{number(r.total_ms, ',.1f'):>10}"
            f"{number(r.extra_mib, ',.0f'):>11}" + "".join(f"{number(r.errors.get(t), '.1e'):>11}" for t in TENSORS),
            r.note,
        )
    by_name = {r.method: r for r in results}
    eager = by_name.get("eager")
    for name in (name for name in by_name if name.startswith("ours") and "subset" not in name):
        ours, parts = by_name[name], []
        for title, other in (("eager", eager), ("its products", by_name.get(SWEPT)), ("14 NDV", by_name[PLAIN])):
            if ours.total_ms and other is not None and other.total_ms:
                parts.append(f"{ours.total_ms / other.total_ms:.2f} of the time of {title}")
        if ours.extra_mib and eager is not None and eager.extra_mib:
            parts.append(f"{ours.extra_mib / eager.extra_mib:.3f} of eager's memory")
        print(f"{name}: {', '.join(parts)}")


def plot(measured: list[tuple[Shape, list[Result]]], main: Shape, path: Path) -> None:
    """Time and memory against N (at the main V) and against V (at the main N)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, key in enumerate(("tokens", "vocab")):
        fixed = "vocab" if key == "tokens" else "tokens"
        chosen = [(s, r) for s, r in measured if s.width == main.width and getattr(s, fixed) == getattr(main, fixed)]
        chosen.sort(key=lambda item: getattr(item[0], key))
        for line, quantity in enumerate(("total_ms", "extra_mib")):
            axis = axes[line][column]
            for method in dict.fromkeys(r.method for _, results in chosen for r in results):
                points = [
                    (getattr(s, key), getattr(r, quantity)) for s, results in chosen for r in results
                    if r.method == method and getattr(r, quantity)
                ]  # fmt: skip
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=method)
            axis.set(xscale="log", yscale="log", xlabel="visual tokens N" if key == "tokens" else "vocabulary V")
            axis.set_ylabel("forward + backward [ms]" if quantity == "total_ms" else "extra memory [MiB]")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"ALIGN operator, D={main.width}, {main.dtype}")
    figure.savefig(path, dpi=110)
