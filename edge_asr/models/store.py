"""The models on this machine: pulled whole, checked and proven, or not there at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edge_asr.catalogue import BUNDLED, Entry, ModelFile
from edge_asr.config import BUNDLED_MODEL, PULLED_LAST, pulled_last
from edge_asr.errors import AudioError, BundleError, ConfigError, EdgeAsrError
from edge_asr.models.download import check_room
from edge_asr.models.part import SUFFIX, Part, WrongFileError, check, sync
from edge_asr.models.progress import Progress

Transcribe = Callable[[Path, Sequence[Path]], list[str]]
"""From the folder of a bundle and recordings to their texts; raises what a bundle and an engine raise."""
Fetch = Callable[[ModelFile, Path], None]
"""Bring a file to a folder, checked, or raise EdgeAsrError."""


class Store:
    """Folder of pulled models; one folder each, as published."""

    def __init__(self, folder: Path, transcribe: Transcribe) -> None:
        self._folder = folder
        self._transcribe = transcribe

    def folder_of(self, entry: Entry) -> Path:
        """Return where a model is, or would be."""
        return BUNDLED_MODEL if entry is BUNDLED else self._folder / entry.name

    def is_here(self, entry: Entry) -> bool:
        """Whether a model is on this machine."""
        return self.folder_of(entry).is_dir()

    def is_begun(self, entry: Entry) -> bool:
        """Whether a pull of a model was begun and is to go on."""
        return self._partial(entry).is_dir()

    def pull(self, entry: Entry, fetch: Fetch, progress: Progress, default: bool = True) -> None:
        """Bring a model here with `fetch`, prove it and put it in place; `default`: it is what `model: null` means.

        One that is here is only proven. Raises EdgeAsrError; what is right of the files stays for the next time.
        """
        with self._locked(entry):
            if self.is_here(entry):
                progress.say(f"{entry.name} is here already; verifying it")
                self.verify(entry)
            else:
                self._bring(entry, fetch, progress)
            if default:
                self._write_default(entry.name)

    def verify(self, entry: Entry) -> None:
        """Raise BundleError, a line for each problem, where a model is not here or not as published."""
        folder = self.folder_of(entry)
        if not folder.is_dir():
            missing = "comes with the repository only" if entry is BUNDLED else _pull(entry)
            raise BundleError(f"{entry.name}: is not here; {missing}")
        remedy = _remedy(entry)
        if problems := list(_problems(entry, folder)):
            raise BundleError("\n".join(f"{folder}/{problem}; {remedy}" for problem in problems))
        try:
            self._prove(entry, folder)
        except (BundleError, AudioError) as error:
            raise BundleError(f"{error}; {remedy}") from error

    def remove(self, entry: Entry, engines: Sequence[Path]) -> None:
        """Delete a model, what there is of it, and the folders of its engines.

        Raises ConfigError for the bundled one, or where there is nothing, EdgeAsrError where it cannot be deleted.
        """
        if entry is BUNDLED:
            raise ConfigError(f"{entry.name} is the bundled model and stays; remove a pulled one")
        built = [engine for engine in engines if engine.is_dir()]
        if not self.is_here(entry) and not self.is_begun(entry) and not built:
            raise ConfigError(f"{entry.name} is not here, so there is nothing to remove; see: edge-asr models list")
        with self._locked(entry):
            for engine in built:  # before the model: what is interrupted here can be asked for again
                _delete(engine)
            if pulled_last(self._folder) == entry.name:
                (self._folder / PULLED_LAST).unlink()
            if self.is_here(entry):  # renamed first: half a model is never at its place
                shutil.rmtree(self._partial(entry), ignore_errors=True)
                self.folder_of(entry).rename(self._partial(entry))
            if self.is_begun(entry):
                _delete(self._partial(entry))

    def _bring(self, entry: Entry, fetch: Fetch, progress: Progress) -> None:
        partial = self._partial(entry)
        partial.mkdir(exist_ok=True)
        missing = [file for file in entry.files if not _is_right(partial, file)]
        check_room(self._folder, entry.name, sum(file.size or 0 for file in missing) - _bytes_in(partial, missing))
        for file in missing:
            fetch(file, partial)
        _keep_only(partial, entry)
        progress.say(f"{entry.name}: recognising its test recording")
        try:
            self._prove(entry, partial)
        except (BundleError, AudioError) as error:
            doubtful = [file.path for file in entry.files if file.sha256 is None]
            for path in doubtful:
                (partial / path).unlink()
            told = f"deleted what may be wrong ({', '.join(doubtful)}), pull again" if doubtful else "please report it"
            raise BundleError(f"{entry.name}: refused: {error}; {told}") from error
        partial.rename(self.folder_of(entry))
        sync(self._folder)

    def _prove(self, entry: Entry, folder: Path) -> None:
        """Raise BundleError where the recordings of a model do not give their published texts."""
        if wrong := difference(entry, self._transcribe(folder, recordings(entry, folder))):
            raise BundleError(wrong)

    def _write_default(self, name: str) -> None:
        written = self._folder / f".{PULLED_LAST}"
        written.write_text(f"{name}\n", encoding="utf-8")
        sync(written)
        written.rename(self._folder / PULLED_LAST)
        sync(self._folder)

    def _partial(self, entry: Entry) -> Path:
        return self._folder / f".{entry.name}.partial"

    @contextmanager
    def _locked(self, entry: Entry) -> Iterator[None]:
        """Hold a model's lock, or raise EdgeAsrError where another process has it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / f".{entry.name}.lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"state_dir: cannot write to {self._folder}: {error.strerror}; set another one"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise EdgeAsrError(f"{entry.name}: is being pulled or removed already; wait for that") from error
            yield


