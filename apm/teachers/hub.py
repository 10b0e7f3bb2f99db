"""Files of the Hugging Face hub: from its cache, or downloaded after a quick look whether it can be reached.

The hub's own client retries for minutes when the network is silent; here an answer comes within `PROBE_SECONDS`.
The hub's environment variables (HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, …) hold, through its client.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from apm.errors import TeacherError
from apm.teachers.base import TeacherUnavailable

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names that open_clip gives to the weights in a repository, in the order of preference."""
PROBE_SECONDS = 3.0

T = TypeVar("T")


def weight_files(location: str) -> tuple[str, tuple[str, ...]]:
    """Split open_clip's ``org/name/`` or ``org/name/file`` into the repository and the files that may hold its weights.

    A pickled file's safetensors twin is preferred, as open_clip does.
    """
    repo, _, filename = location.rpartition("/")
    if not filename:
        return repo, WEIGHTS
    path = Path(filename)
    if path.suffix in (".bin", ".pth"):
        return repo, (f"{path.stem}.safetensors", filename)
    return repo, (filename,)


def cached(repo: str, filenames: Sequence[str]) -> Path | None:
    """Return the first of `filenames` that the hub's cache on this machine holds, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for filename in filenames:
        try:
            found = try_to_load_from_cache(repo, filename)
        except HFValidationError as error:
            raise TeacherError(f'"{repo}" is not the name of a repository on the Hugging Face hub: {error}') from error
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None


def fetch(repo: str, filenames: Sequence[str], *, wanted_by: str, library: str = "open_clip") -> Path:
    """Return the first of `filenames` that the repository has: from the cache, else downloaded.

    Args:
        repo: ``org/name``.
        filenames: alternatives, in the order of preference.
        wanted_by: the teacher's name, for messages.
        library: whose model it is, for messages.

    Raises:
        TeacherUnavailable: none is cached and the hub cannot be reached, or must not be.
        TeacherError: the repository has none of them, or does not let us in.
    """
    if found := cached(repo, filenames):
        return found
    from huggingface_hub import constants, hf_hub_download

    host = urlsplit(constants.ENDPOINT).netloc
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(wanted_by, repo, "HF_HUB_OFFLINE forbids to fetch them")
    for filename in filenames:
        status = _probe(repo, filename)
        if isinstance(status, str):
            raise _unavailable(wanted_by, repo, f"{host} cannot be reached ({status})")
        if status in (401, 403):
            raise TeacherError(
                f'{host} denies access to "{repo}", needed for the teacher "{wanted_by}" (status {status}):'
                " the name is wrong, or the repository is private or gated. Log in with: hf auth login"
            )
        if status == 404:
            continue
        if status >= 500 or status in (407, 429):
            raise _unavailable(wanted_by, repo, f"{host} answers with status {status}")
        try:
            return Path(hf_hub_download(repo, filename, etag_timeout=PROBE_SECONDS))
        except Exception as error:  # the client's errors have no common base below Exception across its versions
            raise _unavailable(wanted_by, repo, f"the download from {host} failed ({_one_line(error)})") from error
    raise TeacherError(
        f'The repository "{repo}" on {host}, needed for the teacher "{wanted_by}", does not exist or has no'
        f" {' or '.join(filenames)}: it holds no {library} model."
    )


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Keep the hub's client off the network inside: what is built there has all its files here already."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _unavailable(wanted_by: str, repo: str, reason: str) -> TeacherUnavailable:
    return TeacherUnavailable(
        f'The weights of the teacher "{wanted_by}" ("{repo}" on the Hugging Face hub) are not on this machine, and'
        f" {reason}. Run it once with network access, or set HF_HOME to a cache that holds them."
    )


def _probe(repo: str, filename: str) -> int | str:
    """Ask for a file's head: the status the hub answers with, or why no answer came within `PROBE_SECONDS`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    def ask() -> int:
        session: Any = get_session()
        url = hf_hub_url(repo, filename)
        response = session.head(url, headers=build_hf_headers(), timeout=PROBE_SECONDS)
        # A storage host that the hub sends us on to may refuse a HEAD where it allows the download.
        stayed = urlsplit(str(response.url)).netloc == urlsplit(url).netloc
        return int(response.status_code) if stayed else 200

    return within_seconds(ask)


def within_seconds(ask: Callable[[], T]) -> T | str:
    """What `ask` returns, or in one line why that did not come within `PROBE_SECONDS`.

    It runs in a thread of its own because looking up a host name knows no time limit.
    """
    answer: list[T | str] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # whichever HTTP library is used
            answer.append(_one_line(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answer[0] if answer else f"no answer within {PROBE_SECONDS:g} seconds"


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
