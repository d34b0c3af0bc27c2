"""What `benchmarks/connector.py` finds out about a method, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

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
