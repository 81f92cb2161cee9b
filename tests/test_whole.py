"""A published graph run as it is: what its outputs become, and what is no Paraformer's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sherpa_onnx
from bundled import BUNDLE, ENGINES, bundle_of, load_whole, sound_of, transcripts
from goldens import TimesCase, read_times_cases

from edge_asr.errors import BundleError, EngineError
from edge_asr.recognizer.network import Arrays
from edge_asr.recognizer.onnx_network import OnnxNetwork
from edge_asr.recognizer.whole import WholeParaformer
from edge_asr.types import SAMPLE_RATE, Recognition, Samples

SAMPLES = sorted(transcripts())


@pytest.fixture(scope="module", params=ENGINES)
def recognizer(request: pytest.FixtureRequest) -> Iterator[WholeParaformer]:
    loaded = load_whole(request.param)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def sherpa(recognizer: WholeParaformer) -> Any:
    """sherpa-onnx on the graph that `recognizer` runs."""
    return sherpa_onnx.OfflineRecognizer.from_paraformer(str(recognizer.bundle.graph), str(BUNDLE / "tokens.txt"))


# The bundled graphs


@pytest.mark.parametrize("name", SAMPLES)
def test_every_bundled_recording_is_recognised(recognizer: WholeParaformer, name: str) -> None:
    recognition = recognizer.recognize(sound_of(name))
    assert recognition.text == transcripts()[name]
    assert "".join(token.text for token in recognition.tokens) == recognition.text


@pytest.mark.parametrize("name", SAMPLES)
def test_sherpa_onnx_gives_the_same_tokens_and_text_on_the_same_graph(
    recognizer: WholeParaformer, sherpa: Any, name: str
) -> None:
    stream = sherpa.create_stream()
    stream.accept_waveform(SAMPLE_RATE, sound_of(name))
    sherpa.decode_stream(stream)
    ours, theirs = recognizer.recognize(sound_of(name)), stream.result
    assert ours.text == theirs.text
    assert [token.text for token in ours.tokens] == theirs.tokens


@pytest.mark.parametrize("engine", ENGINES)
def test_token_confidences_are_the_graphs_own_log_probabilities(engine: str) -> None:
    network = Recorder(engine)
    recognizer = WholeParaformer(bundle_of(engine), network, engine)
    recognition = recognizer.recognize(sound_of("04.wav"))
    scores = network.last["logits"][0][: int(network.last["token_num"][0])].astype(np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ids = shares.argmax(-1)
    spoken = ids > 2
    assert [token.text for token in recognition.tokens] == [recognizer.bundle.tokens[i] for i in ids[spoken]]
    expected = shares.max(-1)[spoken]
    np.testing.assert_allclose([token.confidence for token in recognition.tokens], expected, rtol=1e-4)


def test_each_stage_is_timed(recognizer: WholeParaformer) -> None:
    stages = recognizer.recognize(sound_of("01.wav")).stages_ms
    assert set(stages) == {"features", "model"}
    assert all(value >= 0 for value in stages.values())


def test_tokens_have_no_times(recognizer: WholeParaformer) -> None:
    tokens = recognizer.recognize(sound_of("01.wav")).tokens
    assert tokens
    assert {(token.start_ms, token.end_ms) for token in tokens} == {(None, None)}


@pytest.mark.parametrize("samples", [0, 1, 399], ids=["nothing", "one sample", "under 25 ms"])
def test_what_is_too_short_for_a_frame_has_no_text(recognizer: WholeParaformer, samples: int) -> None:
    recognition = recognizer.recognize(np.zeros(samples, np.float32))
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)
    assert len(recognizer.decode(np.zeros(samples, np.float32)).ids) == 0


@pytest.mark.parametrize("samples", [400, 401, 1_360, 3_200])
def test_the_shortest_sounds_are_answered(recognizer: WholeParaformer, samples: int) -> None:
    sound = (np.random.default_rng(samples).standard_normal(samples) * 0.01).astype(np.float32)
    assert len(recognizer.recognize(sound).tokens) <= 2


def test_silence_has_no_text(recognizer: WholeParaformer) -> None:
    recognition = recognizer.recognize(np.zeros(2 * SAMPLE_RATE, np.float32))
    assert (recognition.text, recognition.tokens, recognition.confidence) == ("", (), None)


def test_a_batch_is_recognised_one_by_one(recognizer: WholeParaformer) -> None:
    sounds = [sound_of(name) for name in SAMPLES[:3]]
    assert [found.text for found in recognizer.recognize_batch(sounds)] == [transcripts()[name] for name in SAMPLES[:3]]
    assert not recognizer.batches


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
        self.scores = np.full((1, len(ids), vocabulary), np.log(rest) + 7, np.float32)
        for position, token in enumerate(ids):
            self.scores[0, position, token] = np.log(probability) + 7
        self._count = len(ids) if count is None else count
        self.closed = False

    @property
    def metadata(self) -> dict[str, str]:
        return {}

    def run(self, inputs: Arrays) -> Arrays:
        assert inputs["speech"].shape[2] == 560
        assert inputs["speech_lengths"].tolist() == [inputs["speech"].shape[1]]
        return {"logits": self.scores, "token_num": np.array([self._count], np.int32)}

    def close(self) -> None:
        self.closed = True


SECOND: Samples = np.zeros(SAMPLE_RATE, np.float32)


def scripted(ids: list[int], probability: float = 0.5, count: int | None = None) -> Recognition:
    bundle = bundle_of("onnx-fp32")
    network = Scripted(ids, probability, len(bundle.tokens), count)
    return WholeParaformer(bundle, network, "scripted").recognize(SECOND)


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
        WholeParaformer(bundle_of("onnx-fp32"), Other([10], 0.5, 109), "scripted")


@pytest.mark.parametrize("vocabulary", [108, 110])
def test_a_vocabulary_of_another_size_is_refused(vocabulary: int) -> None:
    with pytest.raises(BundleError, match=f"holds 109 tokens, the model {vocabulary}; .*copy it again"):
        WholeParaformer(bundle_of("onnx-fp32"), Scripted([10], 0.5, vocabulary), "scripted")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_of_noise_that_are_not_finite_are_refused(value: float) -> None:
    network = Scripted([10, 11], 0.5, 109)
    network.scores[0, 1, 7] = value
    with pytest.raises(BundleError, match="no finite numbers on noise; copy the bundle again"):
        WholeParaformer(bundle_of("onnx-fp32"), network, "scripted")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_of_speech_that_are_not_finite_are_an_error_of_the_engine(value: float) -> None:
    network = Scripted([10, 11], 0.5, 109)
    recognizer = WholeParaformer(bundle_of("onnx-fp32"), network, "scripted")
    network.scores[0, 1, 7] = value
    with pytest.raises(EngineError, match=r"model\.onnx: the scores are not finite"):
        recognizer.recognize(SECOND)


def test_a_network_that_fails_on_noise_is_no_paraformer() -> None:
    class Failing(Scripted):
        def run(self, inputs: Arrays) -> Arrays:
            raise EngineError("model.onnx: onnxruntime failed: no such input")

    with pytest.raises(BundleError, match=r"model\.onnx: .*no Paraformer graph; .*set `model` .*no such input"):
        WholeParaformer(bundle_of("onnx-fp32"), Failing([10], 0.5, 109), "scripted")


def test_a_graph_that_fails_while_running_raises_an_engine_error() -> None:
    network = OnnxNetwork(BUNDLE / "model.onnx", threads=1)
    with pytest.raises(EngineError, match=r"^[^\n]*model\.onnx: onnxruntime failed: [^\n]*$"):
        network.run({"speech": np.zeros((1, 10, 3), np.float32), "speech_lengths": np.array([10], np.int32)})


def test_close_releases_the_network() -> None:
    network = Scripted([10], 0.5, len(bundle_of("onnx-fp32").tokens))
    WholeParaformer(bundle_of("onnx-fp32"), network, "scripted").close()
    assert network.closed


class Odd(Scripted):
    """A graph whose outputs can be replaced."""

    def __init__(self, **replaced: npt.NDArray[Any]) -> None:
        super().__init__([10, 11], 0.5, len(bundle_of("onnx-fp32").tokens))
        self.replaced = replaced

    def run(self, inputs: Arrays) -> Arrays:
        return {**super().run(inputs), **self.replaced}


ODD: dict[str, tuple[str, npt.NDArray[Any]]] = {
    "scalar scores": ("logits", np.float32(1).reshape(())),
    "scores of rank 2": ("logits", np.zeros((2, 109), np.float32)),
    "scores of rank 4": ("logits", np.zeros((1, 1, 2, 109), np.float32)),
    "an empty batch": ("logits", np.zeros((0, 2, 109), np.float32)),
    "scores that are text": ("logits", np.full((1, 2, 109), "a")),
    "scores that are flags": ("logits", np.zeros((1, 2, 109), np.bool_)),
    "no count": ("token_num", np.zeros(0, np.int32)),
    "a count that is NaN": ("token_num", np.array([np.nan], np.float32)),
    "an infinite count": ("token_num", np.array([np.inf], np.float32)),
    "a count that is text": ("token_num", np.array(["two"])),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_outputs_are_no_paraformers(name: str) -> None:
    output, value = ODD[name]
    network = Odd(**{output: value})
    with pytest.raises(BundleError, match=rf"^[^\n]*model\.onnx: .*no Paraformer graph; [^\n]*`{output}`[^\n]*$"):
        WholeParaformer(bundle_of("onnx-fp32"), network, "scripted")


@pytest.mark.parametrize("name", ODD)
def test_outputs_that_become_odd_are_an_error_of_the_engine(name: str) -> None:
    output, value = ODD[name]
    network = Odd()
    recognizer = WholeParaformer(bundle_of("onnx-fp32"), network, "scripted")
    network.replaced = {output: value}
    with pytest.raises(EngineError, match=rf"^[^\n]*model\.onnx: its `{output}`[^\n]*$"):
        recognizer.recognize(SECOND)


@pytest.mark.parametrize("count", [np.int64(1), np.array([1.0], np.float64), np.array([[1]], np.int32)])
def test_a_count_of_any_shape_and_kind_of_number_is_one(count: npt.NDArray[Any]) -> None:
    recognizer = WholeParaformer(bundle_of("onnx-fp32"), Odd(token_num=np.asarray(count)), "scripted")
    assert len(recognizer.recognize(SECOND).tokens) == 1


FIRES = np.array([[0.3, 1.2, 0.3, 0.3, 1.2, 0.3, 1.2]], np.float32)


@pytest.mark.parametrize(
    ("alphas", "peaks"),
    [
        (FIRES[0], FIRES[0]),
        (FIRES[:0], FIRES[:0]),
        (FIRES, FIRES[:, 1:]),
        (FIRES[:, :0], FIRES[:, :0]),
        (np.float32(1).reshape(()), FIRES),
        (FIRES[..., None], FIRES[..., None]),
        (FIRES * np.float32(np.nan), FIRES),
        (FIRES * np.float32(np.inf), FIRES[:, ::-1] * 0),
        (FIRES.astype(np.str_), FIRES),
        (FIRES, FIRES.astype(np.str_)),
    ],
    ids=["rank 1", "no batch", "of two lengths", "nothing", "scalar", "rank 3", "NaN", "infinite", "text", "text too"],
)  # fmt: skip
def test_odd_finer_alphas_give_no_times(alphas: npt.NDArray[Any], peaks: npt.NDArray[Any]) -> None:
    network = Odd(us_alphas=alphas, us_cif_peak=peaks)
    tokens = WholeParaformer(bundle_of("onnx-fp32"), network, "scripted").recognize(SECOND).tokens
    assert [(token.start_ms, token.end_ms) for token in tokens] == [(None, None)] * 2


def test_finer_alphas_as_they_should_be_give_times() -> None:
    network = Odd(us_alphas=FIRES, us_cif_peak=FIRES)
    tokens = WholeParaformer(bundle_of("onnx-fp32"), network, "scripted").recognize(SECOND).tokens
    assert len(tokens) == 2
    assert all(token.start_ms is not None for token in tokens)


class Finer(Scripted):
    """A graph with finer alphas, as BiCif models are exported."""

    def __init__(self, case: TimesCase) -> None:
        super().__init__([10 + index for index in range(case.tokens)], 0.5, len(bundle_of("onnx-fp32").tokens))
        self._case = case

    def run(self, inputs: Arrays) -> Arrays:
        peaks = np.where(self._case.fired, np.float32(1.2), np.float32(0.3))
        return {**super().run(inputs), "us_alphas": self._case.alphas[None], "us_cif_peak": peaks[None]}


def test_finer_alphas_of_a_graph_give_funasrs_times() -> None:
    cases = [case for case in read_times_cases() if case.upsample_rate == 3 and case.tokens]
    for case in cases:
        tokens = WholeParaformer(bundle_of("onnx-fp32"), Finer(case), "scripted").recognize(SECOND).tokens
        times = [(token.start_ms, token.end_ms) for token in tokens]
        if case.times and len(case.times) == case.tokens:
            assert times == [(max(0, start), max(0, end)) for start, end in case.times]
        else:
            assert times == [(None, None)] * case.tokens
    assert len(cases) > 100
