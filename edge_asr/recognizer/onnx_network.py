"""Networks on onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.network import Arrays

if TYPE_CHECKING:
    import onnxruntime


class OnnxNetwork:
    """A graph on onnxruntime's CPU provider; see Network."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Load `path`; `threads` of one inference, 0: one for each physical core. Raises BundleError."""
        self._path = path
        self._session = _load(path, threads)
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The graph's custom metadata."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Arrays) -> Arrays:
        """Compute. Raises EngineError where onnxruntime fails."""
        try:
            return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise EngineError(f"{self._path}: onnxruntime failed: {_first_line(error)}") from error

    def close(self) -> None:
        """Release the session."""
        del self._session


def runtime_version() -> str:
    """Return onnxruntime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)


def _load(path: Path, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed: pip install 'edge-asr[cpu]', or 'edge-asr[gpu]' with a GPU"
        ) from error
    if not path.is_file():
        raise BundleError(f"{path}: no such file; copy the bundle again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and said by us
    # Threads that wait for each other within an inference spin, which is a fifth faster than sleeping; between two
    # sentences that would cost an idle appliance a core.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        # Without its fallback, which would say on standard output that it tries again what cannot work.
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise BundleError(
            f"{path}: onnxruntime cannot load it, the file is damaged or no ONNX graph; copy the bundle again"
            f" ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