def recordings(entry: Entry, folder: Path) -> list[Path]:
    """Return the recordings of a model in `folder` whose texts were published."""
    return [folder / golden.recording for golden in entry.goldens]


def difference(entry: Entry, texts: Sequence[str]) -> str | None:
    """Return how the texts of a model's recordings differ from the published ones; None where they do not."""
    for golden, text in zip(entry.goldens, texts, strict=True):
        if "".join(text.split()) != "".join(golden.text.split()):
            return f"{golden.recording} gives '{text}' instead of '{golden.text}'"
    return None


def find_in(folder: Path, entry: Entry) -> Path:
    """Return where all files of a model lie: in `folder`, or below it in one called as the model is or was published.

    Raises ConfigError where there is no such place.
    """
    for root in (folder, folder / entry.name, folder / entry.published):
        missing = [file.path for file in entry.files if not (root / file.path).is_file()]
        if not missing:
            return root
        if len(missing) < len(entry.files):
            raise ConfigError(f"--from {root}: {', '.join(missing)} missing; copy all files of {entry.name} there")
    raise ConfigError(
        f"--from {folder}: holds no {entry.name}; expected {', '.join(file.path for file in entry.files)}"
        f" in it, or in {entry.name} or {entry.published} below it"
    )


def copy(file: ModelFile, root: Path, folder: Path, progress: Progress) -> None:
    """Bring a file from one folder to another, checked. Raises EdgeAsrError."""
    original = root / file.path
    part = Part(folder, file, str(original))
    part.discard()
    progress.say(f"{file.path}: copying")
    try:
        shutil.copyfile(original, part.path)
        part.finish()
    except WrongFileError as error:
        raise BundleError(f"{original}: {error}; copy it again") from error
    except OSError as error:
        raise EdgeAsrError(f"{original}: cannot be copied: {error.strerror}; try again") from error


def _is_right(folder: Path, file: ModelFile) -> bool:
    """Whether a file of a pull is here; a wrong one is deleted."""
    try:
        check(folder / file.path, file)
    except WrongFileError:
        (folder / file.path).unlink(missing_ok=True)
        return False
    return True


def _bytes_in(folder: Path, files: Sequence[ModelFile]) -> int:
    parts = [folder / f"{file.path}{SUFFIX}" for file in files]
    return sum(part.stat().st_size for part in parts if part.exists())


def _problems(entry: Entry, folder: Path) -> Iterator[str]:
    for file in entry.files:
        try:
            check(folder / file.path, file)
        except WrongFileError as error:
            yield f"{file.path}: {error}"


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # of another user, or something is being written there
        raise EdgeAsrError(f"{folder}: cannot be deleted: {error.strerror or error}; remove it again") from error


def _pull(entry: Entry) -> str:
    return f"edge-asr models pull {entry.name}"


def _remedy(entry: Entry) -> str:
    if entry is BUNDLED:
        return "restore it from the repository"
    return f"run: edge-asr models remove {entry.name}, then {_pull(entry)}"


def _keep_only(folder: Path, entry: Entry) -> None:
    """Delete what is no file of the model, and wait until the others are on the disk."""
    wanted = {folder / file.path for file in entry.files}
    folders = {folder}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            folders.add(path)
        elif path not in wanted:
            path.unlink()
    for path in folders:
        sync(path)
