"""Plans of TensorRT: what the builder of each release is told, and engines that are proven before they are in place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundled import BUNDLE, bundle_of, engine_of, recording, sound_of, transcripts
from mosquitto import wait_for
from random_engine import weights_from
from tensorrt_fakes import FOLDER, RELEASES, fake_tensorrt

from edge_asr import memory
from edge_asr.cli import main
from edge_asr.config import TensorRtConfig
from edge_asr.engine import plans
from edge_asr.engine.build import build_engine
from edge_asr.engine.graph import Graph, encoder_graph
from edge_asr.engine.plan_process import build_plan_apart
from edge_asr.engine.precision import half, opset13
from edge_asr.engine.profiles import decoder_profiles, encoder_profiles
from edge_asr.engine.tensorrt_build import CACHE, Phases, PlanOptions, build_plan
from edge_asr.errors import EngineError
from edge_asr.loader import engine_folder
from edge_asr.recognizer.bundle import FP32, INT8, read_bundle
from edge_asr.recognizer.manifest import (
    FILE,
    ONNX,
    TENSORRT,
    Manifest,
    check_files,
    existing,
    read_manifest,
    resolved,
    unfit,
    write_manifest,
)
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.tensorrt_network import TensorRtOptions, load_networks

WEAK = ("8.5",)
GB = 1 << 30


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder in FP16, in opset 17 and in opset 13."""
    folder = tmp_path_factory.mktemp("halves")
    graph = half(encoder_graph(weights_from("tiny"), {}))
    return {"17": graph.write(folder, "encoder")[0], "13": opset13(graph).write(folder, "old")[0]}


def graph_of(release: str, halves: dict[str, Path]) -> Path:
    return halves["13" if release in WEAK else "17"]


def options_in(folder: Path, workspace_mb: int | None = None) -> PlanOptions:
    return PlanOptions(0, folder / CACHE, workspace_mb)


def built_plan(path: Path) -> Any:
    """Return what is in a plan of the fake."""
    from tensorrt._plan import deserialize

    return deserialize(path.read_bytes())


def ignore(share: float) -> None:
    """Take no notice of progress."""


# Profiles


def test_profiles_cover_a_command_and_half_a_minute_without_a_gap() -> None:
    single = [profile["x"] for profile in encoder_profiles() if profile["x"][2][0] == 1]
    reached = 0
    for smallest, usual, largest in single:
        assert smallest[1] <= reached + 1
        assert smallest[1] <= usual[1] <= largest[1]
        reached = largest[1]
    assert single[0][0] == (1, 1, 560)
    assert reached == 512
    assert encoder_profiles()[-1]["x"] == ((1, 1, 560), (8, 128, 560), (32, 192, 560))


def test_both_networks_have_the_same_profiles_in_the_same_order() -> None:
    for encoder, decoder in zip(encoder_profiles(), decoder_profiles(512), strict=True):
        for x, mask, enc, enc_mask, cif, emb_mask in zip(
            *(encoder[name] for name in ("x", "mask")),
            *(decoder[name] for name in ("enc", "enc_mask", "cif", "emb_mask")),
            strict=True,
        ):
            assert x == (*mask, 560)
            assert enc == (*enc_mask, 512)
            assert enc_mask == mask
            assert cif == (*emb_mask, mask[1])
        utterances, frames, _ = encoder["x"][2]
        most = frames if utterances == 1 else 96  # a token a frame at most; in batches eight a second
        assert [shape[1] for shape in decoder["cif"]] == [1, 32, most]


# The builder


