"""One file over HTTP: goes on where it broke off, and is never taken for what it is not."""

from __future__ import annotations

import http.client
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from edge_asr import __version__
from edge_asr.catalogue import ModelFile, Source
from edge_asr.errors import BundleError, EdgeAsrError
from edge_asr.models.part import Part, WrongFileError
from edge_asr.models.progress import Progress, megabytes

BLOCK_BYTES = 1 << 16
MAX_BYTES = 1 << 32
"""No file of a model is larger: where nobody knows the size, a server cannot fill the disk."""
ADVANCE_BYTES = 1 << 20
"""A try that brings at least this much is no failure: a bad line may break many times."""
SPARE_BYTES = 64 << 20
"""What a pull leaves free on the disk."""
_TRY_LATER = (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a source may take."""

    timeout_s: float = 30.0
    """Without a single byte."""
    tries: int = 5
    """In a row, without getting on."""
    pause_s: float = 1.0
    """Before the second try; then twice as long each time."""


class UnavailableError(EdgeAsrError):
    """A source does not have the file, or not the right one; another one may."""

    def __init__(self, text: str, wrong: bool = False) -> None:
        super().__init__(text)
        self.wrong = wrong
        """Whether it has another file under that name."""


class _BrokenError(Exception):
    """A try failed; the next one may not, and goes on where this one ended."""


def fetch(
    file: ModelFile, folder: Path, sources: Sequence[Source], progress: Progress, patience: Patience | None = None
) -> None:
    """Bring a file to `folder`, from the first source that has it. Raises EdgeAsrError with what each one answered."""
    refusals: list[str] = []
    kind: type[EdgeAsrError] = EdgeAsrError
    for source in sources:
        try:
            download(source.url(file), file, folder, progress, patience or Patience())
        except UnavailableError as error:
            refusals.append(f"{source.name}: {error}")
            kind = BundleError if error.wrong else kind
            progress.say(f"{file.path}: {source.name}: {error}")
        else:
            return
    raise kind(
        f"{file.path}: {'; '.join(refusals)};"
        " pull again to go on, or name another place with --source, --mirror or --from"
    )


def download(url: str, file: ModelFile, folder: Path, progress: Progress, patience: Patience) -> None:
    """Bring `url` to `folder / file.path`. Raises UnavailableError, and EdgeAsrError where the disk is too small."""
    part = Part(folder, file, url)
    furthest = failures = 0
    while True:
        try:
            _try(part, progress, patience.timeout_s)
            part.finish()
            return
        except (_BrokenError, WrongFileError) as error:
            if isinstance(error, WrongFileError) and not part.resumed:
                raise UnavailableError(f"{error}; deleted", wrong=True) from error
            failures = 1 if part.reached >= furthest + ADVANCE_BYTES else failures + 1
            furthest = max(furthest, part.reached)
            if failures >= patience.tries:
                raise UnavailableError(str(error), wrong=isinstance(error, WrongFileError)) from error
            pause_s = patience.pause_s * 2 ** (failures - 1)
            progress.say(f"{file.path}: {error}; trying again in {pause_s:.0f} s")
            time.sleep(pause_s)


def _try(part: Part, progress: Progress, timeout_s: float) -> None:
    """Ask once, and keep what comes. Raises _BrokenError and UnavailableError."""
    part.begin()
    if part.complete:  # it ended between the last byte and the check
        return
    with _opened(part, timeout_s) as response:
        start, total = _accept(part, response)
        _check_room(part, None if total is None else total - start)
        progress.begin(part.file.path, start, total)
        for block in _blocks(response):
            part.append(block)
            progress.advance(len(block))
            if part.size > (total or MAX_BYTES):
                part.discard()
                raise UnavailableError(f"sends more than {megabytes(total or MAX_BYTES)}", wrong=True)
    if total is not None and part.size < total:
        raise _BrokenError(f"connection broke at {megabytes(part.size)} of {megabytes(total)}")


@contextmanager
def _opened(part: Part, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
    """Send the request and yield a good answer."""
    headers = {"User-Agent": f"edge-asr/{__version__}", "Accept-Encoding": "identity", **part.resume_headers()}
    try:
        response = _opener().open(urllib.request.Request(part.url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _http_failure(part, error) from error
    except (OSError, http.client.HTTPException) as error:
        raise _network_failure(error) from error
    with response:
        yield response


def _http_failure(part: Part, error: urllib.error.HTTPError) -> Exception:
    if error.code == 416:  # what is here is no beginning of what is there
        part.discard()
        return _BrokenError("has no such part of the file")
    if 300 <= error.code < 400:
        return UnavailableError(f"HTTP {error.code}: redirects lead nowhere")
    failed = f"HTTP {error.code} {error.reason}".rstrip()
    return _BrokenError(failed) if error.code >= 500 or error.code in _TRY_LATER else UnavailableError(failed)


def _network_failure(error: Exception) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UnavailableError(f"its certificate is not valid: {reason.verify_message}")
    if isinstance(reason, TimeoutError):
        return _BrokenError("no answer in time")
    return _BrokenError(f"no connection: {reason or type(error).__name__}")


def _accept(part: Part, response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return where the answer's bytes begin, and how long the file is; make `part` ready for them."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise UnavailableError("sends it packed, which was not asked for")
    if response.status == 206:
        start, total = part.size, _ranged_total(part, response.headers)
    elif response.status == 200:
        start, total = 0, _length(response.headers)
    else:
        raise UnavailableError(f"HTTP {response.status}")
    if part.file.size is not None and total not in (None, part.file.size):
        raise UnavailableError(f"has {total} bytes of it instead of {part.file.size}", wrong=True)
    total = part.file.size if total is None else total
    if total is None and response.headers.get("Transfer-Encoding") != "chunked":
        raise UnavailableError("does not say how long it is")
    if response.status == 200:
        part.restart(_validator(response.headers), total)
    return start, total


def _ranged_total(part: Part, headers: Message) -> int | None:
    """Return the length of the whole file, known from an answer in part. Raises _BrokenError for another part."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    total = part.total if found is None or found[3] == "*" else int(found[3])
    if found is None or int(found[1]) != part.size or (total is not None and part.total not in (None, total)):
        part.discard()
        raise _BrokenError("sends another part of it than was asked for")
    return total


def _length(headers: Message) -> int | None:
    given = headers.get("Content-Length", "")
    return int(given) if given.isdecimal() and len(given) < 20 else None


def _validator(headers: Message) -> str | None:
    """Return what a later request can name this very version of the file by: weak tags do not count."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _check_room(part: Part, needed: int | None) -> None:
    check_room(part.path.parent, part.file.path, needed or 0)


def check_room(folder: Path, name: str, needed: int) -> None:
    """Raise EdgeAsrError where `needed` bytes more do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if needed > free:
        raise EdgeAsrError(
            f"{name}: needs {megabytes(needed)}, and {folder} has room for {megabytes(max(0, free))};"
            " make room, or set state_dir to a larger disk"
        )


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield what comes, as it comes: so nothing of it is lost when the line breaks."""
    while True:
        try:
            block = response.read1(BLOCK_BYTES)
        except TimeoutError as error:
            raise _BrokenError("nothing more came in time") from error
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenError(f"connection broke: {error or type(error).__name__}") from error
        if not block:
            return
        yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https:",) if req.type == "https" else ("https:", "http:")
        if not newurl.lower().startswith(allowed):
            fp.close()
            raise UnavailableError(f"redirects to {newurl.partition('?')[0][:80]}, which is not safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)
