"""A base and rows from a hub that answers: a server here, which speaks as much of the hub's HTTP
interface as its client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "recipes" / "quickstart" / "base"
MODEL_COMMIT, ROWS_COMMIT = "1" * 40, "2" * 40


@dataclass
class Repository:
    """Files of one commit."""

    commit: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """What the server has, by `models/ORG/NAME` and `datasets/ORG/NAME`, and what was fetched."""

    repositories: dict[str, Repository]
    fetched: list[str] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[0] == "api":
            return self._api(parts[1:], body)
        if parts[0] != "datasets":
            parts = ["models", *parts]
        repository = self.repositories.get("/".join(parts[:3]))
        if repository is None or parts[3:4] != ["resolve"] or parts[4] != repository.commit:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        name = "/".join(parts[5:])
        if name not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}, b""
        content = repository.files[name]
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit}, content

    def _api(self, parts: list[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories.get("/".join(parts[:3]))
        if repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        if parts[3:4] in (["revision"], ["tree"], ["paths-info"]) and parts[4] != repository.commit:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "Invalid rev id"}'
        listed = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in repository.files.items()
        ]
        if parts[3:4] == ["tree"]:
            return 200, {}, json.dumps(listed).encode()
        if parts[3:4] == ["paths-info"]:
            wanted = json.loads(body)["paths"]
            return 200, {}, json.dumps([file for file in listed if file["path"] in wanted]).encode()
        if len(parts) > 3 and parts[3] != "revision":
            return 404, {}, b"{}"
        said = {
            "_id": "0",
            "id": "/".join(parts[1:3]),
            "sha": repository.commit,
            "private": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in repository.files],
        }
        return 200, {}, json.dumps(said).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub at HF_ENDPOINT, and an empty cache for its client."""
    rows = [
        {"prompt": f"message {number}", "completion": f"answer {number}"} for number in range(9)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    base = {path.name: path.read_bytes() for path in BASE.iterdir() if path.is_file()}
    shelf = Hub(
        {
            "models/org/base": Repository(MODEL_COMMIT, {**base, "pytorch_model.bin": b"pickle"}),
            "datasets/org/rows": Repository(ROWS_COMMIT, {"train.jsonl": lines}),
        }
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, headers, content = shelf.answer(self.path, body)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                if code == 200 and "/resolve/" in self.path:
                    shelf.fetched.append(self.path.rsplit("/", 1)[-1])

        do_GET = do_HEAD = do_POST = respond

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    yield shelf
    server.shutdown()


def test_a_base_and_rows_come_from_the_hub_at_their_commits(
    hub: Hub, tmp_path: Path, tree: Any, peftflow: Any
) -> None:
    rows = {"path": "hub:org/rows", "revision": ROWS_COMMIT, "split": "train"}
    tree = {
        **tree,
        "base": {"model": "org/base", "revision": MODEL_COMMIT},
        "data": {"train": rows, "test": {"holdout": 0.3}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    ended = peftflow("check", recipe, "--home", tmp_path / "home", "--json")
    assert ended.code == 0, ended.err
    splits = ended.record["splits"]
    assert splits["train"]["rows_kept"] + splits["test"]["rows_kept"] == 9
    assert "model.safetensors" in hub.fetched
    assert "pytorch_model.bin" not in hub.fetched

    # What was fetched is kept: the second home asks for no file again.
    hub.fetched.clear()
    again = peftflow("check", recipe, "--home", tmp_path / "other", "--json")
    assert again.code == 0, again.err
    assert "model.safetensors" not in hub.fetched


def test_a_plan_fetches_no_weights_and_a_run_is_not_deceived_by_that(
    hub: Hub, tmp_path: Path, tree: Any, peftflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model": "org/base", "revision": MODEL_COMMIT, "dtype": "float32"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tree, "base": base}))
    ended = peftflow("plan", recipe, "--home", tmp_path / "home")
    assert ended.code == 0, ended.err
    assert "config.json" in hub.fetched
    assert "model.safetensors" not in hub.fetched
    # What ships, from shapes alone; what reads weights is said to wait for them.
    assert "Expected" in ended.out
    assert "when the base's weights are here" in ended.out

    # Out of reach now, with a cache that holds the texts.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = peftflow("check", recipe, "--home", tmp_path / "home", "--json")
    assert offline.code == 2
    [error] = offline.record["errors"]
    assert "not in the local cache" in error["found"]
    assert "hf download" in error["fix"]


def test_a_commit_that_the_hub_has_not_is_the_users_to_correct(
    hub: Hub, tmp_path: Path, tree: Any, peftflow: Any
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tree, "base": {"model": "org/base", "revision": "3" * 40}}))
    ended = peftflow("check", recipe, "--home", tmp_path / "home", "--json")
    assert ended.code == 2
    [error] = ended.record["errors"]
    assert "org/base@" + "3" * 40 in error["found"]
    assert "check the id and the commit" in error["fix"]