@pytest.mark.parametrize("release", RELEASES)
def test_types_are_the_graphs_own_in_every_release(release: str, halves: dict[str, Path], tmp_path: Path) -> None:
    with fake_tensorrt(release):
        build_plan(graph_of(release, halves), encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
        plan = built_plan(tmp_path / "plan")
    assert plan.release == release
    assert plan.strongly_typed == (release not in WEAK)
    assert plan.flags == (["FP16", "OBEY_PRECISION_CONSTRAINTS"] if release in WEAK else []), "and no TF32"
    if release not in WEAK:
        assert plan.fp32_layers == []
        return
    graph = onnx.load_model_from_string(plan.graph).graph
    kinds = {node.name: node.op_type for node in graph.node}
    pinned = {kinds[name] for name in plan.fp32_layers if name in kinds}
    assert {"ReduceMean", "Sqrt", "Div", "Softmax", "Sigmoid"} <= pinned
    assert {node.name for node in graph.node if node.op_type == "MatMul"} - set(plan.fp32_layers)
    unpinned = [node for node in graph.node if node.name not in plan.fp32_layers]
    types = {value.name: value.type.tensor_type.elem_type for value in inferred(plan.graph).value_info}
    assert {types[node.output[0]] for node in unpinned if node.output[0] in types} == {onnx.TensorProto.FLOAT16}


def inferred(graph: bytes) -> onnx.GraphProto:
    found: onnx.GraphProto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph)).graph
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_profiles_and_workspace_reach_the_builder(release: str, halves: dict[str, Path], tmp_path: Path) -> None:
    with fake_tensorrt(release) as gpu:
        build_plan(graph_of(release, halves), encoder_profiles(), tmp_path / "plan", options_in(tmp_path, 96), ignore)
        plan = built_plan(tmp_path / "plan")
        assert gpu.live["execution contexts"] == 0
    wanted = [{name: [list(shape) for shape in shapes] for name, shapes in one.items()} for one in encoder_profiles()]
    assert plan.profiles == wanted
    assert plan.workspace == 96 << 20


