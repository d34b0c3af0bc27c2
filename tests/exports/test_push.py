"""`alignvlm export --push` against a hub on loopback: what arrives there, what it refuses, what is said."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from alignvlm.exports import WEIGHTS, WEIGHTS_INDEX, save_export
from tests.fixtures.command import Command
from tests.stores.servers import Answer, serve_memory
from tests.tiny import tiny_model

TOKEN = "hf_test-token-0123456789"
OLD = "model-00001-of-00002.safetensors"


class ModelHub:
    """Repositories of models: name -> {"private", branch -> {file -> bytes}}; weights travel by themselves, by LFS."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.endpoint = ""
        self.objects: dict[str, bytes] = {}
        """SHA-256 -> content of what was uploaded by LFS."""
        self.log: list[str] = []
        self.refuses, self.status = "", 403
        """The part of a path that is answered by a status."""

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        path = unquote(urlsplit(target).path)
        self.log.append(f"{method} {path}")
        if self.refuses and self.refuses in path:
            return self.status, {"x-error-message": f"You don't have the rights to do this with {TOKEN}"}, b""
        if path.startswith("/lfs/"):  # a signed address of a store, which gets no token
            assert "authorization" not in headers
            self.objects[path.removeprefix("/lfs/")] = body
            return _json({})
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"x-error-message": "Invalid username or password."}, b""
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = {
                "private": asked.get("private", asked.get("visibility") == "private"),
                "main": {},
            }
            return _json({"url": f"{self.endpoint}/{name}", "name": name})
        if path == "/lab/letters.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            missing = [each for each in objects if each["oid"] not in self.objects]
            for each in missing:
                each["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}}
            return _json({"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/(lab/\w+)(?:/(revision|tree|branch|preupload|commit)/([^/]+))?.*", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"x-error-code": "RepoNotFound"}, b""
        repository, what, branch = self.repositories[found[1]], found[2], found[3] or "main"
        if what == "branch":
            if branch in repository:
                return 409, {"x-error-message": "Reference already exists"}, b""
            repository[branch] = dict(repository["main"])
            return _json({})
        if branch not in repository:
            return 404, {"x-error-code": "RevisionNotFound"}, b""
        if what == "tree":
            return _json([{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in repository[branch]])
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            return _json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository[branch][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    repository[branch][line["value"]["path"]] = self.objects[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    del repository[branch][line["value"]["path"]]
            return _json({"commitUrl": f"{self.endpoint}/{found[1]}/commit/1", "commitOid": "1" * 40, "success": True})
        siblings = [{"rfilename": name} for name in repository[branch]]
        return _json({"id": found[1], "sha": "1" * 40, "private": repository["private"], "siblings": siblings})


def _json(value: Any) -> Answer:
    return 200, {"content-type": "application/json"}, json.dumps(value).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    hub = ModelHub()
    with serve_memory(hub) as endpoint:
        hub.endpoint = endpoint
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "letters" / "2-joint" / "export"
    model, processor = tiny_model()
    save_export(model, model.state_dict(), processor, folder)
    (folder / ".DS_Store").touch()
    return folder


def broken_off(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(f"upload\nof {TOKEN} failed")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_folder_becomes_a_repository(hub: ModelHub, export: Path, command: Command) -> None:
    listed = command("export", export, "--push", "lab/letters", "--dry-run")
    assert set(re.findall(r"^ +[\d,]+  (\S+)$", listed, re.MULTILINE)) == names(export)
    assert "would go to lab/letters; nothing was sent" in listed
    assert hub.log == []
    said = command("export", export, "--push", "lab/letters", "--private")
    assert f"pushed {len(names(export))} files to {hub.endpoint}/lab/letters/commit/1" in said
    repository = hub.repositories["lab/letters"]
    assert repository["private"]
    assert repository["main"].keys() == names(export)
    for name in names(export) - {"README.md"}:
        assert repository["main"][name] == (export / name).read_bytes(), name
    card = repository["main"]["README.md"].decode()
    assert 'folder = "lab/letters"\n' in card
    assert card.replace('"lab/letters"', '"."  # this folder, or its name on the Hub') == (
        (export / "README.md").read_text()
    )


def test_a_push_takes_the_place_of_the_one_before(hub: ModelHub, export: Path, command: Command) -> None:
    before = {"README.md": b"mine", "LICENSE": b"mine", OLD: b"old", WEIGHTS_INDEX: b"{}", WEIGHTS: b"old"}
    before["adapter/adapter_config.json"] = b"{}"
    hub.repositories["lab/letters"] = {"private": False, "main": dict(before)}
    command("export", export, "--push", "lab/letters", "--revision", "v2")
    assert hub.repositories["lab/letters"]["main"] == before
    after = hub.repositories["lab/letters"]["v2"]
    assert after.keys() == names(export) | {"LICENSE"}  # no weights of before, which might be loaded
    assert after["README.md"] == after["LICENSE"] == b"mine"
    assert after[WEIGHTS] == (export / WEIGHTS).read_bytes()
    command("export", export, "--push", "lab/letters", "--revision", "v2")  # the branch is there
    said = command("export", export, "--push", "lab/letters", "--private", code=2)
    assert "lab/letters exists and is public" in said


def test_mistakes_are_one_line(
    hub: ModelHub, export: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push = ("export", export, "--push", "lab/letters")
    assert "not ORGANISATION/NAME" in command("export", export, "--push", "letters", code=2)
    assert "no name of a repository" in command("export", export, "--push", "lab/let..ters", code=2)
    assert "belong to --push" in command("export", export, tmp_path / "out", "--private", code=2)
    assert "give the new folder" in command("export", export, code=2)
    hub.refuses = "/api/repos/create"
    said = command(*push, code=2)
    assert "the Hub answers 403" in said
    assert "the token needs to write there" in said
    for path in ("/commit/", "/lfs/"):
        hub.refuses = path
        said = command(*push, code=2)
        assert "the Hub answers 403" in said
        assert TOKEN not in said
    hub.refuses = "/xet-write-token/"
    with monkeypatch.context() as uploading:  # by the client's own uploader
        uploading.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        said = command(*push, code=2)
        assert re.search(r"lab/letters: the push broke off \(.*403.*\); `alignvlm export", said)
        assert TOKEN not in said
        uploading.setattr("huggingface_hub.hf_api.HfApi.preupload_lfs_files", broken_off)
        said = command(*push, "--revision", "v3", code=2)
    assert "lab/letters@v3: the push broke off (upload of *** failed)" in said
    assert f"`alignvlm export {export} --push lab/letters --revision v3` goes on" in said
    hub.refuses, hub.status = "/api/models/lab", 418
    assert "the Hub answers 418: You don't have the rights to do this with ***; `alignvlm exp" in command(*push, code=2)
    hub.refuses = ""
    monkeypatch.setenv("HF_TOKEN", "hf_of-another")
    said = command(*push, code=2)
    assert "the Hub answers 401" in said
    assert "hf_of-another" not in said
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub is not reached" in command(*push, code=2)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "set HF_TOKEN" in command(*push, code=2)
    assert "set HF_TOKEN" in command("export", "missing", tmp_path / "out", "--push", "lab/letters", code=2)
