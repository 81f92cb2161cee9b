"""All checks in their order, each on its own: one that fails, or breaks, does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from edge_asr.config import Config
from edge_asr.doctor import libraries, machine, service
from edge_asr.doctor.children import Answer, ask
from edge_asr.doctor.patient import CannotTellError, Patient
from edge_asr.doctor.probe import PROBES
from edge_asr.doctor.report import Finding, Report, Result, fail, warn
from edge_asr.errors import BundleError, ConfigError, EdgeAsrError
from edge_asr.tree import Tree

CONFIGURATION, MODEL, MACHINE = 2, 3, 1
"""Exit codes: what is to blame where a check fails."""
PROBES_AT_ONCE = 3
"""Most of a probe's time is spent on reading from the disk."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question, and what the program ends with where the answer is bad."""

    name: str
    look: Callable[[Patient], Finding]
    exit_code: int = MACHINE


CHECKS = (
    Check("configuration", service.configuration, CONFIGURATION),
    Check("python", service.python),
    Check("state_dir", service.state_dir),
    Check("disk", service.disk),
    Check("memory", machine.memory),
    Check("bundle", service.bundle, MODEL),
    Check("engine", service.engine, MODEL),
    Check("tensorrt_engine", service.tensorrt_engine, MODEL),
    Check("onnxruntime_packages", libraries.onnxruntime_packages, MODEL),
    Check("onnxruntime", libraries.onnxruntime, MODEL),
    Check("onnxruntime_cuda", libraries.onnxruntime_cuda, MODEL),
    Check("l4t", machine.release, MODEL),
    Check("device_nodes", machine.device_nodes, MODEL),
    Check("cuda_driver", libraries.cuda_driver, MODEL),
    Check("cuda_runtime", libraries.cuda_runtime, MODEL),
    Check("tensorrt", libraries.tensorrt, MODEL),
    Check("pycuda", libraries.pycuda, MODEL),
    Check("power_mode", machine.power_mode),
    Check("gpu_clock", machine.gpu_clock),
    Check("cpu_clock", machine.cpu_clock),
    Check("temperatures", machine.temperatures),
    Check("sound_nodes", machine.sound_nodes),
    Check("microphone", libraries.microphone),
    Check("broker", service.broker),
    Check("wall_clock", machine.wall_clock),
)


def examine(
    read: Callable[[], Config],
    tree: Tree | None = None,
    probe: Callable[[str], Answer] = ask,
    checks: Sequence[Check] = CHECKS,
) -> Report:
    """Run all checks. `read` returns the configuration or raises ConfigError; `probe` asks one library."""
    config, problems = None, ""
    try:
        config = read()
    except ConfigError as error:
        problems = str(error)
    patient = Patient(tree or Tree(), config, problems, _ask_all(config, probe))
    return Report([Result(check.name, _look(check, patient), check.exit_code) for check in checks])


def _ask_all(config: Config | None, probe: Callable[[str], Answer]) -> dict[str, Answer]:
    """Ask all libraries, some at a time, before any check looks at the memory that is free."""
    subjects = [name for name in PROBES if name != "onnxruntime-cuda" or (config and config.engine.cuda.enabled)]
    with ThreadPoolExecutor(PROBES_AT_ONCE, thread_name_prefix="doctor") as pool:
        return dict(zip(subjects, pool.map(probe, subjects), strict=True))


def _look(check: Check, patient: Patient) -> Finding:
    try:
        return check.look(patient)
    except CannotTellError as error:
        return warn(f"not looked at: {error} comes first", f"see {error}")
    except BundleError:
        return warn("not looked at: bundle comes first", "see bundle")
    except EdgeAsrError as error:
        return fail(*service.split(error))
    except Exception as error:  # noqa: BLE001 - on a broken machine anything may happen, and the others must be told
        return fail(f"the check itself broke: {type(error).__name__}: {error}", "report it, with this line")