@pytest.mark.parametrize(
    ("integrated", "limit"), [(0, 1 * GB), (1, 2 * GB)], ids=["a GPU with its own memory", "a Jetson"]
)
def test_the_workspace_is_a_quarter_of_what_is_free(
    halves: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integrated: int, limit: int
) -> None:
    meminfo(monkeypatch, tmp_path, 8 * GB)
    with fake_tensorrt(memory=f"{4 * GB},{8 * GB}", integrated=integrated):
        build_plan(halves["17"], encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
        assert built_plan(tmp_path / "plan").workspace == limit


def meminfo(patch: pytest.MonkeyPatch, folder: Path, available: int) -> None:
    """Let programs believe that so many bytes are free."""
    path = folder / "meminfo"
    path.write_text(f"MemTotal: 9 kB\nMemAvailable:   {available >> 10} kB\n")
    patch.setattr(memory, "MEMINFO", path)


@pytest.mark.parametrize("release", RELEASES)
def test_no_library_beside_tensorrt_is_asked_for_kernels(release: str, halves: dict[str, Path], tmp_path: Path) -> None:
    with fake_tensorrt(release):
        import tensorrt

        build_plan(graph_of(release, halves), encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
        chosen = built_plan(tmp_path / "plan").tactic_sources
        names = {source.name for source in tensorrt.TacticSource if chosen >> int(source) & 1}
    assert names == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}


@pytest.mark.parametrize("release", [release for release in RELEASES if release != "11.4"])  # which has no others
def test_all_libraries_are_asked_where_tensorrt_has_no_kernel_of_its_own(
    release: str, halves: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_tensorrt(release, bare=1):
        import tensorrt

        build_plan(graph_of(release, halves), encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
        assert built_plan(tmp_path / "plan").tactic_sources == (1 << len(tensorrt.TacticSource.__members__)) - 1
    [line] = caplog.messages
    assert "has no kernel of its own for" in line


@pytest.mark.parametrize("release", RELEASES)
def test_lengths_that_change_are_quick_from_the_first_release_on(
    release: str, halves: dict[str, Path], tmp_path: Path
) -> None:
    with fake_tensorrt(release):
        build_plan(graph_of(release, halves), encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
        previews = built_plan(tmp_path / "plan").previews
    assert previews == (["FASTER_DYNAMIC_SHAPES_0805"] if release == "8.5" else [])


def test_what_the_parser_refuses_is_said_in_a_line_with_the_node(
    tmp_path: Path, halves: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    graph = onnx.load(str(halves["17"]), load_external_data=False).graph
    norms = [node.name for node in graph.node if node.op_type == "LayerNormalization"]
    with fake_tensorrt("8.5"), pytest.raises(EngineError) as caught:
        build_plan(halves["17"], encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
    complaints = [f"LayerNormalization {name}: No importer registered for op: LayerNormalization" for name in norms]
    name = halves["17"].name
    assert str(caught.value).startswith(f"TensorRT cannot read {name}: {complaints[0]}; ")
    assert caplog.messages == [f"{name}: {complaint}" for complaint in complaints[1:]]
    assert not (tmp_path / "plan").exists()


def test_a_builder_that_gives_nothing_is_quoted(tmp_path: Path, halves: dict[str, Path]) -> None:
    with fake_tensorrt(memory=f"1000000,{GB}"), pytest.raises(EngineError) as caught:
        build_plan(halves["17"], encoder_profiles(), tmp_path / "plan", options_in(tmp_path), ignore)
    assert re.fullmatch(
        r"TensorRT 10\.3\.0 cannot build encoder-\w+\.onnx: .*insufficient memory.*; free memory, [^\n]*",
        str(caught.value),
    )
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_is_none_is_refused(tmp_path: Path, halves: dict[str, Path]) -> None:
    with fake_tensorrt(), pytest.raises(EngineError, match=r"^TensorRT 10\.3\.0 refuses the profile \{\}"):
        build_plan(halves["17"], [{}], tmp_path / "plan", options_in(tmp_path), ignore)


@pytest.mark.parametrize("release", RELEASES)
def test_progress_rises_to_the_end(release: str, halves: dict[str, Path], tmp_path: Path) -> None:
    seen: list[float] = []
    with fake_tensorrt(release):
        build_plan(graph_of(release, halves), encoder_profiles(), tmp_path / "plan", options_in(tmp_path), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) <= len(set(seen)) + 1, "nothing is told twice, but for the end"
    assert (len(seen) > 5) == (release not in WEAK), "8.5 has no monitor"


def test_phases_within_phases_share_the_room_of_a_step() -> None:
    phases = Phases()
    phases.start("all", None, 2)
    phases.start("first", "all", 4)
    assert [phases.step("first") for _ in range(4)] == [0.125, 0.25, 0.375, 0.5]
    phases.finish("first")
    assert phases.step("all") == 0.5
    phases.start("second", "all", 1)
    assert phases.step("second") == 1
    assert phases.step("second") == 1, "a step too many"
    assert phases.step("never started") == 1


# The timing cache


def entries(cache: Path) -> int:
    """Return how many kernels the fake's cache has timed."""
    return len(json.loads(cache.read_bytes()[32 + 36 :])[2])


def test_the_timing_cache_is_kept_and_used_again(halves: dict[str, Path], tmp_path: Path) -> None:
    options = options_in(tmp_path)
    with fake_tensorrt():
        for number, opset in enumerate(("17", "13"), start=1):
            build_plan(halves[opset], encoder_profiles(), tmp_path / "plan", options, ignore)
            assert entries(options.cache) == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", CACHE]


@pytest.mark.parametrize("other", ["release", "sm", "name", "a flipped bit", "cut", "empty", "text"])
def test_a_timing_cache_that_is_foreign_or_damaged_is_begun_anew(
    halves: dict[str, Path], tmp_path: Path, other: str
) -> None:
    options = options_in(tmp_path)
    with fake_tensorrt():
        build_plan(halves["17"], encoder_profiles(), tmp_path / "plan", options, ignore)
    content = bytearray(options.cache.read_bytes())
    if other == "a flipped bit":
        content[-9] ^= 1
    options.cache.write_bytes({"cut": bytes(content[:50]), "empty": b"", "text": b"timing"}.get(other, bytes(content)))
    here: dict[str, Any] = {
        "release": {"release": "10.13"}, "sm": {"sm": "7.2"}, "name": {"name": "Another Orin"}
    }.get(other, {})  # fmt: skip
    with fake_tensorrt(**here):
        build_plan(halves["13"], encoder_profiles(), tmp_path / "plan", options, ignore)
    assert entries(options.cache) == 1


# The process


def apart(halves: dict[str, Path], folder: Path, shares: list[float] | None = None) -> None:
    report = ignore if shares is None else shares.append
    build_plan_apart(halves["17"], encoder_profiles(), folder / "plan", options_in(folder), report)


def test_a_plan_built_apart_is_the_same(halves: dict[str, Path], tmp_path: Path) -> None:
    shares: list[float] = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with fake_tensorrt(integrated=0):  # what the host has free would not be the same twice
        build_plan(halves["17"], encoder_profiles(), tmp_path / "here" / "plan", options_in(tmp_path / "here"), ignore)
        apart(halves, tmp_path / "there", shares)
    assert (tmp_path / "there" / "plan").read_bytes() == (tmp_path / "here" / "plan").read_bytes()
    assert shares[-1] == 1
    assert len(shares) > 5


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "kill -KILL $$",
            r"was killed by SIGKILL \(out of memory\?\) on encoder-\w+\.onnx; free memory, .*",
        ),
        ("kill -SEGV $$", r"was killed by SIGSEGV on encoder-\w+\.onnx; .*"),
        ("kill -40 $$", r"was killed by signal 40 on .*"),
        ("echo first >&2; echo last words >&2; exit 7", r"ended with 7 on encoder-\w+\.onnx: last words; .*"),
        ("echo noise of a library; exit 1", r"ended with 1 on .*"),
    ],
)
def test_a_builder_that_crashes_is_one_line(
    halves: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    crashing(tmp_path, monkeypatch, script)
    with pytest.raises(EngineError) as caught:
        apart(halves, tmp_path)
    assert re.fullmatch(f"TensorRT's builder {said}", str(caught.value))


def crashing(folder: Path, patch: pytest.MonkeyPatch, script: str) -> None:
    """Put a line of shell in the place of Python, which builds plans."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    patch.setattr(sys, "executable", str(path))


def test_the_builder_is_the_first_to_be_killed_where_memory_runs_out() -> None:
    code = (
        "from edge_asr.engine import plan_process as p;"
        "p.build_plan = lambda *_: p._tell('share', p.OOM_SCORE.read_text().strip()); p.serve()"
    )
    request = {"model": "m", "profiles": [], "out": "o", "options": {"gpu": 0, "cache": "c", "workspace_mb": None}}
    child = [sys.executable, "-c", code, json.dumps(request)]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert json.loads(started.stdout.readline().strip("\x1e\n")) == ["share", "1000"]


def test_what_the_builder_says_of_its_failure_comes_through(halves: dict[str, Path], tmp_path: Path) -> None:
    with fake_tensorrt(memory=f"1000000,{GB}"), pytest.raises(EngineError, match="insufficient memory"):
        apart(halves, tmp_path)


def test_a_plan_that_cannot_be_written_is_said_in_a_line(halves: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "plan"
    with fake_tensorrt(), pytest.raises(EngineError) as caught:
        build_plan_apart(halves["17"], encoder_profiles(), out, options_in(tmp_path), ignore)
    assert re.match(rf"{out.parent}: a plan cannot be written there \(\[Errno 2\] [^\n]*--out$", str(caught.value))


def test_a_builder_ends_with_who_started_it(halves: dict[str, Path], tmp_path: Path) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import os, pathlib, threading\n"
        f"pathlib.Path({str(tmp_path / 'draft')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'draft')!r}, {str(tmp_path / 'pid')!r})\n"
        f"threading.Event().wait()\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{sys.path!r}]; from pathlib import Path;"
        "from edge_asr.engine.plan_process import build_plan_apart;"
        "from edge_asr.engine.tensorrt_build import PlanOptions;"
        f"build_plan_apart(Path({str(halves['17'])!r}), [], Path('plan'), PlanOptions(0, Path('cache')), print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for((tmp_path / "pid").exists, "the builder")
    parent.kill()
    parent.wait()
    builder = Path("/proc") / (tmp_path / "pid").read_text() / "status"
    wait_for(lambda: not builder.exists() or "zombie" in builder.read_text(), "the end of the builder")


# The engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's engine for the fake of 10.3; not to be changed."""
    out = tmp_path_factory.mktemp("engine")
    with fake_tensorrt():
        build_engine(read_bundle(BUNDLE), TENSORRT, out, threads=1)
    return out


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(engine, tmp_path / "engine")
    return tmp_path / "engine"


@pytest.fixture(autouse=True)
def no_jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever machine the tests run on, it says nothing of L4T."""
    monkeypatch.setattr("edge_asr.recognizer.tensorrt_network.LEGACY_TEGRA", tmp_path / "nowhere")


def manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a folder that holds one engine, undamaged, and nothing else."""
    manifest = read_manifest(folder)
    assert manifest is not None
    check_files(folder, manifest)
    beside = [CACHE] if manifest.engine == TENSORRT else []
    assert sorted(path.name for path in folder.iterdir()) == sorted([FILE, *beside, *manifest.files])
    return manifest


def text_of(folder: Path, name: str = "01.wav") -> str:
    """Load an engine, under the fake, and return what it hears in a bundled recording."""
    manifest = read_manifest(folder)
    assert manifest is not None
    paths = folder / manifest.encoder, folder / manifest.decoder
    encoder, decoder = (
        [OnnxNetwork(path, threads=1) for path in paths]
        if manifest.plan is None
        else load_networks(*paths, manifest.metadata, TensorRtOptions())
    )
    recognizer = Paraformer(read_bundle(BUNDLE), encoder, decoder, manifest.engine)
    try:
        return recognizer.recognize(sound_of(name)).text
    finally:
        recognizer.close()


def test_the_manifest_tells_the_truth(engine: Path) -> None:
    manifest = manifest_of(engine)
    assert (manifest.engine, manifest.asked, manifest.why) == (TENSORRT, TENSORRT, f"{TENSORRT} was asked for")
    assert (manifest.source.name, manifest.model) == ("model.onnx", "paraformer-tiny")
    assert manifest.compared_tokens > 20
    plan = manifest.plan
    assert plan is not None
    assert (plan.tensorrt, plan.gpu, plan.sm, plan.l4t) == ("10.3.0", "Fake Orin (nvgpu)", "8.7", None)
    assert (plan.multiprocessors, plan.memory_gb) == (8, 8)
    assert (plan.typing, plan.softmax_fp16, plan.accumulation) == ("strong", False, "fp16")
    assert plan.scale & (plan.scale - 1) == 0
    assert {name: len(profiles) for name, profiles in plan.profiles.items()} == {"encoder": 4, "decoder": 4}
    assert plan.profiles["encoder"][0]["x"] == [[1, 1, 560], [1, 34, 560], [1, 64, 560]]
    assert {"input_scale", "tail", "vocabulary", "batches"} <= set(manifest.metadata)
    assert manifest.metadata["batches"] == "true"


def test_the_self_test_is_the_bundles_own_recording_and_what_fp32_hears_in_it(engine: Path) -> None:
    expected = manifest_of(engine).self_test
    assert expected is not None
    with wave.open(str(engine / expected.sound)) as ours, wave.open(str(recording("01.wav"))) as original:
        assert ours.getparams() == original.getparams()
        assert ours.readframes(-1) == original.readframes(-1)
    tokens = read_bundle(BUNDLE).tokens
    assert "".join(tokens[i] for i in expected.ids).replace("</s>", "").startswith(transcripts()["01.wav"][:1])
    assert abs(expected.alpha_sum - len(expected.ids)) <= 1


@pytest.mark.parametrize(
    "release", [pytest.param(release, marks=[] if release in WEAK else pytest.mark.slow) for release in RELEASES]
)
def test_an_engine_of_each_release_hears_what_was_said(release: str, tmp_path: Path) -> None:
    with fake_tensorrt(release):
        manifest = build_engine(read_bundle(BUNDLE), TENSORRT, tmp_path, threads=1)
        assert unfit(manifest, read_bundle(BUNDLE), TENSORRT) is None
        assert text_of(tmp_path) == transcripts()["01.wav"]
        graph = onnx.load_model_from_string(built_plan(tmp_path / manifest.encoder).graph)
    assert manifest_of(tmp_path) == manifest
    assert manifest.plan is not None
    assert manifest.plan.typing == ("weak" if release in WEAK else "strong")
    assert graph.opset_import[0].version == (13 if release in WEAK else 17)


@pytest.mark.slow
def test_a_bundle_in_8_bits_only_makes_plans_too(tmp_path: Path) -> None:
    with fake_tensorrt():
        manifest = build_engine(bundle_of(INT8), TENSORRT, tmp_path, threads=1)
        assert text_of(tmp_path) == transcripts()["01.wav"]
    assert manifest.source.name == "model_quant.onnx"


@pytest.mark.slow
def test_without_recordings_made_up_sounds_are_the_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "recordings", lambda bundle: [])
    with fake_tensorrt():
        manifest = build_engine(read_bundle(BUNDLE), TENSORRT, tmp_path, threads=1)
    assert manifest.self_test is not None
    with wave.open(str(tmp_path / manifest.self_test.sound)) as sound:
        assert sound.getnframes() == 5 * 16_000
    assert len(manifest.self_test.ids) > 3


@pytest.mark.slow
def test_plans_take_the_place_of_graphs_and_graphs_that_of_plans(copy: Path) -> None:
    bundle = read_bundle(BUNDLE)
    build_engine(bundle, FP32, copy, threads=1)
    manifest = read_manifest(copy)
    assert manifest is not None
    assert manifest.engine == FP32
    assert {path.name for path in copy.iterdir()} == {FILE, CACHE, *manifest.files}, "the timing cache stays"
    with fake_tensorrt():
        build_engine(bundle, TENSORRT, copy, threads=1)
    assert manifest_of(copy).engine == TENSORRT


# Refused


def refused(out: Path, match: str) -> None:
    """Assert that the engine cannot be built in one line, and that nothing of it is left."""
    before = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    with pytest.raises(EngineError) as caught:
        build_engine(read_bundle(BUNDLE), TENSORRT, out, threads=1)
    assert re.fullmatch(match, str(caught.value))
    assert [path.name for path in sorted(out.iterdir()) if path.name != CACHE] == [
        name for name in before if name != CACHE
    ]


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"gpu": "none"}, ".*"), ({"gpu": "nodriver"}, ".*"), ({"release": "broken"}, ".*libnvdla_compiler.*")],
    ids=["no GPU", "no driver", "a library is missing"],
)
def test_without_tensorrt_or_a_gpu_the_reason_and_the_remedy_are_a_line(
    tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    with fake_tensorrt(**settings):
        refused(tmp_path / "engine", rf"{TENSORRT} cannot be built here: {why}; or take --target onnx")
        assert resolved("auto", 0) == ONNX


def test_too_little_memory_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(monkeypatch, tmp_path, 40 << 20)
    monkeypatch.setattr(plans, "read_networks", None)
    with fake_tensorrt():
        refused(
            tmp_path / "engine",
            r"TensorRT needs about 1065 MB of free memory to build paraformer-tiny, here are 40 MB; .*--target onnx",
        )


def test_too_little_memory_of_the_gpu_counts_as_well(tmp_path: Path) -> None:
    with fake_tensorrt(memory=f"{40 << 20},{GB}", integrated=0):
        refused(tmp_path / "engine", r"TensorRT needs about 1065 MB of free memory .*, here are 40 MB; .*")


def test_plans_that_mumble_are_refused_and_the_old_engine_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(graph: Graph, softmax: bool, wide_sums: bool) -> Graph:
        written = half(graph, softmax, wide_sums)
        tensors = {
            name: array[..., ::-1].copy() if "output_layer" in name else array
            for name, array in written.tensors.items()
        }
        return dataclasses.replace(written, tensors=tensors)

    monkeypatch.setattr(plans, "half", deaf)
    with fake_tensorrt():
        refused(
            copy,
            r"TensorRT's plans of paraformer-tiny were refused: [^\n]*failed its self-test \(only \d+ of \d+ tokens are"
            r" the same\); [^\n]*",
        )
        assert text_of(copy) == transcripts()["01.wav"]


def test_plans_that_mumble_are_built_again_with_wide_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def coarse(graph: Graph, softmax: bool, wide_sums: bool) -> Graph:
        written = half(graph, softmax, wide_sums)
        flipped = {name: a[..., ::-1].copy() if "output_layer" in name else a for name, a in written.tensors.items()}
        return written if wide_sums else dataclasses.replace(written, tensors=flipped)

    monkeypatch.setattr(plans, "half", coarse)
    with fake_tensorrt():
        manifest = build_engine(read_bundle(BUNDLE), TENSORRT, tmp_path, threads=1)
        assert text_of(tmp_path) == transcripts()["01.wav"]
    assert manifest.plan is not None
    assert manifest.plan.accumulation == "fp32"
    assert len(list(tmp_path.glob("*.plan"))) == 2
    assert "are built again, with products added up in FP32: " in caplog.text


@pytest.mark.slow
def test_plans_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with fake_tensorrt(nan_at=1):
        refused(tmp_path / "engine", r"TensorRT's plans of paraformer-tiny were refused: [^\n]*finite[^\n]*")


def test_plans_that_cannot_be_loaded_are_not_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fake_tensorrt(oom_at=1):
        refused(tmp_path / "engine", r"TensorRT's plans of paraformer-tiny were refused: [^\n]*out of memory[^\n]*")
    assert "built again" not in caplog.text


def test_a_crash_of_the_builder_leaves_the_old_engine(copy: Path, tmp_path: Path) -> None:
    """In a process of its own, where the crash is in the child only."""
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    code = (
        f"import sys; sys.path[:] = {[str(FOLDER), *sys.path]!r}; sys.executable = {str(crashing)!r};"
        "from edge_asr.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(copy)], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 3
    [line] = [line for line in done.stderr.splitlines() if line.startswith("edge-asr: ")]
    assert re.match(r"edge-asr: TensorRT's builder was killed by SIGSEGV on encoder-fp16-\w+\.onnx; ", line)
    assert manifest_of(copy).engine == TENSORRT


def arguments(out: Path, *more: str) -> Sequence[str]:
    places = ("--model", str(BUNDLE), "--out", str(out))
    return ("build-engine", *places, "--target", TENSORRT, "-o", "engine.threads=1", *more)


# What fits


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tensorrt": "10.7.0"}, "it was built for TensorRT 10.7.0, here is 10.3.0"),
        ({"gpu": "Xavier"}, "it was built for GPU Xavier, here is Fake Orin (nvgpu)"),
        ({"sm": "7.2"}, "it was built for compute capability 7.2, here is 8.7"),
        ({"cuda": "11.4"}, "it was built for CUDA 11, here is 12"),
        ({"l4t": "# R36"}, "it was built for L4T # R36, here is none"),
        ({"softmax_fp16": True}, "it was built with engine.tensorrt.softmax_fp16 on"),
        ({"cuda": "12.0"}, None),
    ],
    ids=str,
)
def test_a_plan_fits_the_machine_that_it_was_built_on(engine: Path, change: dict[str, Any], why: str | None) -> None:
    manifest = manifest_of(engine)
    assert manifest.plan is not None
    other = dataclasses.replace(manifest, plan=dataclasses.replace(manifest.plan, **change))
    with fake_tensorrt():
        assert unfit(other, read_bundle(BUNDLE), TENSORRT) == why


