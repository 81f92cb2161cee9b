"""Our calls of TensorRT against what its releases have; and our fakes of it against the real bindings."""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorrt_api
from bundled import PACKAGE, REPOSITORY
from tensorrt_api import ALL, BINDINGS, FACTS, REAL, facts, has, number, real, reduced, takes
from tensorrt_calls import MODULE, Use, Walk, parameters
from tensorrt_fakes import fake_tensorrt

OURS = sorted(
    path for path in PACKAGE.rglob("*.py") if re.search(r"^\s*import tensorrt\b", path.read_text("utf-8"), re.M)
)
LIBCUDART = BINDINGS / "cudart" / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12"


@functools.cache
def returns() -> dict[tuple[str, str], str]:
    """Return the classes that calls answer with, by class and member."""
    found = {}
    for release in REAL:
        for kind, members in real(release).items():
            for name, signatures in members.items():
                if isinstance(signatures, list) and signatures:
                    answer = signatures[0].rpartition("-> ")[2].removeprefix("tensorrt_bindings.tensorrt.")
                    found[kind, name] = {"nvonnxparser::IParserError": "ParserError"}.get(answer, answer)
    return found


@functools.cache
def distinctive() -> frozenset[str]:
    """Return the names of members that nothing else is called."""
    names = {name for kind, members in real("11.4").items() if kind for name in members}
    names |= {name for members in facts().values() for name in members}
    return frozenset(name for name in names if "_" in name.strip("_") and not name.startswith("_"))


def walk(source: str) -> Walk:
    return Walk(source, frozenset(ALL), has, returns(), distinctive()).run()


def complaints(source: str) -> Iterator[str]:
    """Yield what a source does that a release it may run on does not know."""
    walked = walk(source)
    yield from walked.unknown
    for use in walked.uses:
        lacking = sorted(use.releases - has(use.kind, use.name), key=number)
        if lacking:
            yield f"line {use.line}: {use.kind}.{use.name} is not in {', '.join(lacking)}"
        for release, stands_for in REAL.items():
            if stands_for in use.releases and not lacking and (why := differs(use, real(release))):
                yield f"line {use.line}: {use.kind}.{use.name} of {release}: {why}"


def differs(use: Use, bindings: dict[str, dict[str, Any]]) -> str | None:
    """Return in what a use is not what real bindings want."""
    if use.name == "__version__":
        return None
    member = bindings[use.kind].get(use.name)
    if member is None:
        return "no such member"
    if use.is_set and member != "get and set":
        return f"cannot be set, it is {member}"
    signatures = bindings[use.name]["__init__"] if member == "class" else member
    if use.overrides is not None:
        names = [one.partition(":")[0] for one in parameters(signatures[0])]
        return None if [*use.overrides] == names else f"its parameters are {names}, not {[*use.overrides]}"
    if use.arguments is None:
        return None
    if not isinstance(signatures, list):
        return "it is not called"
    # A base's __init__ is called with self.
    arguments = use.arguments - (use.name == "__init__")
    return None if takes(signatures, arguments, use.keywords) else f"{signatures} do not take {use}"


