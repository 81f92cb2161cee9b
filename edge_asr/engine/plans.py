"""TensorRT's engine of a bundle: both networks in FP16, compiled, and compared with what fp32 hears."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_asr.config import TensorRtConfig
from edge_asr.engine import trial
from edge_asr.engine.candidate import SOURCES, Candidate, Progress, Proven, Steps, loaded, prove, read_networks
from edge_asr.engine.graph import HASH_DIGITS, Graph
from edge_asr.engine.plan_process import build_plan_apart
from edge_asr.engine.precision import calibrate, half, opset13, recordings, rescale
from edge_asr.engine.profiles import Profile, decoder_profiles, encoder_profiles
from edge_asr.engine.tensorrt_build import PlanOptions, free_bytes, knows_layer_norm, typing
from edge_asr.engine.weights import UnknownGraphError
from edge_asr.errors import BrokenEngineError, EngineError
from edge_asr.recognizer import self_test
from edge_asr.recognizer.bundle import FP32, INT8, Bundle
from edge_asr.recognizer.manifest import TENSORRT, Plan, SelfTest, sha256_of
from edge_asr.recognizer.paraformer import Ids, Paraformer
from edge_asr.recognizer.tensorrt_network import GpuFacts, TensorRtOptions, load_networks, machine
from edge_asr.types import SAMPLE_RATE, Samples

log = logging.getLogger(__name__)

MEMORY_FOR_WEIGHTS = 3
"""Of the weights in fp32, so much memory must be free: the builder holds them more than once."""
MEMORY_FOR_LIBRARIES = 1 << 30
"""And so much for CUDA, TensorRT and their kernels: an estimate."""
SELF_TEST_S, LONG_S = 5, 20
AGREE_HALF, AGREE_SPEECH = 0.9, 0.98
"""Share of tokens that must be as in fp32: in made-up sounds, where close calls flip, and in recordings."""
FULL_SCALE = 32_768


@dataclass(frozen=True, slots=True)
class _Written:
    """What plans are made of, and what they will be judged by."""

    fp32: Candidate
    encoder: tuple[Path, Path]
    """In FP16: the graph, and the file of its constants."""
    decoder: tuple[Path, Path]
    metadata: Mapping[str, str]
    scale: int
    width: int


@dataclass(frozen=True, slots=True)
class _Heard:
    """What fp32 hears."""

    compared_tokens: int
    spoken: Sequence[Ids]
    """In the bundle's recordings."""
    made: Sequence[Ids]
    """In sounds that are made up."""
    self_test: SelfTest


def build_plans(
    bundle: Bundle, folder: Path, cache: Path, threads: int, gpu: int, config: TensorRtConfig, progress: Progress
) -> Proven:
    """Build the plans of both networks in `folder`; `cache`: the file of the timing cache.

    Raises EngineError where TensorRT, the GPU or the memory are not there, where TensorRT fails, or where the plans do
    not hear what fp32 hears, even with products added up in FP32; UnknownGraphError where the weights cannot be taken
    apart.
    """
    try:
        return _build_plans(bundle, folder, cache, threads, gpu, config, progress, wide_sums=False)
    except _RefusedError as error:
        log.warning("%s: its plans are built again, with products added up in FP32: %s", bundle.name, error.__cause__)
    return _build_plans(bundle, folder, cache, threads, gpu, config, progress, wide_sums=True)


class _RefusedError(EngineError):
    """Plans that do not hear what fp32 hears."""