def test_a_plan_does_not_depend_on_onnxruntime_or_the_processor(engine: Path) -> None:
    elsewhere = dataclasses.replace(manifest_of(engine), machine="another", versions={"onnxruntime": "0.1"})
    with fake_tensorrt():
        assert unfit(elsewhere, read_bundle(BUNDLE), TENSORRT) is None


def test_a_plan_fits_no_other_target_and_no_other_bundle(engine: Path) -> None:
    manifest, bundle = manifest_of(engine), read_bundle(BUNDLE)
    with fake_tensorrt():
        assert unfit(manifest, bundle, ONNX) == f"it is {TENSORRT}, {ONNX} is wanted"
        assert unfit(manifest, bundle, FP32) == f"it is {TENSORRT}, {FP32} is wanted"
        other = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, tail=0.9))
        assert unfit(manifest, other, TENSORRT) == f"the configuration in {BUNDLE} has changed since"
        foreign = dataclasses.replace(manifest, source=dataclasses.replace(manifest.source, size=7))
        assert unfit(foreign, bundle, TENSORRT) == f"{BUNDLE / 'model.onnx'} has changed since"


def test_where_there_is_no_tensorrt_a_plan_does_not_fit(engine: Path) -> None:
    with fake_tensorrt(gpu="none"):
        assert unfit(manifest_of(engine), read_bundle(BUNDLE))
    assert unfit(manifest_of(engine), read_bundle(BUNDLE)), "nor where it is not even installed"


