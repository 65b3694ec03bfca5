"""data/cached_challenge_fineweb.py against a local server that speaks the hub's protocol."""

import collections
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import build_dataset  # noqa: E402
import cached_challenge_fineweb as fetching  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from train_gpt import read_shard  # noqa: E402

REPO = "someone/golf"
PREFIX = "datasets"
NAME = "fineweb10B_sp8192"
SHARD = f"datasets/{NAME}/fineweb_train_%06d.bin"
TRAIN_SHARDS, SHARD_TOKENS = 5, 30_000


def shard_bytes(folder: Path, seed: int, count: int = SHARD_TOKENS) -> bytes:
    writer = build_dataset.ShardWriter(folder, "made", count)
    writer.add(np.random.default_rng(seed).integers(0, 8192, count).astype(np.uint16))
    return (folder / "made_000000.bin").read_bytes()


class Hub(http.server.ThreadingHTTPServer):
    """A dataset repository. Faults are per remote name, each used up as it happens.

    Attributes: files {name: bytes}; cuts {name: [bytes after which a response is cut, ...]};
    refusals {name: [status, ...]}; wrong {name: [other content, ...]}; requests, as (method, name,
    range header); honours_range; pause_seconds between blocks of a body; redirects to /cdn/;
    stalls {name: bytes after which a response waits for the event `go_on`}.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts, self.refusals, self.wrong = (collections.defaultdict(list) for _ in range(3))
        self.requests: list[tuple[str, str, str | None]] = []
        self.honours_range, self.redirects, self.pause_seconds = True, False, 0.0
        self.stalls: dict[str, int] = {}
        self.go_on = threading.Event()
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, name: str) -> list[str | None]:
        """The range headers of the GETs of a file."""
        return [asked for method, path, asked in self.requests if (method, path) == ("GET", name)]

    def handle_error(self, request, client_address) -> None:
        """A client that went away is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Hub = self.server
        match = re.fullmatch(rf"/(cdn/)?datasets/{REPO}/resolve/main/{PREFIX}/(.+)", self.path)
        if not match:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        name = match[2]
        with hub.lock:
            hub.requests.append((self.command, name, self.headers.get("Range")))
        if hub.refusals[name]:
            return self.answer(hub.refusals[name].pop(0), {"Retry-After": "0"})
        if name not in hub.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = hub.files[name]
        facts = {
            "X-Repo-Commit": "0" * 40,
            "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Linked-Size": str(len(body)),
            "ETag": '"pointer"',
        }
        if hub.redirects and not match[1]:
            return self.answer(302, {**facts, "Location": f"{hub.url}/cdn{self.path}"})
        if self.command == "HEAD":
            return self.answer(200, {**facts, "Content-Length": str(len(body))})
        return self.send_body(name, body, facts)

    def send_body(self, name: str, body: bytes, facts: dict[str, str]) -> None:
        hub: Hub = self.server
        if hub.wrong[name]:
            body = hub.wrong[name].pop(0)
        start, asked = 0, self.headers.get("Range")
        if asked and hub.honours_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        self.send_response(206 if start else 200)
        for key, value in {**facts, "Content-Length": str(len(body) - start)}.items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        stop = start + hub.cuts[name].pop(0) if hub.cuts[name] else len(body)
        with hub.lock:
            hub.busy += 1
            hub.busiest = max(hub.busiest, hub.busy)
        for at in range(start, min(stop, len(body)), 4096):
            self.wfile.write(body[at : min(at + 4096, stop)])
            time.sleep(hub.pause_seconds)
            if at > hub.stalls.get(name, len(body)):
                hub.go_on.wait(60)
        with hub.lock:
            hub.busy -= 1
        if stop < len(body):
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A repository with one set; the hub's library asks it, and waits are short."""
    server = Hub()
    folder = tmp_path_factory.mktemp("made")
    for number in range(TRAIN_SHARDS):
        server.files[SHARD % number] = shard_bytes(folder, number)
    server.files[f"datasets/{NAME}/fineweb_val_000000.bin"] = shard_bytes(folder, 99, 5000)
    server.files["tokenizers/fineweb_8192_bpe.model"] = b"a model"
    server.files["tokenizers/fineweb_8192_bpe.vocab"] = b"a vocabulary"
    set_manifest(server, files_train=TRAIN_SHARDS)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", REPO)
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def set_manifest(server: Hub, files_train: int, **tokenizer: str) -> None:
    files = dict(
        model_path="tokenizers/fineweb_8192_bpe.model",
        vocab_path="tokenizers/fineweb_8192_bpe.vocab",
    )
    stats = dict(files_train=files_train, files_val=1)
    manifest = dict(
        datasets=[dict(name=NAME, tokenizer_name="sp_bpe_8192", stats=stats)],
        tokenizers=[dict(name="sp_bpe_8192", **(tokenizer or files))],
    )
    server.files["manifest.json"] = json.dumps(manifest).encode()


