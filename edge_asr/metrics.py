"""All metrics in one place.

Names are `edge_asr_<what>_<unit>`, counters end in `_total`, and label values exist from the start, but for stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Info, Metric
from prometheus_client.registry import Collector

SEGMENTS = Counter("edge_asr_segments", "Segments cut out of the sources.")
TRANSCRIPTS = Counter("edge_asr_transcripts", "Transcripts offered to the sinks.")
GATED = Counter("edge_asr_gated", "Segments not published, by the gate that dropped them.", ["gate"])
FAILED = Counter("edge_asr_failed", "Segments lost because the engine failed on them.")
CUT_SHORT = Counter("edge_asr_cut_short", "Segments dropped because sound was missing in the middle of them.")
LATE = Counter("edge_asr_late", "Transcripts published later than the budget allows.")
DECODED_AT_PAUSE = Counter("edge_asr_decoded_at_pause", "Transcripts whose decoding began before their segment ended.")
ENFORCED = Counter("edge_asr_enforced", "What was done to keep to the latency budget, by the step.", ["step"])
STEPS = ("split", "not_at_pause", "partial_skipped", "interrupted", "cut", "batched", "lost")
PARTIALS = Counter("edge_asr_partials", "Partials offered to the sinks.")
UNADDRESSED = Counter("edge_asr_unaddressed", "Segments that were not for us, by the mode of listening.", ["mode"])
DROPPED_SAID = Counter("edge_asr_dropped_said", "Transcripts not published for acting: broker away, or too old.")
DROPPED_TRANSCRIPTS = Counter("edge_asr_dropped_transcripts", "Transcripts given up before the broker had them.")
OUTBOX_ROWS = Gauge("edge_asr_outbox_rows", "Transcripts kept, acknowledged ones included.")
OUTBOX_PENDING = Gauge("edge_asr_outbox_pending", "Transcripts that the broker has not acknowledged.")
OUTBOX_OLDEST = Gauge("edge_asr_outbox_oldest_seconds", "Age of the oldest transcript not acknowledged; or 0.")
OUTBOX_REFUSED = Counter("edge_asr_outbox_refused", "Transcripts set aside because the broker will never take them.")
OUTBOX_SYNC = Histogram(
    "edge_asr_outbox_sync_seconds",
    "What it takes to put transcripts on stable storage.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
ACKNOWLEDGEMENT = Histogram(
    "edge_asr_acknowledgement_seconds",
    "From the publication of a transcript to its acknowledgement by the broker.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
RESPONSE = Histogram(
    "edge_asr_response_seconds",
    "From the end of a segment to its publication.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10),
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
STAGE = Histogram(
    "edge_asr_stage_seconds",
    "Where the time of a transcript went, by where the transcript went and by the stage.",
    ["surface", "stage"],
    buckets=_SECONDS,
)
REQUEST = Histogram(
    "edge_asr_request_seconds", "From when a request of the network was let in to its answer.", buckets=_SECONDS
)
REQUESTS = Gauge("edge_asr_requests_in_progress", "Requests of the network that were let in and are not answered.")
STREAMS = Gauge("edge_asr_streams", "Streams of the network that are listened to.")
WAITING = Gauge("edge_asr_waiting_requests", "Segments, partials included, that wait for the engine.")
BATCH = Histogram("edge_asr_batch_segments", "Segments that shared a run.", buckets=(1, 2, 4, 8, 16, 32))
RECOGNIZED = Counter("edge_asr_recognized_audio_seconds", "Sound that the engine was given, partials included.")
INFERENCE = Counter("edge_asr_inference_seconds", "What that took; by the sound it is the real-time factor.")

STATE = Gauge("edge_asr_state", "1 for the state that the appliance is in, 0 for the others.", ["state"])
STATES = ("starting", "ready", "degraded")
BROKER_UP = Gauge("edge_asr_broker_up", "1 while the broker is there, 0 while it is not, NaN where none is wanted.")
MODEL = Info("edge_asr_model", "The model that answers.")
BUILD = Info("edge_asr_build", "The program.")

REFUSED = Counter("edge_asr_requests_refused", "Requests of the network not let in, by the reason.", ["reason"])

ENGINE = Gauge("edge_asr_engine", "1 for the engine that answers, 0 for the others.", ["engine"])
STEPS_DOWN = Counter("edge_asr_engine_steps_down", "Engines left for a lesser one, by the engine.", ["engine"])
DECODED_AGAIN = Counter("edge_asr_decoded_again", "Segments that an engine failed on and a lesser one decoded.")
ENGINES = ("tensorrt-fp16", "onnx-cuda", "onnx-fp32", "onnx-int8")

_SOURCE = ["source"]
MICROPHONE_UP = Gauge("edge_asr_microphone_up", "1 while sound comes, NaN while it is muted, else 0.", _SOURCE)
MICROPHONE_GAPS = Counter("edge_asr_microphone_gaps", "Gaps in the sound of a microphone that have ended.", _SOURCE)
MICROPHONE_LOST = Counter("edge_asr_microphone_lost_seconds", "Sound that is missing in those gaps.", _SOURCE)
MICROPHONE_OVERRUNS = Counter("edge_asr_microphone_overruns", "Times that a device was not read in time.", _SOURCE)
MICROPHONE_DROPPED = Counter(
    "edge_asr_microphone_dropped_chunks", "Chunks dropped because the recogniser fell behind for too long.", _SOURCE
)
MICROPHONE_DRIFT = Gauge("edge_asr_microphone_drift_ppm", "How much slow a clock is, NaN until that is known.", _SOURCE)
MICROPHONE_CLIPPED = Gauge("edge_asr_microphone_clipped_ratio", "Share of samples at full scale, of 10 s.", _SOURCE)
MICROPHONE = (
    MICROPHONE_UP, MICROPHONE_GAPS, MICROPHONE_LOST, MICROPHONE_OVERRUNS, MICROPHONE_DROPPED, MICROPHONE_DRIFT,
    MICROPHONE_CLIPPED,
)  # fmt: skip

for _gate in ("empty", "confidence", "speech_ratio", "rate", "steadiness"):
    GATED.labels(_gate)
for _step in STEPS:
    ENFORCED.labels(_step)
for _reason in ("requests", "wait"):
    REFUSED.labels(_reason)
for _state in STATES:
    STATE.labels(_state)
for _mode in ("push_to_talk", "phrase"):
    UNADDRESSED.labels(_mode)
for _engine in ENGINES:
    ENGINE.labels(_engine)
for _engine in ENGINES[:2]:
    STEPS_DOWN.labels(_engine)


def show_engine(name: str) -> None:
    """Say which engine answers."""
    for engine in ENGINES:
        ENGINE.labels(engine).set(engine == name)


def show_state(state: str) -> None:
    """Say how the appliance is."""
    for known in STATES:
        STATE.labels(known).set(known == state)


def observe_stages(surface: str, latency_ms: Mapping[str, float]) -> None:
    """Count where the time of a transcript went."""
    for stage, milliseconds in latency_ms.items():
        STAGE.labels(surface, stage).observe(milliseconds / 1e3)


class Sampled(Collector):
    """Metrics that are there only as long as something is known, for a missing sensor is absent and never zero."""

    def __init__(self) -> None:
        self.families: tuple[Metric, ...] = ()
        """What was read last; replaced as a whole."""

    def collect(self) -> Iterator[Metric]:
        """Yield what was read last."""
        yield from self.families


DEVICE = Sampled()
REGISTRY.register(DEVICE)