def test_an_engine_for_the_processor_asks_nobody_about_a_gpu() -> None:
    code = (
        f"import sys; sys.path[:] = {[str(FOLDER), *sys.path, str(Path(__file__).parent)]!r}; from pathlib import Path;"
        "from edge_asr.recognizer.bundle import read_bundle;"
        "from edge_asr.recognizer.manifest import existing;"
        f"assert existing(read_bundle(Path({str(BUNDLE)!r})), Path({str(engine_of(FP32))!r}), {FP32!r});"
        "assert not {'tensorrt', 'pycuda'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "config", "kept"),
    [
        ({}, {}, True),
        ({"multiprocessors": 4}, {}, False),
        ({"memory": f"{6 * GB},{16 * GB}"}, {}, False),
        ({}, {"workspace_mb": 100}, True),
        ({}, {"cuda_graphs": True}, True),
        pytest.param({"release": "10.13"}, {}, False, marks=pytest.mark.slow),
        pytest.param({"sm": "7.2"}, {}, False, marks=pytest.mark.slow),
        pytest.param({}, {"softmax_fp16": True}, False, marks=pytest.mark.slow),
    ],
)
def test_if_needed_builds_only_what_fits_no_more(
    copy: Path, settings: dict[str, Any], config: dict[str, Any], kept: bool
) -> None:
    before = (copy / FILE).stat().st_ino
    with fake_tensorrt(**settings):
        build_engine(read_bundle(BUNDLE), "auto", copy, threads=1, if_needed=True, tensorrt=TensorRtConfig(**config))
    assert ((copy / FILE).stat().st_ino == before) == kept
    assert manifest_of(copy).engine == TENSORRT


