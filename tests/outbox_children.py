"""Programs that tests of the outbox run as processes of their own: `python outbox_children.py NAME FOLDER ...`."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from edge_asr.config_mqtt import OutboxConfig
from edge_asr.publish import outbox_sync
from edge_asr.publish.outbox import DiskOutbox

PAYLOAD = json.dumps({"text": "打开客厅灯" * 40}, ensure_ascii=False)


def add(folder: str, prefix: str) -> None:
    """Record without end; say each id once it is recorded."""
    outbox = DiskOutbox(OutboxConfig(), Path(folder) / "outbox.sqlite3")
    number = 0
    while True:
        number += 1
        outbox.add([(f"{prefix}-{number}", PAYLOAD)])
        sys.stdout.write(f"{prefix}-{number}\n")
        sys.stdout.flush()
        if number % 20 == 0:
            outbox.tend(online=number % 40 == 0)


def measure(folder: str, count: str, pause_ms: str, checkpoint_bytes: str) -> None:
    """Record and acknowledge `count` rows while the broker answers; say how long each took, by which thread."""
    outbox_sync.CHECKPOINT_BYTES = int(checkpoint_bytes)
    outbox_sync.IDLE_S = 1.0
    outbox = DiskOutbox(OutboxConfig(), Path(folder) / "outbox.sqlite3")
    started, took = time.monotonic(), []
    for number in range(int(count)):
        before = time.monotonic()
        rows = outbox.add([(f"id-{number}", PAYLOAD)])
        outbox.acknowledge(rows)
        outbox.tend(online=True)
        took.append(time.monotonic() - before)
        time.sleep(int(pause_ms) / 1000)
    ended = time.monotonic()
    answer = {"thread": threading.get_native_id(), "started": started, "ended": ended, "took": took}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    outbox.close()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