def _build_plans(
    bundle: Bundle, folder: Path, cache: Path, threads: int, gpu: int, config: TensorRtConfig, progress: Progress,
    wide_sums: bool,
) -> Proven:  # fmt: skip
    facts = _machine(gpu)
    _check_memory(bundle, facts, gpu)
    steps = Steps(progress, TENSORRT)
    sounds = recordings(bundle)
    written = _write(bundle, folder, sounds, threads, config, steps, wide_sums)
    heard = _listen(bundle, written.fp32, folder, sounds, threads, steps)
    for path in written.fp32.files:
        path.unlink()  # plans are as large: there may be no room for both
    _give_memory_back()
    options = PlanOptions(gpu, cache, config.workspace_mb)
    profiles = {"encoder": encoder_profiles(), "decoder": decoder_profiles(written.width)}
    encoder = _compile(written.encoder, profiles["encoder"], "encoder", options, steps.part(0.3, 0.7))
    decoder = _compile(written.decoder, profiles["decoder"], "decoder", options, steps.part(0.7, 0.95))
    candidate = Candidate(
        engine=TENSORRT,
        source=written.fp32.source,
        described=written.fp32.described,
        encoder=(encoder,),
        decoder=(decoder,),
        beside=(folder / heard.self_test.sound,),
        metadata=written.metadata,
        self_test=heard.self_test,
        plan=_describe(facts, config, written.scale, wide_sums, profiles),
    )
    steps("comparing with fp32", 0.95)
    try:
        _compare(bundle, candidate, heard, sounds, gpu)
    except _RefusedError:
        for path in (encoder, decoder):
            path.unlink()
        raise
    return Proven(candidate, heard.compared_tokens)


def _machine(gpu: int) -> GpuFacts:
    try:
        return machine(gpu)
    except EngineError as error:
        raise EngineError(f"{TENSORRT} cannot be built here: {error}; or take --target onnx") from error


def _check_memory(bundle: Bundle, facts: GpuFacts, gpu: int) -> None:
    kind = next(kind for kind in SOURCES[FP32] if kind in bundle.files)
    weights = bundle.files[kind].stat().st_size * (4 if kind == INT8 else 1)
    needed, free = MEMORY_FOR_LIBRARIES + MEMORY_FOR_WEIGHTS * weights, free_bytes(facts, gpu)
    if free < needed:
        raise EngineError(
            f"TensorRT needs about {needed >> 20} MB of free memory to build {bundle.name}, here are {free >> 20} MB;"
            " end other programs, or take --target onnx"
        )


def _write(
    bundle: Bundle, folder: Path, sounds: Sequence[Samples], threads: int, config: TensorRtConfig, steps: Steps,
    wide_sums: bool,
) -> _Written:  # fmt: skip
    """Write both networks in fp32 and in FP16; the weights are gone from memory afterwards."""
    networks = read_networks(bundle, FP32, True, steps.part(0.0, 0.05))
    steps("looking for the largest activations", 0.05)
    calibration = calibrate(bundle, networks.encoder, networks.decoder, sounds, folder, threads)
    fp32 = networks.write(folder, steps.part(0.1, 0.15))
    old = not knows_layer_norm()

    def halved(graph: Graph, name: str) -> tuple[Path, Path]:
        steps(f"writing the {name} in FP16", 0.15)
        halves = half(rescale(graph, calibration.scale, calibration.inner), config.softmax_fp16, wide_sums)
        return (opset13(halves) if old else halves).write(folder, f"{name}-fp16")

    encoder, decoder = halved(networks.encoder, "encoder"), halved(networks.decoder, "decoder")
    width = networks.encoder.skeleton.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    written = _Written(fp32, encoder, decoder, networks.metadata, calibration.scale, width)
    del networks, halved
    gc.collect()
    return written


def _made_up() -> list[Samples]:
    """Return sounds of lengths for which all of a plan's kernels for single utterances are needed."""
    return [*(make(seconds) for seconds in trial.TRIED_S for make in (trial.babble, trial.hiss)), trial.babble(LONG_S)]


def _listen(
    bundle: Bundle, fp32: Candidate, folder: Path, spoken: Sequence[Samples], threads: int, steps: Steps
) -> _Heard:
    """Prove fp32 by the published graph, and note what it hears."""
    compared = prove(bundle, fp32, threads, steps.part(0.15, 0.3), timed=False).compared_tokens
    with loaded(bundle, fp32, threads) as recognizer:
        expected = _self_test(recognizer, folder, spoken)
        return _Heard(compared, _ids(recognizer, spoken), _ids(recognizer, _made_up()), expected)


