"""Files that are not what a benchmark reads, in every layout of every benchmark: one line with the file."""

from __future__ import annotations

import lzma
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks import benchmark_names, find_benchmark
from alignvlm.evaluation.benchmarks.job import Job
from alignvlm.evaluation.benchmarks.readers import Docowl, Original, Parquet, Tsv
from alignvlm.evaluation.benchmarks.run import run_benchmarks
from tests.evaluation.benchmarks.files import Known, parquet, png, tsv

RUBBISH = (b"", b"\n\n", b"\x00\xff\xfe rubbish \x80", b"[]", b"{}", b"null", b'"text"', b"[1]", b'{"a": 1}', b"[[]]",
           b'[{"a": {"b": []}}]', b'{"questions": 3}', b"a\tb\n1\n", b"{\n")  # fmt: skip


def broken(root: Path, source: object) -> Iterator[tuple[Path, str]]:
    """(what is given as data, what the message must name) of files that have the right place and wrong content."""
    if isinstance(source, Parquet):
        place = root / (source.config or "data") / f"{source.splits[0]}-00000-of-00001.parquet"
        for row in ({"unrelated": "x"}, {"question": None, "image": None}, {"question": "q", "answer": {"a": 1}}):
            parquet(place, [row])
            if source.join is not None:
                parquet(root / source.join.config / place.name, [row])
            yield root, ".parquet"
        whole = place.read_bytes()
        place.write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])  # its end is sound
        yield root, ".parquet"
        place.write_bytes(b"PAR1 but no parquet")
        yield root, ".parquet"
    elif isinstance(source, Tsv):
        place = root / f"{source.names[0]}.tsv"
        row = {"index": 1, "question": "q", "image": png()}
        for rows in (
            [row | {"image": "7"}],
            [row | {"image": "[]"}],
            [row | {"image": "!" * 80}],
            [row | {"image": "é" * 80}],
            [{"index": 1}],
        ):
            tsv(place, rows)
            yield root, place.name
        for content in (b"", b"\n", b"index\tquestion\timage\n1\tq\n", b"index\tquestion\n1\tq\n"):
            place.write_bytes(content)
            yield root, place.name
    elif isinstance(source, Docowl):
        for name in (f"test/{source.dataset}_test.jsonl", f"test_{source.dataset}.jsonl"):
            for content in (*RUBBISH[:2], *RUBBISH[3:]):
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_bytes(content)
                yield root / name, Path(name).name
            (root / name).unlink()
    elif isinstance(source, Original):
        for content in RUBBISH:
            name = source.files[0].replace("*", "random")
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
            yield root / name, Path(name).name


@pytest.mark.parametrize("name", benchmark_names())
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    for layout, source in find_benchmark(name).sources.items():
        root = tmp_path / layout
        root.mkdir()
        for number, (data, file) in enumerate(broken(root, source)):
            answerer = Known(defaultdict(lambda: "a"))
            with pytest.raises(UserError) as caught:
                run_benchmarks("model", [Job.of(name, data)], tmp_path / f"{layout}{number}", answerer=answerer)
            message = str(caught.value)
            assert "\n" not in message, message
            assert file in message or str(root) in message, message


def kleister(root: Path, expected: list[str], names: list[str]) -> Path:
    """The authors' folder, with renderings of the first pages."""
    (root / "images").mkdir(parents=True)
    (root / "expected.tsv").write_text("".join(f"{line}\n" for line in expected))
    with lzma.open(root / "in.tsv.xz", "wb") as stream:
        stream.writelines(f"{name}.pdf\tcharity_name\tthe text\n".encode() for name in names)
    for name in names:
        (root / "images" / f"{name}.png").write_bytes(png())
    return root


def test_kleister_charity_from_the_authors_files(tmp_path: Path) -> None:
    """Two documents: three fields of four are found, with a space and a colon; one of five predictions is wrong."""
    data = kleister(
        tmp_path / "test-A",
        [
            "charity_name=The_Trust:_One".replace(":", "_") + " charity_number=12",
            "report_date=2016-03-31 charity_name=B",
        ],
        ["a", "b"],
    )
    replies = dict.fromkeys(find_benchmark("klc").keys, "None")  # type: ignore[attr-defined]
    replies |= {"charity_name": "the trust: one", "charity_number": "12", "report_date": "2016-03-31"}
    answerer = Known({f"What is the value for the {key}?": reply for key, reply in replies.items()})
    entry = run_benchmarks("m", [Job.of("klc", data)], tmp_path / "out", answerer=answerer)["benchmarks"]["klc"]
    # document a: name and number right, the date wrong; document b: the date right, number and name wrong
    assert (entry["items"], entry["flavour"], entry["layout"]) == (16, "official", "original")
    assert entry["scores"]["precision"] == pytest.approx(50)
    assert entry["scores"]["recall"] == pytest.approx(75)
    assert entry["score"] == pytest.approx(60)
    limited = run_benchmarks("m", [Job.of("klc", data / "expected.tsv", limit=3)], tmp_path / "few", answerer=answerer)
    assert limited["benchmarks"]["klc"]["items"] == 8


@pytest.mark.parametrize(
    ("expected", "names", "message"),
    [
        (["charity_name=a"], ["a", "b"], "expected.tsv: 1 lines for the 2 documents of in.tsv beside it"),
        (["charity=a"], ["a"], "expected.tsv, line 1: 'charity=a' must be key=value with one of the keys"),
        (["charity_name"], ["a"], "expected.tsv, line 1: 'charity_name' must be key=value"),
        (["charity_name=a"], ["../a"], "column 'image' must be a path below"),
    ],
)
def test_mistakes_in_the_authors_files_of_kleister(
    tmp_path: Path, expected: list[str], names: list[str], message: str
) -> None:
    data = kleister(tmp_path / "data", expected, names)
    with pytest.raises(UserError) as caught:
        run_benchmarks("m", [Job.of("klc", data)], tmp_path / "out", answerer=Known({}))
    assert message in str(caught.value)
    (data / "in.tsv.xz").unlink()
    with pytest.raises(UserError, match=r"in\.tsv or in\.tsv\.xz, which names the documents"):
        Job.of("klc", data)
