"""Every command through a table of mistakes: each is exit code 2 and one line on stderr that names what is wrong.

The commands and their arguments are those of the parser: a new command needs rows here, a new argument needs a type.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignvlm.cli import arguments as types
from alignvlm.cli import main
from data_pipeline.shards.writer import write_shards
from tests.fixtures.command import every_command
from tests.jobs import TINY
from tests.tiny import conversation, picture, tiny_model

NUL = "a\0b"
WRONG: dict[Callable[[str], object], list[str]] = {
    types.positive: ["0", "-1", "1.5", "nan", "inf", "x", "", "9" * 30, "9" * 5000],
    types.count: ["-1", "1e3", "x", "", "9" * 30],
    types.processes: ["0", "-1", "x", "100000"],
    types.port: ["-1", "65536", "1.5", "x", ""],
    types.positive_number: ["0", "-1", "nan", "inf", "-inf", "x", ""],
    types.fraction: ["0", "-0.1", "1.1", "nan", "inf", "x", ""],
    types.word: ["", "  ", NUL],
    types.path: ["", NUL],
    types.columns: ["", "images", "=pages", "images=", "a=b,,c=d"],
    types.folder: ["", NUL, "missing", "file.txt"],
    types.file: ["", NUL, "missing", "empty"],
    types.hosts: ["", "0", "x", "2:1", "1:2:3"],
    types.device_resource: ["", "rdma", "rdma/", "a b/c", "rdma/hca=0", "rdma/hca=x", NUL],
    types.endpoint: ["", "host:", "host:99999", "a b", NUL],
    types.web_address: ["", "host", "host:8000", "ftp://host", "http://", "http://a b", "http://host?x=1", NUL],
}
"""Type of an argument -> what it refuses. The type of every argument that takes a value is one of these."""

RECIPE: list[tuple[list[str], str]] = [
    (["missing"], "unknown recipe 'missing'"),
    (["quikstart"], "did you mean 'quickstart'"),
    (["tiny"], "unknown recipe 'tiny': did you mean 'tiny.yaml'? or give a path ending in .yaml"),
    (["tiny.yml"], "'tiny.yml' does not exist; did you mean 'tiny.yaml'?"),
    (["missing.yaml"], "'missing.yaml' does not exist"),
    (["folder.yaml"], "folder.yaml"),
    (["broken.yaml"], "broken.yaml:2: not valid YAML"),
    (["list.yaml"], "list.yaml:1: a recipe is a mapping"),
    (["latin.yaml"], "latin.yaml"),
    (["nul.yaml"], "nul.yaml"),
    (["empty.yaml"], "empty"),
    (["~nobody-of-that-name/x.yaml"], "x.yaml"),
    (["x" * 5000], "xxx"),
    (["tiny.yaml", "sede=3"], "did you mean 'seed'"),
    (["tiny.yaml", "seed"], "seed"),
    (["tiny.yaml", "=3"], "=3"),
    (["tiny.yaml", "seed=[1"], "seed=[1"),
    (["tiny.yaml", "seed=\x01"], "seed"),
    (["tiny.yaml", "train.precision=fp99"], "train.precision"),
    (["tiny.yaml", "train.processes=0"], "train.processes"),
    (["tiny.yaml", "--sede=3"], "--sede=3"),
    (["tiny.yaml", "seed=1", "--no-such-option"], "--no-such-option"),
]
"""Of every command that takes a recipe."""
EXPORT = [
    (["missing"], "missing is not an export folder"),
    (["empty"], "empty is not an export folder"),
    (["run"], "run is not an export folder (no config.json); give run/10-last/export"),
    (["run/2-first"], "give run/2-first/export"),
    (["file.txt"], "file.txt is not an export folder"),
    (["other_model"], "holds a model of type 'llama'"),
    (["own_model"], "connector kind 'mine' is unknown: known: align, "),
    (["damaged_model"], "config.json"),
    (["list_model"], "config.json"),
]
NEW = ["--from-jsonl", "rows.jsonl"]
ROWS: dict[tuple[str, ...], list[tuple[list[str], str]]] = {
    ("data", "write"): [
        (["tiny.yaml", "--images", "images"], "--from PATH"),
        (["--from-jsonl", "latin.jsonl", "out"], "latin.jsonl, line 1"),
        (["--from-jsonl", "deep.jsonl", "out"], "deep.jsonl, line 1"),
        (["--from-jsonl", "file.txt", "out"], "file.txt, line 1"),
        (["--from", "missing.jsonl", "out"], "missing.jsonl: no such file"),
        (["--from", "empty", "out"], "no parquet, Arrow or JSON lines files here"),
        (["--from", "rows.jsonl", "--format", "jsnol", "out"], "did you mean 'jsonl'"),
        (["--from", "rows.jsonl", "out", "x=1"], "the options of --from are prompt, split"),
        (["--from-jsonl", "rows.jsonl", "out", "x=1"], "its options: images"),
        (["--from-jsonl", "rows.jsonl", "--finish", "out"], "is read by one process"),
        (["--from", "rows.jsonl", "--ray", "--finish", "out"], "give one of them"),
        (["--from", "rows.jsonl", "--task", "1", "out"], "belong together"),
        (["--from", "rows.jsonl", "https://host/out"], "HTTP servers are only read"),
        ([*NEW, "shards"], "shards is not empty"),
        ([*NEW, "file.txt"], "file.txt"),
        ([*NEW, "file.txt/out"], "file.txt"),
        ([*NEW, "n" * 300], "File name too long"),
    ],
    ("data", "fetch"): [
        (["pipe:true", "out"], "runs a shell command"), (["empty", "out"], "no .tar shards"),
        (["s4://bucket/x", "out"], "did you mean 's3'"),
    ],
    ("data", "index"): [
        (["missing"], "missing: no such folder"), (["file.txt"], "file.txt"), (["empty"], "no .tar shards"),
        (["garbage"], "0.tar"), (["s4://bucket/x"], "did you mean 's3'"), (["pipe:true"], "runs a shell command"),
    ],
    ("data", "verify"): [
        (["missing"], "unknown recipe"), (["file.txt"], "unknown recipe"), (["empty"], "no manifest.json"),
        (["no/shards"], "no/shards: no such folder of shards"),
        (["damaged"], "manifest.json is damaged"), (["tiny.yaml"], "no manifest.json"),
    ],
    ("data", "plan"): [*RECIPE, (["tiny.yaml", "--stage", "conector"], "did you mean 'connector'")],
    ("data", "diff"): [
        (["missing.json", "tiny.yaml"], "missing.json: not a saved plan"), (["tiny.yaml"], "required: NEW"),
        (["folder.json", "tiny.yaml"], "folder.json: not a saved plan"),
        (["list.json", "tiny.yaml"], "list.json: not a saved plan"),
        (["deep.jsonl", "tiny.yaml"], "unknown recipe"), (["deep.json", "tiny.yaml"], "deep.json: not a saved plan"),
        (["latin.json", "tiny.yaml"], "latin.json: not a saved plan"), (["missing", "tiny.yaml"], "unknown recipe"),
    ],
    ("data", "show"): [*RECIPE, (["tiny.yaml", "--stage", "conector"], "did you mean 'connector'")],
    ("train",): [
        *RECIPE, (["tiny.yaml", "--dry-run=yes"], "--dry-run"), ([], "are required: RECIPE; see"),
        (["tiny.yaml", "train.processes=3"], "global_batch_packs is 4, which 3 ranks"),
        (["mine.yaml"], "mine.yaml:4: data.sources.mine: data/none has no tar shards"),
        (["run"], "'run' is a folder; the recipe of the run in it is 'run/config.yaml'"),
    ],
    ("estimate",): [*RECIPE, (["tiny.yaml", "--json", "--world-size"], "--world-size expected one argument")],
    ("eval",): [
        *RECIPE, *EXPORT[1:4], *EXPORT[5:6], *EXPORT[7:],
        (["no/export"], "no/export: no such export folder"), (["tiny.yaml"], "no export yet"),
        (["made_model"], "--recipe RECIPE"),
        (["made_model", "--recipe", "missing"], "unknown recipe"),
        (["tiny.yaml", "--stage", "conector"], "did you mean"),
        (["made_model", "--benchmark", "docvqa"], "--benchmark docvqa needs its files: --data PATH"),
        (["made_model", "--benchmark", "docvqa", "--data", "missing"], "missing: no such file or folder"),
        (["made_model", "--benchmark", "docvqa", "--data", "empty"], "empty: no files of benchmark 'docvqa'"),
        (["made_model", "--benchmark", "docvqa", "--data", "latin.jsonl"], "latin.jsonl"),
    ],
    ("score",): [
        ([], "give either a file of stored replies, or --vectors FILE"), (["missing"], "missing: no such file"),
        (["file.txt"], "unknown benchmark 'file'"), (["file.txt", "--benchmark", "docvqa"], "not a stored reply"),
        (["latin.jsonl", "--benchmark", "docvqa"], "latin.jsonl: not UTF-8"),
        (["--vectors", "latin.jsonl"], "latin.jsonl: not JSON"), (["--vectors", "empty"], "this is a folder"),
    ],
    ("analyze", "vocab"): [
        *(([*words, "--data", "shards"], said) for words, said in EXPORT), (["made_model"], "required: --data"),
        (["made_model", "--data", "shards", "--output", "empty"], "empty already exists"),
    ],
    ("report",): [(["missing"], "no run folder"), (["file.txt"], "no run folder"), (["empty"], "is not a run folder")],
    ("goodput",): [
        (["missing"], "no run folder"), (["file.txt"], "no run folder"), (["empty"], "neither timeline.jsonl nor"),
    ],
    ("export",): [
        (["missing", "out"], "not a finished checkpoint"), (["file.txt", "out"], "not a finished checkpoint"),
        (["run", "out"], "give run/10-last/checkpoints/step-00000004"),
        (["missing", "empty"], "already exists"), (["missing"], "give the new folder"),
        (["made_model", "out", "--private"], "belong to --push"), ([], "required: CHECKPOINT"),
        (["made_model", "--push", "model"], "not ORGANISATION/NAME"),
        (["missing", "--push", "a/b", "--dry-run"], "missing is not an export folder"),
        (["missing", "out", "--push", "a/b", "--dry-run"], "leave OUTPUT out"),
    ],
    ("track",): [*RECIPE, (["tiny.yaml"], "no such run"), (["tiny.yaml", "runs=file.txt"], "file.txt")],
    ("chat",): [
        *(([*words, "--question", "?"], said) for words, said in EXPORT), ([], "required: EXPORT"),
        (["made_model", "--question", "?", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["made_model", "--question", "?", "--device", "meta"], "device 'meta' cannot be used"),
        (["made_model", "--question", "?", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
    ("serve",): [
        *EXPORT, ([], "required: EXPORT"), (["made_model", "--image-folder", "file.txt"], "a file, not a folder"),
        (["made_model", "--image-host", "https://images.example/"], "must be HOST or HOST:PORT"),
        (["made_model", "--port", "http"], "must be a whole number"),
        (["made_model", "--host", "no host"], "--host no host: no address of this machine"),
        (["made_model", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000"),
        (["made_model", "--port", "0", "--device", "meta"], "device 'meta' cannot be used"),
    ],
    ("demo",): [
        *EXPORT, ([], "give an export folder"), (["--server", "host:8000"], "must be the address of a server"),
        (["made_model", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8080"),
        (["missing", "--server", "http://127.0.0.1:9"], "missing is not an export folder"),
    ],
    ("config", "show"): RECIPE,
    ("config", "check"): [*RECIPE, (["tiny.yaml", "train.deepspeed=zreo3"], "did you mean 'zero3'")],
    ("config", "list"): [(["x"], "unrecognized arguments: x"), (["--all"], "--all")],
    ("config", "schema"): [(["x"], "unrecognized arguments: x"), (["seed=1"], "seed=1")],
    ("study",): [
        *((["init", *words], said) for words, said in RECIPE), (["noisy", "tiny.yaml"], "unknown study 'noisy'"),
        (["init", "tiny.yaml", "--seeds", "0"], "--seeds"), (["init", "tiny.yaml", "--step-seconds", "0"], "--step-s"),
    ],
    ("launch", "slurm"): [
        *RECIPE, (["tiny.yaml", "--nodes", "3", "--gpus-per-node", "1"], "global_batch_packs"),
        (["tiny.yaml", "--gpus-per-node", "2", "--time", "soon"], "not a time"),
        (["tiny.yaml", "--gpus-per-node", "2", "--processes-per-node", "1"], "one process per GPU"),
    ],
    ("launch", "torchrun"): [
        *RECIPE, (["tiny.yaml", "--nodes", "3", "--processes-per-node", "1"], "global_batch_packs is 4, which 3 ranks"),
    ],
    ("launch", "hosts"): [
        *(([*words, "--hostfile", "h"], said) for words, said in RECIPE),
        (["tiny.yaml"], "--hostfile"), (["tiny.yaml", "--hostfile", "missing"], "missing: no such file"),
        (["tiny.yaml", "--hostfile", "empty"], "empty: no such file"),
    ],
    ("launch", "local"): RECIPE,
    ("launch", "kubernetes"): [
        *(([*words, "--image", "i", "--claim", "c"], said) for words, said in RECIPE), (["tiny.yaml"], "--image"),
        (["tiny.yaml", "--image", "i", "--claim", "c", "--kind", "pod"], "invalid choice: 'pod'"),
        (["tiny.yaml", "name=größe", "--gpus-per-node", "1", "--image", "i", "--claim", "c"], "größe"),
    ],
    ("plan",): [(["quickstart", "--world-size", "8"], "alignvlm estimate quickstart --world-size 8")],
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that may be mistaken for something else."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("empty", "folder.yaml", "folder.json", "images", "garbage", "damaged"):
        (desk / name).mkdir()
    picture(9, 9).save(desk / "images" / "a.png")
    texts = {
        "file.txt": "text", "broken.yaml": "seed: 1\nstages: [1", "list.yaml": "- 1\n", "empty.yaml": "",
        "nul.yaml": "name: a\0b\n", "list.json": "[]", "deep.json": "[" * 100_000, "deep.jsonl": "[" * 100_000 + "\n",
        "garbage/0.tar": "no tar" * 400, "damaged/manifest.json": '{"version": 1',
        "tiny.yaml": TINY.read_text(encoding="utf-8"),
        "mine.yaml": "extends: tiny.yaml\ndata:\n  sources:\n    mine: {path: none}\n"
        "stages: {instruct: {mixture: {charts: null, mine: 1}}}\n",
        "rows.jsonl": json.dumps({"messages": conversation("a", "b")}) + "\n",
    }  # fmt: skip
    for name, text in texts.items():
        (desk / name).write_text(text)
    (desk / "run/10-last/checkpoints/step-00000004").mkdir(parents=True)
    for file in ("config.yaml", "2-first/export/config.json", "10-last/export/config.json"):
        (desk / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (desk / "run" / file).write_text("{}")
    for name in ("latin.yaml", "latin.json", "latin.jsonl"):
        (desk / name).write_bytes(b'name: "gr\xf6\xdfe"\n')
    for part in tiny_model():
        part.save_pretrained(desk / "made_model")
    shutil.copytree(desk / "made_model", desk / "own_model")
    own = json.loads((desk / "own_model/config.json").read_text())
    (desk / "own_model/config.json").write_text(json.dumps(own | {"connector_config": {"kind": "mine"}}))
    for name, config in {"other": '{"model_type": "llama"}', "damaged": "{", "list": "[]"}.items():
        (desk / f"{name}_model").mkdir()
        (desk / f"{name}_model" / "config.json").write_text(config)
    write_shards([{"key": "a", "messages": conversation("a", "b", 1), "images": [picture(9, 9)]}], desk / "shards")
    return desk


@pytest.fixture(autouse=True)
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


def mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistaken command says."""
    capsys.readouterr()
    try:
        code: object = main(words)
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    shown = f"{words}: exit code {code}\n{printed.out[-2000:]}{printed.err[-4000:]}"
    assert code == 2, shown
    assert printed.err.startswith("alignvlm: "), shown
    assert printed.err.count("\n") == 1, shown
    assert printed.err[:-1].isprintable(), shown
    assert "Traceback" not in printed.out, shown
    return printed.err


