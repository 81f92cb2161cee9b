"""What `bench idle` prints."""

from __future__ import annotations

import json

from edge_asr.bench.idle import idle
from edge_asr.config import Config
from edge_asr.errors import EdgeAsrError


def bench_idle(config: Config, minutes: float, as_json: bool) -> EdgeAsrError | None:
    """Measure and print; return what was heard in the noise, as an error. Raises what `idle` raises."""
    figures = idle(config, minutes)
    if as_json:
        print(json.dumps(figures), flush=True)
    else:
        slope = figures["slope_mb_per_h"]
        trend = "" if slope is None else f", {slope:+.2f} (within {2 * figures['slope_error_mb_per_h']:.2f}) MB an hour"
        print(
            f"{figures['model']} on {figures['engine']}, {figures['seconds']:.0f} s of noise:"
            f" {figures['cpu_share']:.1%} of a core, woken up {figures['wakeups_per_s']:.0f} times a second,"
            f" {figures['rss_end_mb']:.0f} MB{trend}",
            flush=True,
        )
    if figures["transcripts"]:
        return EdgeAsrError(f"{figures['transcripts']} transcripts of noise; raise segment.threshold or the gates")
    return None