def _ids(recognizer: Paraformer, sounds: Sequence[Samples]) -> list[Ids]:
    return [recognizer.decode(sound).ids for sound in sounds]


def _self_test(recognizer: Paraformer, folder: Path, sounds: Sequence[Samples]) -> SelfTest:
    """Write a sound into `folder`, the bundle's own recording where it has one, and note what is heard in it."""
    sound = sounds[0] if sounds else trial.babble(SELF_TEST_S)
    whole = np.clip(np.round(sound[: SELF_TEST_S * SAMPLE_RATE] * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
    draft = folder / "self-test.wav"
    with wave.open(str(draft), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(whole.astype("<i2").tobytes())
    decoded = recognizer.decode((whole / FULL_SCALE).astype(np.float32))
    return SelfTest(_named_by_hash(draft).name, decoded.ids.tolist(), float(decoded.alphas.sum()))


def _give_memory_back() -> None:
    """Let the system have what is free here, for the builder: glibc would keep more than half of what we took."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _compile(
    network: tuple[Path, Path], profiles: Sequence[Profile], name: str, options: PlanOptions, steps: Steps
) -> Path:
    """Build the plan of a network in FP16, of which nothing is left; return its file."""
    graph, _ = network
    plan = graph.with_name(f"{name}.plan")
    step = f"building the plan of the {name}"
    steps(step, 0.0)
    build_plan_apart(graph, profiles, plan, options, lambda share: steps(step, share))
    for path in network:
        path.unlink()
    return _named_by_hash(plan)


def _named_by_hash(path: Path) -> Path:
    return path.replace(path.with_name(f"{path.stem}-{sha256_of(path)[:HASH_DIGITS]}{path.suffix}"))


def _describe(
    facts: GpuFacts, config: TensorRtConfig, scale: int, wide_sums: bool, profiles: dict[str, list[Profile]]
) -> Plan:
    return Plan(
        tensorrt=facts.tensorrt,
        cuda=facts.cuda,
        gpu=facts.gpu,
        sm=facts.sm,
        multiprocessors=facts.multiprocessors,
        memory_gb=facts.memory_gb,
        l4t=facts.l4t,
        typing=typing(),
        softmax_fp16=config.softmax_fp16,
        accumulation="fp32" if wide_sums else "fp16",
        scale=scale,
        profiles={
            network: [{name: [list(shape) for shape in shapes] for name, shapes in one.items()} for one in many]
            for network, many in profiles.items()
        },
    )


def _compare(bundle: Bundle, plans: Candidate, heard: _Heard, spoken: Sequence[Samples], gpu: int) -> None:
    """Raise EngineError unless the plans can be loaded, and _RefusedError unless they hear what fp32 heard."""
    try:
        encoder, decoder = load_networks(plans.encoder[0], plans.decoder[0], plans.metadata, TensorRtOptions(gpu))
    except EngineError as error:  # for which other sums are no remedy
        raise EngineError(_refusal(bundle, error)) from error
    try:
        with contextlib.closing(encoder), contextlib.closing(decoder):  # also where they do not make a recogniser
            recognizer = Paraformer(bundle, encoder, decoder, TENSORRT)
            self_test.check(recognizer, plans.beside[0].parent, heard.self_test)
            for sounds, expected, share in (
                (spoken, heard.spoken, AGREE_SPEECH),
                (_made_up(), heard.made, AGREE_HALF),
            ):
                if sounds:
                    trial.compare(_ids(recognizer, sounds), expected, share, slack=len(sounds))
            recognizer.recognize_batch([trial.babble(seconds) for seconds in trial.TRIED_S])  # has kernels of its own
    except BrokenEngineError as error:
        raise EngineError(_refusal(bundle, error)) from error
    except (UnknownGraphError, EngineError) as error:
        raise _RefusedError(_refusal(bundle, error)) from error


def _refusal(bundle: Bundle, error: Exception) -> str:
    return f"TensorRT's plans of {bundle.name} were refused: {error}; or take --target onnx"
