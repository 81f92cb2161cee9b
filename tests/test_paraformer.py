"""The recogniser of two networks on the bundled model, against sherpa-onnx; the inference thread."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import sherpa_onnx
from bundled import BUNDLE, ENGINES, bundle_of, load, sound_of, transcripts

from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.cif import ROW_MS, token_times
from edge_asr.recognizer.features import WIDTH
from edge_asr.recognizer.network import Arrays
from edge_asr.recognizer.paraformer import NOTHING, Paraformer, position_encoding
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
    """sherpa-onnx on the graph that the engine of `recognizer` was built from."""
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
def test_sherpa_onnx_gives_the_same_tokens_and_text_on_the_published_graph(
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


def test_each_stage_is_timed(recognizer: Paraformer) -> None:
    stages = recognizer.recognize(sound_of("01.wav")).stages_ms
    assert set(stages) == {"features", "encoder", "cif", "decoder"}
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


def test_tokens_follow_each_other_within_the_sound(recognizer: Paraformer) -> None:
    for name in SAMPLES:
        sound = sound_of(name)
        times = [(token.start_ms, token.end_ms) for token in recognizer.recognize(sound).tokens]
        known = [(start, end) for start, end in times if start is not None and end is not None]
        assert len(known) == len(times)
        last = len(sound) * 1000 / SAMPLE_RATE + 2 * ROW_MS  # the last row is filled up, and the tail is one more
        assert all(0 <= start < end <= last for start, end in known)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(known))


def test_a_batch_says_what_each_says_alone(recognizer: Paraformer) -> None:
    sounds = [sound_of(SAMPLES[0]), np.zeros(0, np.float32), sound_of(SAMPLES[4]), np.zeros(SAMPLE_RATE, np.float32)]
    for found, sound in zip(recognizer.recognize_batch(sounds), sounds, strict=True):
        alone = recognizer.recognize(sound)
        assert (found.text, len(found.tokens)) == (alone.text, len(alone.tokens))
        assert found.confidence == pytest.approx(alone.confidence, abs=1e-4)
        assert [(t.start_ms, t.end_ms) for t in found.tokens] == [(t.start_ms, t.end_ms) for t in alone.tokens]


def test_a_batch_of_nothing_is_nothing(recognizer: Paraformer) -> None:
    assert recognizer.recognize_batch([]) == []
    [found] = recognizer.recognize_batch([np.zeros(10, np.float32)])
    assert (found.text, found.tokens, found.confidence) == ("", (), None)


# Networks that answer otherwise

FRAMES = 17
"""Of a second."""
SECOND: Samples = np.zeros(SAMPLE_RATE, np.float32)
SIZE = 8
METADATA = {"input_scale": "3.0", "tail": "0.45", "vocabulary": "109", "batches": "true"}
TOKENS = bundle_of("onnx-fp32").tokens


class Encoder:
    """An encoder network that answers given alphas, one row for each utterance."""

    def __init__(self, alphas: Sequence[float], **metadata: str) -> None:
        self.alphas = np.array(alphas, np.float32)
        self.metadata = {**METADATA, **metadata}
        self.asked: list[Arrays] = []
        self.closed = False

    def run(self, inputs: Arrays) -> Arrays:
        self.asked.append(inputs)
        count, frames = inputs["x"].shape[:2]
        alphas = np.zeros((count, frames), np.float32)
        shown = self.alphas[:frames]
        alphas[:, : len(shown)] = shown
        return {"enc": np.zeros((count, frames, SIZE), np.float32), "alphas": alphas}

    def close(self) -> None:
        self.closed = True


class Decoder:
    """A decoder network that answers given ids with given probabilities."""

    def __init__(self, ids: Sequence[int], probabilities: Sequence[float] = ()) -> None:
        self.ids = np.array(ids, np.int64)
        self.logp = np.log(np.array(probabilities or [0.5] * len(ids), np.float32))
        self.asked: list[Arrays] = []
        self.closed = False

    metadata: Mapping[str, str] = {}

    def run(self, inputs: Arrays) -> Arrays:
        self.asked.append(inputs)
        count, tokens = inputs["cif"].shape[:2]
        return {"ids": np.tile(self.ids[:tokens], (count, 1)), "logp": np.tile(self.logp[:tokens], (count, 1))}

    def close(self) -> None:
        self.closed = True


def evenly(tokens: int) -> list[float]:
    """Return alphas of a second with so many tokens."""
    return [tokens / FRAMES + 1e-4] * FRAMES


def join(encoder: Encoder, decoder: Decoder) -> Paraformer:
    return Paraformer(bundle_of("onnx-fp32"), encoder, decoder, "scripted")


def scripted(ids: Sequence[int], probabilities: Sequence[float] = ()) -> Recognition:
    return join(Encoder(evenly(len(ids))), Decoder(ids, probabilities)).recognize(SECOND)


def test_special_tokens_are_no_text_wherever_they_stand() -> None:
    recognition = scripted([1, 10, 0, 2, 11, 2])
    assert recognition.text == TOKENS[10] + TOKENS[11]
    assert [token.text for token in recognition.tokens] == [TOKENS[10], TOKENS[11]]


def test_only_special_tokens_are_no_text() -> None:
    recognition = scripted([1, 0, 2])
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)


def test_confidence_leaves_special_tokens_out() -> None:
    recognition = scripted([10, 2, 11], [0.8, 0.001, 0.2])
    assert recognition.confidence == pytest.approx((0.8 * 0.2) ** 0.5, rel=1e-5)
    assert [token.confidence for token in recognition.tokens] == pytest.approx([0.8, 0.2], rel=1e-5)


@pytest.mark.parametrize(("alphas", "tokens"), [([1.0, 0.5], 1), ([1.0, 0.6], 2), ([0.54], 0), ([0.56], 1), ([2.6], 3)])
def test_the_sum_of_alphas_with_the_tail_says_how_many_tokens_there_are(alphas: list[float], tokens: int) -> None:
    assert len(join(Encoder(alphas), Decoder([10, 11, 12])).recognize(SECOND).tokens) == tokens


def test_without_a_token_the_decoder_is_not_asked() -> None:
    decoder = Decoder([10])
    recognizer = join(Encoder([0.5]), decoder)
    recognition = recognizer.recognize(SECOND)
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)
    assert set(recognition.stages_ms) == {"features", "encoder", "cif"}
    assert [found.text for found in recognizer.recognize_batch([SECOND, SECOND])] == ["", ""]
    assert decoder.asked == []


def test_without_a_frame_no_network_is_asked() -> None:
    encoder, decoder = Encoder([]), Decoder([])
    recognizer = join(encoder, decoder)
    before = len(encoder.asked)
    assert recognizer.recognize(SECOND[:399]).text == ""
    assert recognizer.decode(SECOND[:399]) is NOTHING
    assert len(encoder.asked) == before


def test_the_encoder_is_given_scaled_features_with_their_positions() -> None:
    encoder = Encoder(evenly(1))
    recognizer = join(encoder, Decoder([10]))
    sound = sound_of("01.wav")
    recognizer.recognize(sound)
    given = encoder.asked[-1]
    features = recognizer._features(sound)
    assert given["x"].shape == (1, len(features), WIDTH)
    np.testing.assert_allclose(given["x"][0], features * 3 + position_encoding(len(features)), atol=1e-5)
    np.testing.assert_array_equal(given["mask"], np.ones((1, len(features)), np.float32))


def test_positions_are_sines_then_cosines_from_one() -> None:
    encoding = position_encoding(500)
    for position, column in [(1, 0), (1, 279), (7, 100), (500, 3), (500, 279)]:
        angle = position * 10_000 ** (-column / 279)
        assert encoding[position - 1, column] == pytest.approx(np.sin(angle), abs=1e-3)
        assert encoding[position - 1, 280 + column] == pytest.approx(np.cos(angle), abs=1e-3)


def test_a_batch_is_one_run_in_which_masks_say_where_each_utterance_ends() -> None:
    encoder, decoder = Encoder(evenly(3)), Decoder([10, 11, 12])
    recognizer = join(encoder, decoder)
    asked = len(encoder.asked)
    half = SECOND[: SAMPLE_RATE // 2]
    found = recognizer.recognize_batch([half, SECOND], padding=3)
    assert len(encoder.asked) == asked + 1
    assert [len(one.tokens) for one in found] == [1, 3], "alphas behind the end do not count"
    rows = len(recognizer._features(half))
    given = encoder.asked[-1]
    assert given["x"].shape == (2, FRAMES + 3, WIDTH)
    assert not given["x"][0, rows:].any()
    np.testing.assert_array_equal(given["mask"].sum(axis=1), [rows, FRAMES])
    given = decoder.asked[-1]
    np.testing.assert_array_equal(given["enc_mask"].sum(axis=1), [rows, FRAMES])
    np.testing.assert_array_equal(given["emb_mask"], [[1, 0, 0], [1, 1, 1]])
    assert given["cif"].shape == (2, 3, FRAMES + 3)
    assert not given["cif"][0, 1:].any()
    assert not given["cif"][0, :, rows:].any()


def test_in_int8_a_batch_is_run_one_by_one_without_masks() -> None:
    encoder, decoder = Encoder(evenly(2), batches="false"), Decoder([10, 11])
    recognizer = join(encoder, decoder)
    asked = len(encoder.asked)
    found = recognizer.recognize_batch([SECOND, SECOND[: SAMPLE_RATE // 2], SECOND], padding=5)
    assert [one.text for one in found] == [TOKENS[10] + TOKENS[11], TOKENS[10], TOKENS[10] + TOKENS[11]]
    shapes = [given["x"].shape[:2] for given in encoder.asked[asked:]]
    assert shapes == [(1, FRAMES), (1, 8), (1, FRAMES)]
    assert all(set(given) == {"x"} for given in encoder.asked)
    assert all(set(given) == {"enc", "cif"} for given in decoder.asked)


def test_times_before_the_sound_are_clamped() -> None:
    alphas = [1.0]
    first = token_times(np.array(alphas + [0] * (FRAMES - 1), np.float32), 0.45, 1)
    assert first is not None
    assert first[0][0] < 0
    [token] = join(Encoder(alphas), Decoder([10])).recognize(SECOND).tokens
    assert (token.start_ms, token.end_ms) == (0, first[0][1])


def test_where_times_cannot_be_told_they_are_null() -> None:
    alphas = [0.0] * (FRAMES - 1) + [3.0]
    times = token_times(np.array(alphas, np.float32), 0.45, 3)
    assert times is None or len(times) < 3
    tokens = join(Encoder(alphas), Decoder([10, 11, 12])).recognize(SECOND).tokens
    assert [(token.text, token.start_ms, token.end_ms) for token in tokens] == [
        (TOKENS[id_], None, None) for id_ in (10, 11, 12)
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["alphas", "logp"])
def test_what_is_not_finite_is_an_error_of_the_engine(where: str, value: float) -> None:
    encoder, decoder = Encoder(evenly(2)), Decoder([10, 11])
    recognizer = join(encoder, decoder)
    broken = encoder.alphas if where == "alphas" else decoder.logp
    broken[1] = value
    with pytest.raises(EngineError, match="engine gives no finite numbers") as caught:
        recognizer.recognize(SECOND)
    assert str(bundle_of("onnx-fp32").folder) in str(caught.value)
    with pytest.raises(EngineError, match="engine gives no finite numbers"):
        join(encoder, decoder)


@pytest.mark.parametrize("vocabulary", ["108", "110"])
def test_a_vocabulary_of_another_size_is_refused(vocabulary: str) -> None:
    with pytest.raises(BundleError, match=f"holds 109 tokens, the model {vocabulary}; .*copy it again"):
        join(Encoder([], vocabulary=vocabulary), Decoder([]))


@pytest.mark.parametrize("key", METADATA)
def test_a_network_without_its_metadata_is_no_engine_of_ours(key: str) -> None:
    encoder = Encoder([])
    del encoder.metadata[key]
    with pytest.raises(EngineError, match=f"its engine lacks '{key}'; run edge-asr build-engine again"):
        join(encoder, Decoder([]))


@pytest.mark.parametrize("key", ["input_scale", "tail", "vocabulary"])
def test_a_network_whose_metadata_is_no_number_is_no_engine_of_ours(key: str) -> None:
    with pytest.raises(EngineError, match="run edge-asr build-engine again"):
        join(Encoder([], **{key: "much"}), Decoder([]))


def test_close_releases_both_networks() -> None:
    encoder, decoder = Encoder([]), Decoder([])
    join(encoder, decoder).close()
    assert (encoder.closed, decoder.closed) == (True, True)


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
        "    scheduler.submit([])\n"
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
