"""What became of every sentence of an overload: answered in order, late, lost, or passed over in silence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edge_asr.speech.segmenter import Rules
from edge_asr.types import CHUNK_S, CHUNK_SAMPLES, SAMPLE_RATE

if TYPE_CHECKING:
    from bench.overload import Arrival, Observed, Sentence

OVERLOAD = 1
"""The phase that is one."""
ENDPOINT = Rules().endpoint
METERED = "metered"
"""The engine whose text is the number of the sentence."""


def figures(observed: Observed) -> dict[str, Any]:
    """Return everything that can be counted, by name."""
    arrivals, sentences = observed.arrivals, sum(map(len, observed.plan))
    answered = Counter(_sentence_of(observed, arrival) for arrival in arrivals)
    return {
        "load": observed.setting.phases[OVERLOAD].load,
        "load_after": observed.setting.phases[-1].load,
        "streams": observed.setting.streams,
        "max_backlog_s": observed.setting.max_backlog_s,
        "cost": round(observed.setting.cost, 4),
        "sentences": sentences,
        "segments": observed.segments,
        "transcripts": sum(not arrival.transcript.lost for arrival in arrivals),
        "lost": sum(arrival.transcript.lost for arrival in arrivals),
        "counted_lost": observed.counted_lost,
        "late": sum(is_late(arrival) for arrival in arrivals),
        "late_without_flag": sum(_unflagged(observed, arrival) for arrival in arrivals),
        "out_of_order": out_of_order(arrivals),
        "gated": observed.gated,
        "silent": sentences - observed.gated - sum(place is not None for place in answered),
        "doubled": sum(count - 1 for place, count in answered.items() if place is not None) + answered[None],
        "wrong_text": sum(_is_wrong(observed, arrival) for arrival in arrivals),
        "partials": observed.partials,
        "partials_after_final": observed.partials_too_late,
        "enforced": {step: count for step, count in observed.enforced.items() if count},
        **_work(observed),
        **_backlog(observed),
        **_memory(observed),
        **_recovery(observed),
    }


def is_late(arrival: Arrival) -> bool:
    """Tell whether it is a transcript that came later than the budget allows."""
    return not arrival.transcript.lost and arrival.transcript.within_budget is False


def out_of_order(arrivals: Iterable[Arrival]) -> int:
    """Return how many came after one that was said later by the same voice."""
    places: dict[str, list[float]] = defaultdict(list)
    for arrival in arrivals:
        places[arrival.transcript.source].append(arrival.transcript.offset_s or 0.0)
    return sum(later <= earlier for source in places.values() for earlier, later in pairwise(source))


def most_waiting_s(arrivals: Iterable[Arrival]) -> float:
    """Return the most seconds of sound that had ended and were not answered yet, at any moment."""
    changes = []
    for arrival in arrivals:
        assert arrival.transcript.marks is not None  # the voices are live
        changes.append((arrival.transcript.marks.segment_ended_at, arrival.transcript.duration_s))
        changes.append((arrival.at, -arrival.transcript.duration_s))
    waiting = most = 0.0
    for _, change in sorted(changes):
        waiting += change
        most = max(most, waiting)
    return most


def most_waiting_of_one_s(arrivals: Sequence[Arrival]) -> float:
    """Return the same of the voice that had the most."""
    sources = {arrival.transcript.source for arrival in arrivals}
    return max(
        (most_waiting_s(one for one in arrivals if one.transcript.source == name) for name in sources), default=0
    )


def _sentence_of(observed: Observed, arrival: Arrival) -> tuple[int, int] | None:
    """Return voice and number of the sentence in the middle of a transcript; None where it is of none."""
    stream, transcript = int(arrival.transcript.source.split()[1]), arrival.transcript
    middle = ((transcript.offset_s or 0.0) + transcript.duration_s / 2) / CHUNK_S
    found = [one for one in observed.plan[stream] if one.start <= middle < one.start + one.length]
    return (stream, found[0].number) if found and _covers(arrival, found[0]) else None


def _covers(arrival: Arrival, sentence: Sentence) -> bool:
    start = round((arrival.transcript.offset_s or 0.0) * SAMPLE_RATE / CHUNK_SAMPLES)
    end = start + round(arrival.transcript.duration_s / CHUNK_S)
    return start <= sentence.start and sentence.start + sentence.length <= end


def _is_wrong(observed: Observed, arrival: Arrival) -> bool:
    place, transcript = _sentence_of(observed, arrival), arrival.transcript
    tells = transcript.engine == METERED  # what a model makes of noise tells nothing
    return not transcript.lost and (place is None or (tells and transcript.text != str(place[1])))


def _unflagged(observed: Observed, arrival: Arrival) -> bool:
    """Tell whether it came later than the budget allows, as the clock on the wall has it, and does not say so."""
    place = _sentence_of(observed, arrival)
    if place is None or arrival.transcript.lost or is_late(arrival):
        return False
    sentence, speed = observed.plan[place[0]][place[1] - 1], observed.setting.speed
    ended_s = (sentence.start + sentence.length + ENDPOINT) * CHUNK_S / speed
    return arrival.at - observed.began_at - ended_s > 2 * observed.setting.response_ms / 1e3


def _work(observed: Observed) -> dict[str, float]:
    """Return how much of the overload the recogniser worked, and how much for what was published; not of a model."""
    if not observed.runs:
        return {}
    setting = observed.setting
    start, end = (observed.began_at + setting.starts_at(phase) for phase in (OVERLOAD, OVERLOAD + 1))
    busy_s = sum(seconds for ended_at, seconds in observed.runs if start <= ended_at < end)
    found = [one.transcript for one in observed.arrivals if start <= one.at < end and not one.transcript.lost]
    useful_s = sum(transcript.duration_s for transcript in found) * setting.cost / setting.speed
    return {"busy_share": round(busy_s / (end - start), 3), "useful_share": round(useful_s / (end - start), 3)}


def _backlog(observed: Observed) -> dict[str, float]:
    return {
        "most_waiting_s": round(most_waiting_s(observed.arrivals), 1),
        "most_waiting_of_one_s": round(most_waiting_of_one_s(observed.arrivals), 1),
        "most_backlog_ms": round(max(sample.backlog_ms for sample in observed.samples)),
    }


def _memory(observed: Observed) -> dict[str, float]:
    sizes = [sample.rss_bytes / 1e6 for sample in observed.samples]
    return {"mb_before": round(sizes[0], 1), "mb_most": round(max(sizes), 1), "mb_after": round(sizes[-1], 1)}


def _recovery(observed: Observed) -> dict[str, Any]:
    """Return how long after the overload the first answer was in time, all were, and `state` said so."""
    setting = observed.setting
    over_at = observed.began_at + setting.starts_at(OVERLOAD + 1)
    during = [one for one in observed.arrivals if observed.began_at + setting.starts_at(OVERLOAD) <= one.at < over_at]
    after = [arrival for arrival in observed.arrivals if arrival.at >= over_at]
    in_time = [one.at for one in after if not one.transcript.lost and not is_late(one)]
    not_well = [one.at for one in after if one.transcript.lost or is_late(one)]
    told = [one.at for one in after if one.why]
    return {
        "in_time_in_the_overload": sum(not one.transcript.lost and not is_late(one) for one in during),
        "first_in_time_s": round(in_time[0] - over_at, 1) if in_time else None,
        "all_in_time_s": round(not_well[-1] - over_at, 1) if not_well else 0.0,
        "state_well_s": round(told[-1] - over_at, 1) if told else 0.0,
        "why": next((one.why for one in reversed(during) if one.why), ""),
        "why_at_the_end": observed.arrivals[-1].why if observed.arrivals else "",
    }