def test_there_are_sources_to_be_walked() -> None:
    names = {path.name for path in OURS}
    assert {"tensorrt_build.py", "tensorrt_plan.py"} <= names
    found = [use for path in OURS for use in walk(path.read_text("utf-8")).uses]
    assert len({(use.kind, use.name) for use in found}) > 40
    assert len([use for use in found if use.releases != frozenset(ALL)]) >= 5


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_call_of_ours_exists_in_every_release_that_gets_there(path: Path) -> None:
    assert list(complaints(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("config.set_flagg(1)", r"IBuilderConfig.set_flagg is not in 8.5, .*11.1"),
        ("config.set_flag(trt.BuilderFlag.FP16)", r"BuilderFlag.FP16 is not in 11.0, 11.1"),
        ("if hasattr(trt.BuilderFlag, 'FP17'):\n    pass\nelse:\n    trt.BuilderFlag.FP16", "FP16 is not in 11.0"),
        ("engine.create_execution_context_without_device_memory()", r"is not in 11.0, 11.1"),
        ("config.builder_optimization_level = 3", r"is not in 8.5"),
        ("if not hasattr(trt.ILayer, 'precision'):\n    layer.precision = 1", "ILayer.precision is not in 11.0"),
        ("def f(trt):\n    return hasattr(trt.ILayer, 'precision')\nif f(trt):\n    config.progress_monitor",
         "is not in 8.5, 8.6"),
        ("def _f(trt):\n    trt.IProgressMonitor\n_f(trt)", r"IProgressMonitor is not in 8.5, 8.6"),
        ("context.set_tensor_address('x')", "do not take"),
        ("context.set_tensor_address('x', 1, 2)", "do not take"),
        ("context.set_input_shape(tensor='x', shape=(1,))", "do not take"),
        ("self._engine.num_io_tensors = 3", "cannot be set"),
        ("trt.Builder()", "do not take"),
        ("trt.Biulder(logger)", "Biulder is not in"),
        ("trt.Builder(log).create_network().num_layer", "INetworkDefinition.num_layer is not in"),
        ("memory = trt.Builder(log).build_serialized_network(1, 2)\nmemory.size", "IHostMemory.size is not in"),
        ("class L(trt.ILogger):\n    def log(self, severity, message): pass", "its parameters are"),
        ("trt.ILogger.Severity.FATAL", "Severity.FATAL is not in"),
        ("self._contexts[1].execute_async_v4(1)", "execute_async_v4 is not in"),
        ("anything.execute_async_v3(1)", "whose member is it?"),
        ("trt.BuilderFlag.TF32()", "it is not called"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found(source: str, complaint: str) -> None:
    assert re.search(complaint, "\n".join(complaints(source)))


@pytest.mark.parametrize(
    "source",
    [
        "if hasattr(trt.BuilderFlag, 'FP16'):\n    config.set_flag(trt.BuilderFlag.FP16)",
        "x = trt.BuilderFlag.FP16 if hasattr(trt.BuilderFlag, 'FP16') else None",
        "hasattr(trt.ILayer, 'precision') and layer.precision_is_set",
        "def f():\n    if hasattr(engine, 'device_memory_size_v2'):\n        return engine.device_memory_size_v2\n"
        "    return engine.device_memory_size",
        "def _f(trt):\n    trt.IProgressMonitor\nif hasattr(config, 'progress_monitor'):\n    _f(trt)",
        "def f(context: Mine):\n    context.whatever()",
        "try:\n    pass\nexcept OSError as error:\n    error.strerror",
        "class L(trt.ILogger):\n    def log(self, severity, msg): pass\n    def quote(self): pass",
    ],
)
def test_what_exists_or_is_asked_for_first_passes(source: str) -> None:
    assert list(complaints(source)) == []


def test_what_is_stored_of_the_facts_agrees_with_them() -> None:
    if not FACTS.is_file():
        pytest.skip("the facts are not at hand")
    listed = facts()
    for kind, members in reduced().items():
        if kind in listed:
            assert members == {name: listed[kind][name] for name in members}


@pytest.mark.parametrize("release", sorted(REAL))
def test_enumerations_of_the_fake_are_the_real_ones(release: str) -> None:
    bindings = real(release)
    with fake_tensorrt(release):
        fake = importlib.import_module("tensorrt")
        for kind in tensorrt_api.REDUCED["values"]["8.5"]:
            ours = fake.ILogger.Severity if kind == "Severity" else getattr(fake, kind)
            named = {name: value for name, value in bindings[kind].items() if isinstance(value, int)}
            named.pop("WEIGHTLESS", None)  # another name of STRIP_PLAN
            assert {member.name: member.value for member in ours} == named, kind


@pytest.mark.parametrize("release", sorted(REAL))
def test_the_fake_has_nothing_that_the_real_bindings_lack_or_take_differently(release: str) -> None:
    bindings = real(release)
    with fake_tensorrt(release):
        fake = importlib.import_module("tensorrt")
        names = [name for name in vars(fake) if not name.startswith("_")]
        assert {"Builder", "Runtime", "ICudaEngine"} <= set(names) <= set(bindings[MODULE])
        wrong = [line for name in names for line in differences(getattr(fake, name), bindings.get(name, {}))]
    assert wrong == []


def differences(kind: Any, members: dict[str, Any]) -> Iterator[str]:
    """Yield in what a class of the fake is not the real one."""
    for name, member in vars(kind).items() if inspect.isclass(kind) else ():
        theirs = members.get(name)
        if name.startswith("_") and name != "__init__":
            continue
        if theirs is None:
            yield f"{kind.__name__}.{name}: not in the real bindings"
        elif isinstance(member, property) and theirs not in ("get and set", *(("get",) if member.fset is None else ())):
            yield f"{kind.__name__}.{name}: is a property here, {theirs} there"
        elif inspect.isfunction(member) and not same_parameters(member, theirs):
            yield f"{kind.__name__}.{name}{inspect.signature(member)}: {theirs}"


def same_parameters(function: Any, signatures: list[str]) -> bool:
    """Tell whether a method takes what one of some signatures does; what nobody can make has none."""
    ours = [name for name in inspect.signature(function).parameters if name != "self"]
    theirs = [[one.partition(":")[0] for one in parameters(signature)] for signature in signatures]
    return ours in theirs or (function.__name__ == "__init__" and not theirs)


def test_every_function_of_cudart_that_we_use_is_there() -> None:
    if not LIBCUDART.is_file():
        pytest.skip(f"no libcudart in {BINDINGS.name}: scripts/bindings")
    library = ctypes.CDLL(str(LIBCUDART))
    used = {name for path in PACKAGE.rglob("*.py") for name in re.findall(r"\.(cuda[A-Z]\w+)", path.read_text("utf-8"))}
    assert "cudaGraphLaunch" in used
    assert [name for name in sorted(used) if not hasattr(library, name)] == []
    with fake_tensorrt("10.3"):
        fake = importlib.import_module("fake_gpu.cudart").FakeCudart()
        assert [name for name in sorted(used) if not hasattr(fake, name)] == []
        assert [name for name in vars(fake) if not name.startswith("_") and not hasattr(library, name)] == []


@pytest.mark.parametrize(
    ("pip", "code", "said"),
    [
        ("echo 'warning' >&2; echo 'ERROR: no network' >&2; exit 1", 1, "bindings: not here: 11.4 (ERROR: no network)"),
        ("exit 0", 0, ""),
    ],
)
def test_the_script_names_what_it_cannot_get_and_does_nothing_twice(
    tmp_path: Path, pip: str, code: int, said: str
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (Debian: apt install gcc libc6-dev)")
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts" / "bindings", tmp_path / "scripts" / "bindings")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nif [[ "$*" == *pip* ]]; then\n    echo "$*" >>"{tmp_path}/calls"\n    {pip}\nfi\n')
    python.chmod(0o755)
    for _ in range(2):
        result = subprocess.run([tmp_path / "scripts" / "bindings"], capture_output=True, text=True, timeout=60)
        assert result.returncode == code
        assert result.stderr.startswith(said)
        assert len(result.stderr.splitlines()) == code, "one line, or none"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all("--require-hashes" in call for call in calls)
    assert len(calls) == (6 if code else 3), "what is not there is tried again"
    assert (tmp_path / ".bindings" / "11.4" / "stubs" / "libnvinfer.so.11").is_file() == (code == 0)