@pytest.mark.parametrize("there", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_auto_takes_tensorrt_where_it_is(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    place = engine_folder(read_bundle(BUNDLE), tmp_path, TENSORRT)
    if there:
        shutil.copytree(engine, place)
    state = ("-o", f"state_dir={tmp_path}", "-o", "engine.threads=1")
    with fake_tensorrt(), pytest.raises(SystemExit) as ended:
        main(["build-engine", "--model", str(BUNDLE), "--if-needed", *state])
    assert ended.value.code == 0
    out, said = capsys.readouterr()
    assert out == f"{place / FILE}\n"
    assert manifest_of(place).asked == (TENSORRT if there else "auto")
    why = f"{TENSORRT} was asked for" if there else "TensorRT and a GPU are here"
    assert said.splitlines()[-1] == f"paraformer-tiny: {TENSORRT}; {why}"


def test_the_command_says_in_a_line_that_there_is_no_tensorrt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_tensorrt(gpu="none"), pytest.raises(SystemExit) as ended:
        main([*arguments(tmp_path / "engine")])
    assert ended.value.code == 3
    out, said = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"edge-asr: {TENSORRT} cannot be built here: [^\n]*; or take --target onnx\n", said)


# Damage


def test_a_flipped_bit_in_a_manifest_is_noticed_wherever_it_is(copy: Path) -> None:
    manifest, content = manifest_of(copy), (copy / FILE).read_bytes()
    rng = random.Random(3)
    for place in rng.sample(range(len(content)), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        (copy / FILE).write_bytes(damaged)
        with contextlib.suppress(EngineError):  # noticed
            assert read_manifest(copy) == manifest, f"at {place}"
            assert json.loads(damaged) == json.loads(content), f"at {place}"


@pytest.mark.parametrize("key", ["encoder", "decoder", "sound"])
def test_a_flipped_bit_in_a_file_is_noticed(copy: Path, key: str) -> None:
    manifest = manifest_of(copy)
    assert manifest.self_test is not None
    path = copy / {"encoder": manifest.encoder, "decoder": manifest.decoder, "sound": manifest.self_test.sound}[key]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(EngineError, match=f"{path.name}: damaged; run edge-asr build-engine again"):
        check_files(copy, manifest)
    with fake_tensorrt():
        assert existing(read_bundle(BUNDLE), copy, TENSORRT) is None


@pytest.mark.parametrize("change", [{"plan": None}, {"engine": FP32}])
def test_a_plan_and_its_engine_belong_together(copy: Path, change: dict[str, Any]) -> None:
    write_manifest(copy, dataclasses.replace(manifest_of(copy), **change))
    with pytest.raises(EngineError, match=r"not a manifest \(it is [\w-]+ with(out)? a plan\)"):
        read_manifest(copy)


@pytest.mark.slow
def test_a_build_killed_at_twenty_random_times_leaves_an_engine_that_loads_or_none(
    engine: Path, tmp_path: Path
) -> None:
    out, olds = tmp_path / "engine", [None, engine, tmp_path / "fp32"]
    build_engine(read_bundle(BUNDLE), FP32, tmp_path / "fp32", threads=1)
    _, said = start(out).communicate()
    steps = said.count(b"%")
    rng, killed = random.Random(11), 0
    for number in range(20):
        shutil.rmtree(out)
        old = olds[number % len(olds)]
        if old is not None:
            shutil.copytree(old, out)
        child = start(out)
        assert child.stderr is not None
        for _ in range(rng.randrange(steps) if number % 3 else steps):  # behind the last step files are moved in
            child.stderr.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0, 0.1 if number % 3 else 0.01))
        child.kill()
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        out.mkdir(exist_ok=True)
        found = read_manifest(out)
        assert found is not None or old is None, "the old engine is gone"
        if found is not None:
            check_files(out, found)
            with fake_tensorrt():
                assert text_of(out) == transcripts()["01.wav"]
    assert killed >= 10
    start(out).communicate()
    manifest_of(out)  # and nothing of the others is left


def start(out: Path) -> subprocess.Popen[bytes]:
    """Start a build in a process of its own."""
    code = f"import sys; sys.path[:] = {[str(FOLDER), *sys.path]!r}; from edge_asr.cli import main; main()"
    environment = {**os.environ, "FAKE_TENSORRT": "10.3"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