def fetch(folder: Path, *extra: str) -> int:
    arguments = ["--variant", "sp8192", "--data-dir", str(folder), "--quiet", *extra]
    return fetching.main(arguments)


def present(folder: Path) -> dict[str, bytes]:
    """All files with their final names."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("redirects", [False, True])
def test_a_whole_set_arrives_in_the_public_layout(hub, tmp_path, capsys, redirects):
    hub.redirects = redirects
    assert fetch(tmp_path) == 0
    assert present(tmp_path) == hub.files
    assert not leftovers(tmp_path)
    assert len(read_shard(tmp_path / (SHARD % 4))) == SHARD_TOKENS
    assert "verify_dataset.py" in capsys.readouterr().out


def test_only_the_asked_training_shards_are_fetched(hub, tmp_path):
    assert fetch(tmp_path, "--train-shards", "2") == 0
    assert sorted(name for name in present(tmp_path) if "train" in name) == [SHARD % 0, SHARD % 1]
    assert fetch(tmp_path / "none", "--train-shards", "0") == 0
    assert not [name for name in present(tmp_path / "none") if "train" in name]


def test_the_documents_come_only_with_docs(hub, tmp_path):
    documents = {
        "docs_selected.jsonl": b'{"text": "x"}\n' * 999,
        "docs_selected.source_manifest.json": b"{}",
    }
    hub.files |= documents
    assert fetch(tmp_path) == 0
    assert not set(documents) & set(present(tmp_path))
    assert fetch(tmp_path, "--with-docs") == 0
    assert present(tmp_path) == hub.files


def test_the_byte_sidecar_comes_along_where_there_is_one(hub, tmp_path):
    name = f"datasets/{NAME}/fineweb_val_bytes_000000.bin"
    hub.files[name] = hub.files[f"datasets/{NAME}/fineweb_val_000000.bin"]
    assert fetch(tmp_path) == 0
    assert present(tmp_path)[name] == hub.files[name]


def test_a_second_run_fetches_nothing(hub, tmp_path):
    assert fetch(tmp_path) == 0
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert not [request for request in hub.requests if request[0] == "GET"]


def test_several_files_arrive_at_once(hub, tmp_path):
    hub.pause_seconds = 0.01
    assert fetch(tmp_path) == 0
    assert hub.busiest >= 3


def test_a_cut_connection_goes_on_where_it_stopped(hub, tmp_path):
    hub.cuts[SHARD % 1] = [10_000, 7_000]
    assert fetch(tmp_path) == 0
    assert present(tmp_path) == hub.files
    asked = hub.gets(SHARD % 1)
    assert [value and int(value[6:-1]) for value in asked] == [None, 10_000, 17_000]


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub, tmp_path):
    hub.honours_range = False
    hub.cuts[SHARD % 1] = [10_000]
    assert fetch(tmp_path) == 0
    assert present(tmp_path) == hub.files


def test_a_run_that_gives_up_leaves_no_half_file_and_the_next_goes_on(hub, tmp_path, capsys):
    hub.cuts[SHARD % 2] = [10_000] + [0] * 40
    assert fetch(tmp_path) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert "run the same command again" in message
    assert SHARD % 2 not in present(tmp_path)
    assert all(data == hub.files[name] for name, data in present(tmp_path).items())
    hub.cuts.clear()
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert hub.gets(SHARD % 2) == ["bytes=10000-"]
    assert present(tmp_path) == hub.files
    assert not leftovers(tmp_path)


def test_a_killed_run_leaves_no_half_file_and_the_next_goes_on(hub, tmp_path):
    folder, made = tmp_path / "data", tmp_path / "made"
    made.mkdir()
    name = SHARD % 0  # the library writes 10 MiB at a time, of these 25 MB
    hub.files[name] = shard_bytes(made, 7, 12_500_000)
    hub.stalls[name] = 15_000_000
    command = [sys.executable, str(ROOT / "data" / "cached_challenge_fineweb.py"), "--quiet"]
    run = subprocess.Popen(
        [*command, "--variant", "sp8192", "--data-dir", str(folder)],
        env={**os.environ, "HF_ENDPOINT": hub.url},
    )
    deadline = time.monotonic() + 60
    parts: list[Path] = []
    while time.monotonic() < deadline and not any(part.stat().st_size for part in parts):
        parts = list(folder.rglob(".fineweb_train_000000*.part"))
    run.send_signal(signal.SIGKILL)
    run.wait()
    hub.go_on.set()
    assert name not in present(folder)
    hub.requests.clear()
    assert fetch(folder) == 0
    assert re.fullmatch(r"bytes=[1-9]\d*-", hub.gets(name)[0])
    assert present(folder) == hub.files
    assert not leftovers(folder)


@pytest.mark.parametrize("damage", ["short", "long", "flipped", "junk"])
def test_a_damaged_copy_on_arrival_is_fetched_again(hub, tmp_path, damage):
    good = hub.files[SHARD % 3]
    bad = dict(
        short=good[:-2],
        long=good + b"xx",
        flipped=good[:-1] + bytes([good[-1] ^ 1]),
        junk=bytes(len(good)),
    )[damage]
    hub.wrong[SHARD % 3] = [bad]
    assert fetch(tmp_path) == 0
    assert present(tmp_path) == hub.files


@pytest.mark.parametrize("damage", ["short", "flipped"])
def test_a_server_that_only_has_damaged_copies_is_given_up(hub, tmp_path, capsys, damage):
    good = hub.files[SHARD % 3]
    bad = good[:-2] if damage == "short" else good[:-1] + bytes([good[-1] ^ 1])
    hub.wrong[SHARD % 3] = [bad] * 40
    assert fetch(tmp_path) == 2
    assert SHARD % 3 not in present(tmp_path)
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_shard_whose_header_lies_is_refused_though_its_hash_is_right(hub, tmp_path, capsys):
    lying = bytearray(hub.files[SHARD % 3])
    lying[8:12] = (SHARD_TOKENS + 1).to_bytes(4, "little")
    hub.files[SHARD % 3] = bytes(lying)
    assert fetch(tmp_path) == 2
    assert "header promises 30,001 tokens" in capsys.readouterr().err
    assert SHARD % 3 not in present(tmp_path)


@pytest.mark.parametrize("damage", ["short", "flipped", "empty"])
def test_a_local_file_that_is_damaged_is_fetched_again(hub, tmp_path, capsys, damage):
    assert fetch(tmp_path) == 0
    path = tmp_path / (SHARD % 0)
    good = path.read_bytes()
    spoiled = dict(short=good[:-1], flipped=good[:-1] + bytes([good[-1] ^ 1]), empty=b"")[damage]
    path.write_bytes(spoiled)
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert present(tmp_path) == hub.files
    assert [request[1] for request in hub.requests if request[0] == "GET"] == [SHARD % 0]
    assert "downloading it again" in capsys.readouterr().err


def test_a_file_that_the_manifest_lists_and_the_server_lacks_is_named(hub, tmp_path, capsys):
    del hub.files[SHARD % 2]
    assert fetch(tmp_path) == 2
    assert (
        f"1 of the 8 files that its manifest lists are missing, the first is {SHARD % 2}"
        in capsys.readouterr().err
    )
    assert not [
        request for request in hub.requests if request[1] == SHARD % 0 and request[0] == "GET"
    ]


def test_too_many_requests_are_waited_for(hub, tmp_path):
    hub.refusals["manifest.json"] = [429]
    hub.refusals[SHARD % 0] = [429, 429, 503]
    assert fetch(tmp_path) == 0
    assert present(tmp_path) == hub.files


def test_endless_refusals_end_in_one_line(hub, tmp_path, capsys):
    hub.refusals["manifest.json"] = [429] * 99
    assert fetch(tmp_path) == 2
    assert "too many requests (429)" in capsys.readouterr().err.splitlines()[-1]


def test_a_repository_that_does_not_exist_is_named(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "nobody/nothing")
    assert fetch(tmp_path) == 2
    message = capsys.readouterr().err
    assert "nobody/nothing: no such dataset" in message
    assert "MATCHED_FINEWEB_REPO_ID" in message


def test_a_folder_without_manifest_is_named(hub, tmp_path, capsys):
    del hub.files["manifest.json"]
    assert fetch(tmp_path) == 2
    assert "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX" in capsys.readouterr().err


def test_another_prefix_is_asked_for(hub, tmp_path, monkeypatch, capsys):
    moved = {f"deeper/{name}": data for name, data in hub.files.items()}
    hub.files = moved
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets/deeper")
    assert fetch(tmp_path) == 0
    assert {f"deeper/{name}": data for name, data in present(tmp_path).items()} == moved


def test_an_unknown_variant_lists_what_there_is(hub, tmp_path, capsys):
    assert fetching.main(["--variant", "sp777", "--data-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "lacks fineweb10B_sp777" in message
    assert NAME in message


def test_more_shards_than_there_are_is_an_error_only_when_asked_for(hub, tmp_path, capsys):
    assert fetch(tmp_path, "--train-shards", "6") == 2
    assert "ask for at most 5" in capsys.readouterr().err
    assert not [name for name in present(tmp_path) if "fineweb" in name]
    assert fetch(tmp_path) == 0


def test_skip_manifest_uses_the_one_that_is_here(hub, tmp_path, capsys):
    assert fetch(tmp_path, "--skip-manifest") == 2
    assert "manifest.json: missing" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_bytes(hub.files["manifest.json"])
    assert fetch(tmp_path, "--skip-manifest") == 0
    assert not hub.gets("manifest.json")
    assert present(tmp_path) == hub.files


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/../../evil", "..\\evil"])
def test_a_manifest_cannot_write_outside_the_folder(hub, tmp_path, capsys, name):
    set_manifest(hub, TRAIN_SHARDS, path=name)
    assert fetch(tmp_path / "data") == 2
    assert "leaves the folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("text", [b"<html>", b"[]", b'{"datasets": []}'])
def test_a_broken_manifest_is_named(hub, tmp_path, capsys, text):
    hub.files["manifest.json"] = text
    assert fetch(tmp_path) == 2
    assert "manifest" in capsys.readouterr().err


def test_the_command_line_asks_the_server_of_hf_endpoint(hub, tmp_path):
    command = [sys.executable, str(ROOT / "data" / "cached_challenge_fineweb.py")]
    flags = ["--variant", "sp8192", "--train-shards", "1", "--data-dir", str(tmp_path)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    done = subprocess.run(
        [*command, *flags], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert present(tmp_path)[SHARD % 0] == hub.files[SHARD % 0]
    assert "100%" in done.stderr
