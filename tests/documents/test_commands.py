"""Every command line in README and docs: run as it stands where it is cheap, else parsed and its recipe loaded."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from alignvlm.cli import parse_arguments
from alignvlm.config import list_recipes, load_recipe
from alignvlm.errors import UserError
from alignvlm.stage_data import open_reader, used_sources
from tests.checkout import ROOT
from tests.data_pipeline.published import published_desk
from tests.documents.commands import DOCUMENTS, Line, lines_of
from tests.fixtures.command import Command, every_command
from tests.test_project_files import COMMANDS as MAKE
from tests.tiny import conversation, picture

PLACEHOLDERS = {
    "RECIPE": "paper_llama32_1b", "RUN": "runs/demo", "N": "8", "IMAGE": "registry/image:1", "CLAIM": "disk",
    "PATH": "train.jsonl", "NAME": "jsonl", "FILE": "page.png", "FOLDER": "data/mine",
}  # fmt: skip
AS_WRITTEN = {
    ("config", "show"), ("config", "list"), ("config", "check"), ("config", "schema"), ("estimate",), ("score",),
    ("data", "write"), ("data", "fetch"), ("data", "index"), ("data", "verify"), ("launch", "kubernetes"),
}  # fmt: skip
WITH_DRY_RUN = {("train",), ("data", "write"), *(("launch", kind) for kind in ("slurm", "torchrun", "hosts", "local"))}
"""The others need weights, a trained model or a server: their arguments are parsed and their recipe is loaded."""
ELSEWHERE = ("score --vectors", "s3://", "verify data/mine --recipe", "--measure", "--ray")
"""Needs a bucket, the weights of a recipe's tokenizer, or Ray."""
PAPER = [name for name in list_recipes() if name.startswith("paper_")]
OF_OTHERS = ("pytest", "vllm.entrypoints.openai.api_server", "sglang.launch_server")
"""Modules that documents start and that are not of this repository."""
SCRIPT = re.compile(r"(launch|scripts|benchmarks|examples|tests)/[\w./*-]+")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory that the documents speak of: conversations, images, folders of shards, a recipe."""
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "data/fields", "data/charts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("page.png", "images/0.png", "images/a.png"):
        picture(32, 32).save(tmp_path / name)
    (tmp_path / "benchmarks").mkdir()
    for name, gold in (("docvqa", {"answers": ["a"]}), ("mmvet", {"answer": "a", "capability": "ocr"})):
        reply = {"index": 0, "id": "v1_0", "reply": "a", "gold": gold}
        (tmp_path / "benchmarks" / f"{name}.jsonl").write_text(json.dumps(reply) + "\n")
    (tmp_path / "judge.json").write_text('{"v1_0": 1.0}')
    row = {"messages": conversation("What is the total?", "12.50", 1), "images": ["a.png"]}
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    published_desk(tmp_path)
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```yaml\n(name: mine\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(recipe)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document_work(document: Path, desk: Path, command: Command) -> None:
    for line in lines_of(document.read_text(encoding="utf-8")):
        if line.program == "alignvlm":
            check_alignvlm(line, command)
        elif line.program == "make":
            assert {word for word in line.words if "=" not in word} - {"COMMAND"} <= MAKE, line.text
        else:
            check_script(line)


@pytest.mark.parametrize("name", ["low_resource_3b", "paper_llama32_1b"])
def test_commands_of_a_recipe_prepare_its_published_data(name: str, desk: Path, command: Command) -> None:
    """On tiny files of the same layout: afterwards every source of stages and evaluation is there and can be read."""
    texts = [(ROOT / "alignvlm" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")]
    if "as the comment of paper_llama32_1b says" in texts[0]:
        texts.append((ROOT / "alignvlm" / "recipes" / "paper_llama32_1b.yaml").read_text(encoding="utf-8"))
    lines = [line for text in texts for line in re.findall(r"^#   alignvlm (.*)$", text, re.MULTILINE)]
    assert len(lines) >= 2
    for line in lines:
        command(*shlex.split(line))
    recipe = load_recipe(name)
    evaluated = {task.source for task in recipe.evaluation.tasks.values()}
    assert len(evaluated) == 3
    for source in used_sources(recipe):
        reader = open_reader(source)
        assert len(reader) >= 1
        assert [len(reader[i].images) for i in range(len(reader))] == [1] * len(reader)
        if source.name in evaluated:
            assert "number 0" in reader[0].meta["answers"]


def test_the_papers_recipes_share_the_data_of_the_first() -> None:
    folders = [{source.folder for source in used_sources(load_recipe(name))} for name in PAPER]
    assert len(PAPER) == 3
    assert folders == [folders[0]] * 3


def check_alignvlm(line: Line, command: Command) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in line.words if not word.startswith("[") and not word.endswith("]")]
    if not line.whole and not parses(words):
        check_mention(line)
        return
    name = next((key for key in every_command() if tuple(words[: len(key)]) == key), ())
    arguments = parse_arguments(words)
    if name == ("data", "write") and not arguments.tasks and not arguments.finish:
        shutil.rmtree(arguments.target, ignore_errors=True)
    if name in AS_WRITTEN and not any(each in " ".join(words) for each in ELSEWHERE):
        command(*words)
    elif name in WITH_DRY_RUN:
        command(*words, *([] if arguments.dry_run else ["--dry-run"]))
    elif hasattr(arguments, "overrides") and not (
        words[0] == "eval" and (arguments.benchmark or arguments.suite)
    ):  # which takes any export
        load_recipe(getattr(arguments, "recipe", None) or arguments.target, arguments.overrides)
    check_stage_folders(words)


def parses(words: list[str]) -> bool:
    try:
        parse_arguments(words)
    except (SystemExit, UserError):
        return False
    return True


def check_mention(line: Line) -> None:
    """A command that is only named: some command begins with these words and has these options."""
    words = line.words[: line.words.index("…")] if "…" in line.words else line.words
    named = [word for word in words if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
    options = {word.partition("=")[0] for word in line.words if word.startswith("--")} - {"--help"}
    fitting = [parser for key, parser in every_command().items() if list(key[: len(named)]) == named]
    assert any(options <= set(parser._option_string_actions) for parser in fitting), f"no such command: {line.text}"


def check_stage_folders(words: list[str]) -> None:
    """`runs/<recipe>/<n>-<stage>` of a recipe of the package is a stage that it has."""
    for recipe, number, stage in re.findall(r"runs/(\w+)/(\d+)-(\w+)", " ".join(words)):
        if recipe in list_recipes():
            assert load_recipe(recipe).stages[stage].number == int(number)


def check_script(line: Line) -> None:
    """The files that the command names are there, and a script takes the variables that are set for it."""
    named = [word for word in (line.program, *line.words) if SCRIPT.fullmatch(word)]
    for word in named:
        assert list(ROOT.glob(word)) or (ROOT / "alignvlm" / word).exists(), f"{word} of {line.text} is not there"
    modules = [after for before, after in zip(line.words, line.words[1:], strict=False) if before == "-m"]
    for module in modules:
        assert module in OF_OTHERS or (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), line.text
    for variable in line.variables:
        assert any(f"${{{variable}" in (ROOT / word).read_text(encoding="utf-8") for word in named), line.text


def test_variables_of_the_cluster_page_are_read_by_the_files_that_it_names() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    slurm, torchrun, hosts = "launch/slurm/train.sbatch", "launch/torchrun.sh", "launch/deepspeed_hosts.sh"
    local = "launch/local.sh"
    files = {
        "Slurm": [slurm], "torchrun": [torchrun], "hosts": [hosts], "local": ["alignvlm/launch/local.py"],
        "all scripts": [slurm, torchrun, hosts, local], "all but hosts": [slurm, torchrun, local],
        "all but Slurm": [torchrun, hosts, local], "local.sh": [local],
    }  # fmt: skip
    rows = re.findall(r"^\| `(ALIGNVLM_\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    assert len(rows) > 10
    for variable, users in rows:
        for name in (name for user in ([users] if users in files else users.split(", ")) for name in files[user]):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert re.search(rf"\$\{{{variable}:-|\"{variable}\"|export {variable}=", text), (variable, name)


def test_commands_are_found_in_blocks_sentences_and_tables() -> None:
    text = (
        "Say `alignvlm data index FOLDER`, or `ALIGNVLM_NODES=4\nlaunch/torchrun.sh RECIPE` over two lines.\n\n"
        "| a | `alignvlm eval RECIPE \\| less` |\n\n    make test   # it's long\n    runs/x   no command\n\n"
        "```sh\nalignvlm train a.yaml \\\n  seed=1 > log\n```\n\n```python\nalignvlm.train()\n```\n"
    )
    found = [(line.program, line.words, line.variables, line.whole) for line in lines_of(text)]
    assert found == [
        ("alignvlm", ["train", "a.yaml", "seed=1"], {}, True),
        ("make", ["test"], {}, True),
        ("alignvlm", ["data", "index", "FOLDER"], {}, False),
        ("launch/torchrun.sh", ["RECIPE"], {"ALIGNVLM_NODES": "4"}, False),
        ("alignvlm", ["eval", "RECIPE"], {}, False),
    ]


def test_the_readme_has_commands_of_every_kind() -> None:
    """A guard for the test above: it must not pass because nothing is found."""
    found = [line for line in lines_of((ROOT / "README.md").read_text(encoding="utf-8")) if line.whole]
    assert {line.program for line in found} >= {"alignvlm", "make"}
    assert {line.words[0] for line in found} >= {"data", "estimate", "train", "launch", "eval", "chat", "quickstart"}
