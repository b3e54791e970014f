"""Ids on the hub, against a local stand-in for its endpoint; transport errors included."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from allocator.checkpoint import hub
from allocator.checkpoint.hub import is_hub_id, model_path
from allocator.errors import CheckpointError

COMMIT = "c" * 40
MODEL = {
    "config.json": b'{"model_type": "mixtral"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00001.safetensors": bytes(2000),
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": bytes(2000),
    "original/weights.safetensors": bytes(10),
    "README.md": b"# card",
}
GGUFS = {
    "a-BF16-00001-of-00002.gguf": b"GGUF1",
    "a-BF16-00002-of-00002.gguf": b"GGUF2",
    "a-Q8_0.gguf": b"GGUF3",
    "README.md": b"# card",
}
REPOS = {"org/moe": MODEL, "org/ggufs": GGUFS}


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *_):
        pass

    def answer(self, *, body):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append((self.command, path))
        parts = path.split("/")
        if path.startswith("api/models/"):
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if repo == "org/gated":
                return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
            if repo not in REPOS:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            if rest[:1] == ["tree"]:
                files = REPOS[repo].items()
                listed = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files
                ]
                return self.send(200, json.dumps(listed).encode(), {}, body)
            siblings = [{"rfilename": n} for n in REPOS[repo]]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(info).encode(), {}, body)
        repo, name = "/".join(parts[:2]), "/".join(parts[4:])
        data = REPOS[repo][name]
        if self.server.broken and name.endswith("safetensors"):
            return self.send(403, b"", {}, body)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.send(200, data, headers, body)

    def send(self, status, data, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.broken = [], False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_fetches_weights_config_tokenizer_and_card_alone(server):
    folder = model_path("org/moe")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        n: MODEL[n]
        for n in (
            "config.json", "tokenizer.json", "model-00001-of-00001.safetensors",
            "model.safetensors.index.json", "README.md",
        )
    }  # fmt: skip
    fetched = [path for verb, path in server.asked if verb == "GET" and "resolve" in path]
    assert model_path("org/moe@main") == folder
    again = [path for verb, path in server.asked if verb == "GET" and "resolve" in path]
    assert again == fetched


def test_a_gguf_in_parts_is_named_by_its_first_part(server):
    path = model_path("org/ggufs:BF16")
    assert path.name == "a-BF16-00001-of-00002.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(GGUFS)[1:3]
    assert model_path("org/ggufs:Q8_0").read_bytes() == GGUFS["a-Q8_0.gguf"]
    assert model_path("org/ggufs:BF16") == path


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("org/absent", "neither a path of this machine nor a model that the hub shows you"),
        ("org/gated", "accept its terms"),
        ("org/moe@v9", "no revision 'v9'"),
        ("org/ggufs", "org/ggufs:BF16"),
        ("org/ggufs:Q4", "'Q4' in its name, got none"),
        ("org/ggufs:a-", "got a-BF16.gguf, a-Q8_0.gguf"),
        ("no/such/path", "no such model"),
        ("/no/such", "no such model"),
    ],
)
def test_refusals_are_one_line(server, model, says):
    with pytest.raises(CheckpointError, match=r"^[^\n]*$") as refused:
        model_path(model)
    assert says in str(refused.value)


def test_a_failed_fetch_is_one_line_and_the_same_call_resumes(server):
    server.broken = True
    with pytest.raises(CheckpointError, match="the same command resumes"):
        model_path("org/moe")
    server.broken = False
    assert (model_path("org/moe") / "config.json").is_file()


def test_what_was_fetched_is_there_without_the_hub(server, monkeypatch):
    folder = model_path("org/moe")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_path("org/moe") == folder
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        model_path("org/ggufs:BF16")


def test_the_disk_is_looked_at_before_anything_is_fetched(server, monkeypatch):
    monkeypatch.setattr(hub, "free_disk", lambda _: 100)
    with pytest.raises(CheckpointError, match="to fetch, 100 B free"):
        model_path("org/moe")
    assert not any("resolve" in path for verb, path in server.asked if verb == "GET")


def test_a_path_that_exists_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/moe").mkdir(parents=True)
    assert not is_hub_id("org/moe")
    assert model_path("org/moe") == Path("org/moe")
