"""Names of teachers, and the hub with and without a network."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from apm.errors import TeacherError
from apm.teachers import DEFAULT, TeacherUnavailable, check_teacher, load_teacher
from tests.places import ROOT

# --- names


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("embeded", 'Did you mean "embedded"'),
        ("ViT-B-16/opnai", 'Did you mean "ViT-B-16/openai"'),
        ("ViT-B-16", "ViT-B-16 has the tags openai, laion400m_e31"),
        ("ViT-B16/openai", 'Did you mean "ViT-B-16/openai"'),
        ("", "A teacher is NAME/TAG"),
        ("/", "A teacher is NAME/TAG"),
        ("\n\x1b[31m", "A teacher is NAME/TAG"),
        (str(ROOT), f"local-dir:{ROOT}"),
        ("ViT-B-16/none.pt", "no checkpoint file none.pt"),
        ("ViT-B-16//nowhere/weights", "no checkpoint file /nowhere/weights"),
        ("hf-hub:", "hf-hub:ORG/REPO"),
    ],
)
def test_unknown_names_say_what_is_meant(spec: str, hint: str, hub_cache: Path) -> None:
    with pytest.raises(TeacherError) as caught:
        load_teacher(spec)
    assert hint in str(caught.value)
    assert not isinstance(caught.value, TeacherUnavailable)


@pytest.mark.slow
def test_a_name_is_checked_without_loading() -> None:
    check_teacher("embedded")
    program = (
        "import sys\n"
        "from apm.errors import TeacherError\n"
        "from apm.teachers import check_teacher\n"
        "for spec in ('ViT-B-16/opnai', 'ViT-B-16/openai', 'local-dir:nowhere', 'nothing'):\n"
        "    try:\n"
        "        check_teacher(spec)\n"
        "        sys.exit(f'{spec} was found')\n"
        "    except TeacherError:\n"
        "        pass\n"
        "sys.exit(bool({'torch', 'open_clip'} & set(sys.modules)))\n"
    )
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "nowhere"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | settings, cwd=ROOT, check=True)


# --- the hub


@pytest.mark.parametrize("spec", [DEFAULT, "ViT-H-14-quickgelu/dfn5b", "hf-hub:someone/nothing"])
def test_a_named_teacher_that_is_not_here_is_an_error_offline(spec: str, hub_cache: Path) -> None:
    with pytest.raises(TeacherUnavailable, match="HF_HUB_OFFLINE") as caught:
        load_teacher(spec)
    assert spec in str(caught.value)
    assert "HF_HOME" in str(caught.value)


def fetch_elsewhere(tmp_path: Path, endpoint: str, *, spec: str = DEFAULT, **variables: str) -> str:
    """Resolve a teacher in a process of its own, whose hub is `endpoint`; return the error or the path found."""
    program = (
        "import sys\n"
        "from apm.errors import TeacherError\n"
        "from apm.teachers import hub, catalog\n"
        "repo, files = hub.weight_files(catalog.find(*sys.argv[1].split('/')).location)\n"
        "try:\n"
        "    print(hub.fetch(repo, files, wanted_by=sys.argv[1]))\n"
        "except TeacherError as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    hidden = ("HF_", "HUGGING", "http_proxy", "https_proxy", "all_proxy")
    clean = {
        key: value for key, value in os.environ.items() if not key.lower().startswith(tuple(map(str.lower, hidden)))
    }
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", program, spec],
        env=clean | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_hub_that_refuses_the_connection_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = fetch_elsewhere(tmp_path, f"http://127.0.0.1:{port}")
    assert said.startswith("TeacherUnavailable")
    assert f"127.0.0.1:{port} cannot be reached" in said


@pytest.mark.slow
def test_a_hub_that_never_answers_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        said = fetch_elsewhere(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.startswith("TeacherUnavailable")
    assert "cannot be reached" in said


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves files as the hub does, or one status for everything."""

    files: ClassVar[dict[str, bytes]] = {}
    status = 200
    asked: ClassVar[list[str]] = []

    def respond(self, *, with_body: bool) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path)
        status = self.status if self.status != 200 else 200 if content is not None else 404
        body = content if content is not None and status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake_hub() -> Iterator[tuple[type[FakeHub], str]]:
    class Handler(FakeHub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "kind", "cause"),
    [
        (200, "TeacherError", "holds no open_clip model"),
        (401, "TeacherError", "private or gated"),
        (403, "TeacherError", "private or gated"),
        (503, "TeacherUnavailable", "answers with status 503"),
    ],
)
def test_what_a_hub_answers_is_told_apart(
    fake_hub: tuple[type[FakeHub], str], tmp_path: Path, status: int, kind: str, cause: str
) -> None:
    handler, endpoint = fake_hub
    handler.status = status
    said = fetch_elsewhere(tmp_path, endpoint)
    assert said.startswith(f"{kind} ")
    assert cause in said


@pytest.mark.slow
@pytest.mark.parametrize("filename", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_weights_are_downloaded_once(fake_hub: tuple[type[FakeHub], str], tmp_path: Path, filename: str) -> None:
    handler, endpoint = fake_hub
    handler.files[f"/timm/vit_base_patch16_clip_224.openai/resolve/main/{filename}"] = b"weights" * 999
    found = fetch_elsewhere(tmp_path, endpoint)
    assert found.startswith(str(tmp_path / "home"))
    assert Path(found).read_bytes() == b"weights" * 999
    handler.asked.clear()
    assert fetch_elsewhere(tmp_path, endpoint) == found
    assert handler.asked == []
    assert fetch_elsewhere(tmp_path, endpoint, HF_HUB_OFFLINE="1") == found
    moved = tmp_path / "home" / "hub"
    elsewhere = fetch_elsewhere(tmp_path, endpoint, HF_HOME=str(tmp_path / "other"), HF_HUB_CACHE=str(moved))
    assert elsewhere == found
    assert handler.asked == []
