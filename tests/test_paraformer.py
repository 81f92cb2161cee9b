"""The recogniser on the bundled model, against sherpa-onnx on the very same files; the inference thread."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sherpa_onnx
from bundled import BUNDLE, ENGINES, bundle_of, load, sound_of, transcripts

from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.network import Arrays
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.paraformer import Paraformer
from edge_asr.recognizer.scheduler import Scheduler
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

SAMPLES = sorted(transcripts())


@pytest.fixture(scope="module", params=ENGINES)
def recognizer(request: pytest.FixtureRequest) -> Iterator[Paraformer]:
    loaded = load(request.param)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def sherpa(recognizer: Paraformer) -> Any:
    """sherpa-onnx on the graph that `recognizer` runs."""
    return sherpa_onnx.OfflineRecognizer.from_paraformer(str(recognizer.bundle.graph), str(BUNDLE / "tokens.txt"))


def ask_sherpa(sherpa: Any, samples: Samples) -> Any:
    stream = sherpa.create_stream()
    stream.accept_waveform(SAMPLE_RATE, samples)
    sherpa.decode_stream(stream)
    return stream.result


# What was said


@pytest.mark.parametrize("name", SAMPLES)
def test_every_bundled_recording_is_recognised(recognizer: Paraformer, name: str) -> None:
    recognition = recognizer.recognize(sound_of(name))
    assert recognition.text == transcripts()[name]
    assert "".join(token.text for token in recognition.tokens) == recognition.text


@pytest.mark.parametrize("name", SAMPLES)
def test_sherpa_onnx_gives_the_same_tokens_and_text_on_the_same_graph(
    recognizer: Paraformer, sherpa: Any, name: str
) -> None:
    ours, theirs = recognizer.recognize(sound_of(name)), ask_sherpa(sherpa, sound_of(name))
    assert ours.text == theirs.text
    assert [token.text for token in ours.tokens] == theirs.tokens


@pytest.mark.parametrize("name", SAMPLES)
def test_confidence_is_the_exponential_of_the_mean_log_probability(recognizer: Paraformer, name: str) -> None:
    recognition = recognizer.recognize(sound_of(name))
    probabilities = np.array([token.confidence for token in recognition.tokens])
    assert ((probabilities > 0) & (probabilities <= 1)).all()
    assert recognition.confidence is not None
    assert 0 < recognition.confidence <= 1
    assert recognition.confidence == pytest.approx(float(np.exp(np.log(probabilities).mean())), rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_token_confidences_are_the_graphs_own_log_probabilities(engine: str) -> None:
    network = Recorder(engine)
    recognizer = Paraformer(bundle_of(engine), network)
    recognition = recognizer.recognize(sound_of("04.wav"))
    scores = network.last["logits"][0][: int(network.last["token_num"][0])].astype(np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ids = shares.argmax(-1)
    spoken = ids > 2
    assert [token.text for token in recognition.tokens] == [recognizer.bundle.tokens[i] for i in ids[spoken]]
    expected = shares.max(-1)[spoken]
    np.testing.assert_allclose([token.confidence for token in recognition.tokens], expected, rtol=1e-4)


def test_each_stage_is_timed(recognizer: Paraformer) -> None:
    stages = recognizer.recognize(sound_of("01.wav")).stages_ms
    assert set(stages) == {"features", "model"}
    assert all(value >= 0 for value in stages.values())


@pytest.mark.parametrize("samples", [0, 1, 399], ids=["nothing", "one sample", "under 25 ms"])
def test_what_is_too_short_for_a_frame_has_no_text(recognizer: Paraformer, samples: int) -> None:
    recognition = recognizer.recognize(np.zeros(samples, np.float32))
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)


@pytest.mark.parametrize("samples", [400, 401, 560, 1_359, 1_360, 1_520, 3_200])
def test_the_shortest_sounds_are_answered(recognizer: Paraformer, samples: int) -> None:
    sound = (np.random.default_rng(samples).standard_normal(samples) * 0.01).astype(np.float32)
    recognition = recognizer.recognize(sound)
    assert len(recognition.tokens) <= 2


def test_silence_has_no_text(recognizer: Paraformer) -> None:
    recognition = recognizer.recognize(np.zeros(2 * SAMPLE_RATE, np.float32))
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)


def test_thirty_seconds_are_recognised_at_once(recognizer: Paraformer) -> None:
    whole = np.concatenate([sound_of(SAMPLES[k % len(SAMPLES)]) for k in range(12)])[: 30 * SAMPLE_RATE]
    assert transcripts()[SAMPLES[0]] in recognizer.recognize(whole).text


def test_a_recognition_depends_on_nothing_before_it(recognizer: Paraformer) -> None:
    first = recognizer.recognize(sound_of("01.wav"))
    recognizer.recognize(sound_of("05.wav"))
    again = recognizer.recognize(sound_of("01.wav"))
    assert (again.text, again.tokens, again.confidence) == (first.text, first.tokens, first.confidence)


# Graphs that answer otherwise


class Recorder(OnnxNetwork):
    """A loaded graph that keeps its last answer."""

    def __init__(self, engine: str) -> None:
        super().__init__(bundle_of(engine).graph, threads=1)
        self.last: Arrays = {}

    def run(self, inputs: Arrays) -> Arrays:
        self.last = super().run(inputs)
        return self.last


class Scripted:
    """A network that answers given ids with given probabilities, as plain scores."""

    def __init__(self, ids: list[int], probability: float, vocabulary: int, count: int | None = None) -> None:
        rest = (1 - probability) / (vocabulary - 1)
        self._scores = np.full((1, len(ids), vocabulary), np.log(rest) + 7, np.float32)
        for position, token in enumerate(ids):
            self._scores[0, position, token] = np.log(probability) + 7
        self._count = len(ids) if count is None else count
        self.closed = False

    @property
    def metadata(self) -> dict[str, str]:
        return {}

    def run(self, inputs: Arrays) -> Arrays:
        assert inputs["speech"].shape[2] == 560
        assert inputs["speech_lengths"].tolist() == [inputs["speech"].shape[1]]
        return {"logits": self._scores, "token_num": np.array([self._count], np.int32)}

    def close(self) -> None:
        self.closed = True


SECOND: npt.NDArray[np.float32] = np.zeros(SAMPLE_RATE, np.float32)


def scripted(ids: list[int], probability: float = 0.5, count: int | None = None) -> Recognition:
    bundle = bundle_of("onnx-fp32")
    return Paraformer(bundle, Scripted(ids, probability, len(bundle.tokens), count)).recognize(SECOND)


def test_special_tokens_are_no_text_wherever_they_stand() -> None:
    tokens = bundle_of("onnx-fp32").tokens
    recognition = scripted([1, 10, 0, 2, 11, 2])
    assert recognition.text == tokens[10] + tokens[11]
    assert len(recognition.tokens) == 2


def test_only_special_tokens_are_no_text() -> None:
    recognition = scripted([1, 0, 2])
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)


def test_plain_scores_are_normalised() -> None:
    recognition = scripted([10, 11, 12], probability=0.25)
    assert recognition.confidence == pytest.approx(0.25, rel=1e-4)
    assert [token.confidence for token in recognition.tokens] == pytest.approx([0.25] * 3, rel=1e-4)


@pytest.mark.parametrize(("count", "tokens"), [(-1, 0), (0, 0), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_graph_says_how_many_tokens_count(count: int, tokens: int) -> None:
    assert len(scripted([10, 11, 12], count=count).tokens) == tokens


def test_a_graph_without_the_right_outputs_is_refused() -> None:
    class Other(Scripted):
        def run(self, inputs: Arrays) -> Arrays:
            return {"output": next(iter(super().run(inputs).values()))}

    with pytest.raises(BundleError, match=r"model\.onnx: .*no Paraformer graph; .*set `model` .*'logits'"):
        Paraformer(bundle_of("onnx-fp32"), Other([10], 0.5, 109))


def test_a_graph_that_fails_while_running_raises_an_engine_error() -> None:
    network = OnnxNetwork(BUNDLE / "model.onnx", threads=1)
    with pytest.raises(EngineError, match=r"^[^\n]*model\.onnx: onnxruntime failed: [^\n]*$"):
        network.run({"speech": np.zeros((1, 10, 3), np.float32), "speech_lengths": np.array([10], np.int32)})


def test_close_releases_the_network() -> None:
    network = Scripted([10], 0.5, len(bundle_of("onnx-fp32").tokens))
    Paraformer(bundle_of("onnx-fp32"), network).close()
    assert network.closed


# The inference thread


class Probe:
    """A recogniser that tells on which thread it works, waits where asked to, and counts."""

    def __init__(self) -> None:
        self.made_on = threading.current_thread().name
        self.threads: list[str] = []
        self.lengths: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.busy = threading.Event()
        self.closed = False

    def recognize(self, samples: Samples) -> Recognition:
        self.threads.append(threading.current_thread().name)
        self.lengths.append(len(samples))
        self.busy.set()
        assert self.go_on.wait(30)
        if not len(samples):
            raise EngineError("nothing to recognise")
        return Recognition("好", (), 0.5, {"model": 1.0})

    def close(self) -> None:
        self.closed = True


def sound(samples: int) -> Samples:
    return np.zeros(samples, np.float32)


async def test_the_model_is_loaded_and_runs_on_the_inference_thread() -> None:
    probes: list[Probe] = []

    def make() -> Probe:
        probes.append(Probe())
        return probes[0]

    scheduler = Scheduler(make)
    await scheduler.start()
    for samples in (1, 2, 3):
        await asyncio.wrap_future(scheduler.submit(sound(samples)))
    await scheduler.close()
    (probe,) = probes
    assert {probe.made_on, *probe.threads} == {"inference"}
    assert probe.lengths == [1, 2, 3]


async def test_a_request_tells_how_long_it_waited_before_its_stages() -> None:
    scheduler = Scheduler(Probe)
    await scheduler.start()
    recognition = await asyncio.wrap_future(scheduler.submit(sound(1)))
    await scheduler.close()
    assert list(recognition.stages_ms) == ["queue", "model"]
    assert recognition.stages_ms["queue"] >= 0


async def test_a_cancelled_request_is_not_run() -> None:
    probe = Probe()
    scheduler = Scheduler(lambda: probe)
    await scheduler.start()
    probe.go_on.clear()
    first, second, third = (scheduler.submit(sound(samples)) for samples in (1, 2, 3))
    await asyncio.to_thread(probe.busy.wait, 30)
    assert second.cancel()
    assert not first.cancel()
    probe.go_on.set()
    assert (await asyncio.wrap_future(third)).text == "好"
    await scheduler.close()
    assert probe.lengths == [1, 3]


async def test_a_failed_request_raises_and_the_next_is_answered() -> None:
    scheduler = Scheduler(Probe)
    await scheduler.start()
    bad, good = scheduler.submit(sound(0)), scheduler.submit(sound(1))
    with pytest.raises(EngineError, match="nothing to recognise"):
        await asyncio.wrap_future(bad)
    assert (await asyncio.wrap_future(good)).text == "好"
    await scheduler.close()


async def test_an_error_while_loading_comes_out_of_start() -> None:
    def fail() -> Probe:
        raise BundleError("model.onnx: damaged; copy the bundle again")

    scheduler = Scheduler(fail)
    with pytest.raises(BundleError, match="damaged"):
        await scheduler.start()
    await scheduler.close()


async def test_close_finishes_what_is_under_way_drops_the_rest_and_releases_the_model() -> None:
    probe = Probe()
    scheduler = Scheduler(lambda: probe)
    await scheduler.start()
    probe.go_on.clear()
    under_way, waiting = scheduler.submit(sound(1)), scheduler.submit(sound(2))
    await asyncio.to_thread(probe.busy.wait, 30)
    closing = asyncio.create_task(scheduler.close())
    await asyncio.wait([asyncio.wrap_future(waiting)], timeout=30)
    closed_early = probe.closed
    probe.go_on.set()
    await closing
    assert waiting.cancelled()
    assert under_way.result().text == "好"
    assert probe.lengths == [1]
    assert (closed_early, probe.closed) == (False, True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inference")]


async def test_close_gives_up_an_inference_that_takes_too_long() -> None:
    probe = Probe()
    scheduler = Scheduler(lambda: probe)
    await scheduler.start()
    probe.go_on.clear()
    under_way, waiting = scheduler.submit(sound(1)), scheduler.submit(sound(2))
    await asyncio.to_thread(probe.busy.wait, 30)
    try:
        assert not await asyncio.wait_for(scheduler.close(0.0), 20)
        assert not under_way.done()
        assert waiting.cancelled()
    finally:
        probe.go_on.set()
    assert await scheduler.close(), "it ends by itself, later, and releases the model"
    assert under_way.result().text == "好"
    assert (probe.lengths, probe.closed) == ([1], True)


def test_an_abandoned_inference_does_not_keep_the_process() -> None:
    program = (
        "import asyncio, threading\n"
        "from edge_asr.recognizer.scheduler import Scheduler\n"
        "busy = threading.Event()\n"
        "class Stuck:\n"
        "    def recognize(self, samples):\n"
        "        busy.set()\n"
        "        threading.Event().wait()\n"
        "async def main():\n"
        "    scheduler = Scheduler(Stuck)\n"
        "    await scheduler.start()\n"
        "    scheduler.submit(None)\n"
        "    await asyncio.to_thread(busy.wait)\n"
        "    await scheduler.close(0.0)\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


async def test_a_scheduler_that_was_never_started_can_be_closed() -> None:
    scheduler = Scheduler(Probe)
    waiting = scheduler.submit(sound(1))
    await scheduler.close()
    assert waiting.cancelled()