def test_every_command_has_rows() -> None:
    assert ROWS.keys() == every_command().keys()


@pytest.mark.parametrize("name", ROWS, ids=" ".join)
def test_every_mistake_is_one_line(name: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    before = set(os.listdir())
    for words, said in ROWS[name]:
        assert said in mistake([*name, *words], capsys), words
        left = set(os.listdir()) - before
        assert left <= {"out", "out.partial"}, words
        for folder in left:
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", [name for name in ROWS if name != ("plan",)], ids=" ".join)
def test_every_value_of_the_wrong_kind_is_one_line(name: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    before: list[str] = []
    for action in every_command()[name]._actions:
        if action.nargs == 0:  # a flag
            continue
        option = action.option_strings[-1:]
        for value in ["no-choice"] if action.choices else WRONG[kind_of(action)]:
            said = mistake([*name, *(option or before), value], capsys)
            assert (option or [action.metavar or action.dest])[0] in said
        if not option:
            before.append({types.folder: "empty", types.file: "file.txt"}.get(kind_of(action), "x"))


def kind_of(action: argparse.Action) -> Callable[[str], object]:
    assert action.type in WRONG, f"{action.dest} takes a value of no type of alignvlm.cli.arguments"
    return action.type  # type: ignore[return-value]


@pytest.mark.parametrize(
    "words", [[], ["trian", "quickstart"], ["data"], ["launch", "sulrm", "tiny.yaml"], ["--sede"], [""]]
)
def test_words_that_are_no_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    mistake(words, capsys)


def test_a_module_of_the_user_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ALIGNVLM_IMPORTS", "no_such_module")
    assert "'no_such_module' cannot be imported" in mistake(["config", "schema"], capsys)
