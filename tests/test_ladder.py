"""The ladder: what is loaded, what is left for a lesser engine, and what is told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from prometheus_client import REGISTRY

from edge_asr.errors import BrokenEngineError, BundleError, EngineError, NotFiniteError
from edge_asr.ladder import Ladder, LoadedEngine, Rung
from edge_asr.loader import UnfitError
from edge_asr.recognizer.manifest import TENSORRT
from edge_asr.types import Recognition, Samples

SOUND: Samples = np.zeros(16_000, np.float32)


class Told:
    """An engine that answers with its own name, or fails as it is told to."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.failing: Exception | None = None
        self.unreleasable: Exception | None = None
        self.closed = 0

    batches = True
    largest_batch = 8

    def recognize(self, samples: Samples) -> Recognition:
        assert not self.closed
        if self.failing is not None:
            raise self.failing
        return Recognition(self.engine, (), 1.0, engine=self.engine)

    def recognize_batch(self, batch: Sequence[Samples]) -> list[Recognition]:
        return [self.recognize(samples) for samples in batch]

    def close(self) -> None:
        self.closed += 1
        if self.unreleasable is not None:
            raise self.unreleasable


class Rungs:
    """Rungs whose loading is counted and may fail."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.engines = {name: Told(name) for name in names}
        self.failures: dict[str, Exception] = {}
        self.loads: list[str] = []

    def all(self) -> list[Rung]:
        def loading(name: str) -> Callable[[], LoadedEngine]:
            def load() -> LoadedEngine:
                self.loads.append(name)
                if name in self.failures:
                    raise self.failures[name]
                return self.engines[name]

            return load

        return [Rung(name, loading(name)) for name in self.names]


@pytest.fixture
def rungs() -> Rungs:
    return Rungs(TENSORRT, "onnx-cuda", "onnx-int8")


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"edge_asr_{name}_total", labels) or 0.0


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_first_rung_answers_and_the_others_are_not_even_loaded(
    rungs: Rungs, caplog: pytest.LogCaptureFixture
) -> None:
    ladder = Ladder(rungs.all())
    assert (ladder.engine, ladder.why) == (TENSORRT, "")
    assert ladder.recognize(SOUND).engine == TENSORRT
    assert [one.engine for one in ladder.recognize_batch([SOUND, SOUND])] == [TENSORRT, TENSORRT]
    assert rungs.loads == [TENSORRT]
    assert caplog.messages == []


@pytest.mark.parametrize("failure", [EngineError("a library is missing; install it"), BundleError("of another size")])
def test_a_rung_that_cannot_be_loaded_is_passed_with_one_warning(
    rungs: Rungs, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    before = count("engine_steps_down", engine=TENSORRT)
    rungs.failures = {TENSORRT: failure}
    ladder = Ladder(rungs.all())
    assert ladder.engine == ladder.recognize(SOUND).engine == "onnx-cuda"
    assert ladder.why == f"{TENSORRT} cannot be used: {failure}"
    assert warnings(caplog) == [f"onnx-cuda answers instead of {TENSORRT}: {failure}"]
    assert count("engine_steps_down", engine=TENSORRT) == before + 1


def test_each_rung_that_is_passed_has_a_line_and_the_first_is_the_reason(
    rungs: Rungs, caplog: pytest.LogCaptureFixture
) -> None:
    rungs.failures = {TENSORRT: EngineError("one"), "onnx-cuda": EngineError("two")}
    ladder = Ladder(rungs.all())
    assert (ladder.engine, ladder.why) == ("onnx-int8", f"{TENSORRT} cannot be used: one")
    assert warnings(caplog) == [
        f"onnx-int8 answers instead of {TENSORRT}: one",
        "onnx-int8 answers instead of onnx-cuda: two",
    ]


def test_an_engine_that_nobody_has_built_yet_is_no_cause_for_concern(
    rungs: Rungs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rungs.failures = {TENSORRT: UnfitError("holds no engine", "")}
    Ladder(rungs.all())
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_where_the_bundle_is_to_blame_there_is_its_error_and_no_warning(
    rungs: Rungs, caplog: pytest.LogCaptureFixture
) -> None:
    rungs.failures = dict.fromkeys(rungs.names, BundleError("the token list is another's"))
    with pytest.raises(BundleError, match="the token list is another's"):
        Ladder(rungs.all())
    assert caplog.messages == []


def test_strict_is_an_error_where_the_first_rung_cannot_be_loaded(
    rungs: Rungs, caplog: pytest.LogCaptureFixture
) -> None:
    rungs.failures = {TENSORRT: EngineError("a library is missing; install it")}
    with pytest.raises(EngineError) as caught:
        Ladder(rungs.all(), strict=True)
    assert str(caught.value) == (
        "a library is missing; install it; engine.strict allows nothing less than tensorrt-fp16"
    )
    assert caught.value.exit_code == 3
    assert rungs.loads == [TENSORRT]
    assert caplog.messages == []


def test_strict_with_a_single_rung_says_no_more_than_that() -> None:
    rungs = Rungs("onnx")
    rungs.failures = {"onnx": EngineError("damaged; build it again")}
    with pytest.raises(EngineError, match=r"^damaged; build it again$"):
        Ladder(rungs.all(), strict=True)


@pytest.mark.parametrize("failure", [NotFiniteError("infinite"), EngineError("longer than its profiles")])
def test_what_the_first_rung_fails_on_the_lowest_decodes_again(
    rungs: Rungs, failure: EngineError, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    before = count("decoded_again")
    ladder = Ladder(rungs.all())
    rungs.engines[TENSORRT].failing = failure
    assert [ladder.recognize(SOUND).engine for _ in range(3)] == ["onnx-int8"] * 3
    rungs.engines[TENSORRT].failing = None
    assert ladder.recognize(SOUND).engine == ladder.engine == TENSORRT
    assert (ladder.why, rungs.loads) == ("", [TENSORRT, "onnx-int8"]), "it is loaded once and kept"
    assert count("decoded_again") == before + 3
    assert warnings(caplog) == [f"{TENSORRT} failed on a segment, which onnx-int8 decoded again: {failure}"]
    assert len(caplog.records) == 3
    ladder.close()
    assert [rungs.engines[name].closed for name in rungs.names] == [1, 0, 1]


def test_while_a_lesser_engine_is_loaded_for_what_one_failed_on_the_ladder_says_so(rungs: Rungs) -> None:
    seen: list[bool] = []
    best, lesser = rungs.all()[0], rungs.all()[-1]

    def load() -> LoadedEngine:
        seen.append(ladder.loading)
        return lesser.load()

    ladder = Ladder([best, Rung(lesser.name, load)])
    rungs.engines[TENSORRT].failing = BrokenEngineError("the GPU fell off the bus")
    assert not ladder.loading
    ladder.recognize(SOUND)
    assert (seen, ladder.loading) == ([True], False)


def test_several_segments_are_not_taken_to_a_lesser_engine_for_one_that_is_bad(rungs: Rungs) -> None:
    ladder = Ladder(rungs.all())
    rungs.engines[TENSORRT].failing = EngineError("one of them is bad")
    with pytest.raises(EngineError, match="one of them is bad"):
        ladder.recognize_batch([SOUND, SOUND])
    assert rungs.loads == [TENSORRT]
    rungs.engines[TENSORRT].failing = BrokenEngineError("the GPU fell off the bus")
    assert [one.engine for one in ladder.recognize_batch([SOUND, SOUND])] == ["onnx-int8"] * 2


def test_whether_segments_share_a_run_is_up_to_the_engine_that_answers(rungs: Rungs) -> None:
    ladder = Ladder(rungs.all())
    rungs.engines["onnx-int8"].batches = False
    assert ladder.batches
    assert ladder.largest_batch == 8
    rungs.engines[TENSORRT].failing = BrokenEngineError("the GPU fell off the bus")
    ladder.recognize(SOUND)
    assert not ladder.batches


def test_what_both_fail_on_is_the_lowers_error(rungs: Rungs) -> None:
    ladder = Ladder(rungs.all())
    rungs.engines[TENSORRT].failing = NotFiniteError("infinite")
    rungs.engines["onnx-int8"].failing = EngineError("here, too")
    before = count("decoded_again")
    with pytest.raises(EngineError, match="here, too"):
        ladder.recognize(SOUND)
    assert count("decoded_again") == before


def test_a_broken_engine_is_left_for_good_and_nothing_is_lost(rungs: Rungs, caplog: pytest.LogCaptureFixture) -> None:
    changes: list[str] = []
    before = count("engine_steps_down", engine=TENSORRT)
    ladder = Ladder(rungs.all(), changed=lambda: changes.append(ladder.engine))
    rungs.engines[TENSORRT].failing = BrokenEngineError("the GPU fell off the bus")
    assert [ladder.recognize(SOUND).engine for _ in range(2)] == ["onnx-int8"] * 2
    assert (ladder.engine, ladder.why) == ("onnx-int8", f"{TENSORRT} cannot be used: the GPU fell off the bus")
    assert rungs.loads == [TENSORRT, "onnx-int8"], "nothing else in this process could use the GPU"
    assert warnings(caplog) == [f"onnx-int8 answers instead of {TENSORRT}: the GPU fell off the bus"]
    assert (changes, count("engine_steps_down", engine=TENSORRT)) == (["onnx-int8"], before + 1)
    assert rungs.engines[TENSORRT].closed == 1
    ladder.close()
    assert [rungs.engines[name].closed for name in rungs.names] == [1, 0, 1]


def test_a_broken_engine_that_cannot_be_released_is_left_all_the_same(rungs: Rungs) -> None:
    ladder = Ladder(rungs.all())
    told = rungs.engines[TENSORRT]
    told.failing, told.unreleasable = BrokenEngineError("broken"), EngineError("nor released")
    assert ladder.recognize(SOUND).engine == "onnx-int8"


def test_the_engine_that_decoded_again_takes_over_from_a_broken_one(rungs: Rungs) -> None:
    ladder = Ladder(rungs.all())
    rungs.engines[TENSORRT].failing = NotFiniteError("infinite")
    ladder.recognize(SOUND)
    rungs.engines[TENSORRT].failing = BrokenEngineError("broken")
    ladder.recognize(SOUND)
    assert rungs.loads == [TENSORRT, "onnx-int8"]
    ladder.close()
    assert rungs.engines["onnx-int8"].closed == 1


@pytest.mark.parametrize("kind", [NotFiniteError, BrokenEngineError])
def test_strict_leaves_an_error_an_error(rungs: Rungs, kind: type[EngineError]) -> None:
    ladder = Ladder(rungs.all(), strict=True)
    rungs.engines[TENSORRT].failing = kind("on purpose")
    with pytest.raises(kind, match="on purpose"):
        ladder.recognize(SOUND)
    assert rungs.loads == [TENSORRT]


@pytest.mark.parametrize("kind", [NotFiniteError, BrokenEngineError])
def test_where_nothing_below_can_be_loaded_the_error_tells_both(rungs: Rungs, kind: type[EngineError]) -> None:
    ladder = Ladder(rungs.all())
    rungs.engines[TENSORRT].failing = kind("on purpose")
    rungs.failures = {"onnx-int8": BundleError("the bundle is gone")}
    with pytest.raises(kind, match=r"^on purpose; and onnx-int8 cannot be loaded: the bundle is gone$"):
        ladder.recognize(SOUND)
    rungs.failures = {}
    assert ladder.recognize(SOUND).engine == "onnx-int8", "it is tried again with the next segment"


@pytest.mark.parametrize("kind", [NotFiniteError, BrokenEngineError])
def test_the_lowest_rung_has_nothing_below_it(rungs: Rungs, kind: type[EngineError]) -> None:
    rungs.failures = {TENSORRT: EngineError("one"), "onnx-cuda": EngineError("two")}
    ladder = Ladder(rungs.all())
    rungs.engines["onnx-int8"].failing = kind("on purpose")
    with pytest.raises(kind, match="on purpose"):
        ladder.recognize(SOUND)


def test_a_ladder_for_a_swap_takes_the_first_rung_or_none_but_may_step_down_later(rungs: Rungs) -> None:
    rungs.failures = {TENSORRT: EngineError("damaged")}
    with pytest.raises(EngineError, match=r"^damaged$"):
        Ladder(rungs.all(), only_first=True)
    rungs.failures = {}
    ladder = Ladder(rungs.all(), only_first=True)
    rungs.engines[TENSORRT].failing = BrokenEngineError("broken")
    assert ladder.recognize(SOUND).engine == "onnx-int8"
