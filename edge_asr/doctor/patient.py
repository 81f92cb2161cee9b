"""What every check may look at: the machine's files, the configuration, and what its libraries said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from edge_asr.config import Config, EngineConfig
from edge_asr.doctor.children import Answer
from edge_asr.doctor.report import Status
from edge_asr.recognizer.bundle import FP32, INT8, Bundle, read_bundle
from edge_asr.recognizer.manifest import AUTO, TENSORRT
from edge_asr.tree import Tree


class CannotTellError(Exception):
    """A check has nothing to look at, because another one has failed; its text says which."""


@dataclass(frozen=True)
class Patient:
    """The machine and its configuration; checks only look, and change nothing."""

    tree: Tree
    config: Config | None
    """None where it is wrong."""
    problems: str
    """What is wrong with the configuration, a line each."""
    answers: Mapping[str, Answer]
    """What each library's probe said."""

    @property
    def settings(self) -> Config:
        """The configuration. Raises CannotTellError where it is wrong."""
        return self.config if self.config is not None else _cannot_tell("configuration")

    @property
    def engine(self) -> EngineConfig:
        """Its section `engine`, or that section's defaults where the configuration is wrong."""
        return EngineConfig() if self.config is None else self.config.engine

    @cached_property
    def bundle(self) -> Bundle:
        """The configured bundle. Raises BundleError, CannotTellError."""
        return read_bundle(self.settings.model)

    @property
    def needs_tensorrt(self) -> Status:
        """How bad it is when TensorRT cannot run here: auto wants it where there is a GPU, and can do without."""
        if self.engine.target == TENSORRT:
            return "fail" if self.engine.strict else "warn"
        return "warn" if self.engine.target == AUTO and self.tree.has_gpu else "ok"

    @property
    def needs_cuda(self) -> Status:
        """How bad it is when the GPU cannot be used at all."""
        return "warn" if self.needs_tensorrt == "ok" and self.engine.cuda.enabled else self.needs_tensorrt

    def answer(self, subject: str) -> Answer:
        """Return what a library's probe said."""
        return self.answers.get(subject, Answer(error="nobody asked it"))

    def weights_bytes(self, engine: str) -> int:
        """Return the size of the weights in the precision of `engine`, estimated where that is not published."""
        files = {kind: path.stat().st_size for kind, path in self.bundle.files.items()}
        if engine in files:
            return files[engine]
        whole = next((size for kind, size in files.items() if kind != INT8), None)
        if engine == FP32:
            return whole if whole is not None else files[INT8] * 4
        return files[INT8] if whole is None else whole // 4


def _cannot_tell(name: str) -> NoReturn:
    raise CannotTellError(name)
