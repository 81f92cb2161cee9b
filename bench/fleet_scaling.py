"""How many replicas there are to be: Kubernetes' horizontal autoscaler with the rules of our manifest."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scaling:
    """deploy/kubernetes/base/horizontalpodautoscaler.yaml, and what a replica needs to start."""

    least: int = 2
    most: int = 10
    cpu: float = 0.70
    p95_s: float = 0.7
    cpu_of_busy: float = 0.9
    """Processor used of what is requested, where the replica is always busy: 1.2 of 2 cores at 12.05 of 18 a second."""
    tolerance: float = 0.1
    every_s: float = 15.0
    cpu_over_s: float = 30.0
    p95_over_s: float = 120.0
    up_window_s: float = 30.0
    up_share: float = 1.0
    up_pods: int = 2
    up_period_s: float = 60.0
    down_window_s: float = 600.0
    down_pods: int = 1
    down_period_s: float = 300.0
    start_s: float = 30.0


class Autoscaler:
    """Kubernetes' horizontal one, for the measures of Scaling."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self._busy: deque[float] = deque(maxlen=max(1, round(scaling.cpu_over_s / scaling.every_s)))
        self._wanted: deque[tuple[float, int]] = deque()
        self._had: deque[tuple[float, int]] = deque()

    def decide(self, now: float, ready: int, starting: int, busy: float, p95_s: float) -> int:
        """Return how many replicas there are to be."""
        rules, present = self.scaling, ready + starting
        self._busy.append(busy)
        cpu = rules.cpu_of_busy * sum(self._busy) / len(self._busy)
        ratio = max(cpu / rules.cpu, p95_s / rules.p95_s)
        wanted = present if abs(ratio - 1) <= rules.tolerance else math.ceil(ready * ratio)
        # While replicas start, those that are ready work for them too: fewer are not needed.
        wanted = max(wanted, present) if starting else wanted
        if not self._wanted:
            self._wanted.append((now, present))
        self._wanted.append((now, wanted))
        self._had.append((now, present))
        longest_s = max(rules.up_window_s, rules.down_window_s, rules.up_period_s, rules.down_period_s)
        for kept in (self._wanted, self._had):
            while kept[0][0] < now - longest_s:
                kept.popleft()
        up = min(value for at, value in self._wanted if at >= now - rules.up_window_s)
        down = max(value for at, value in self._wanted if at >= now - rules.down_window_s)
        chosen = up if up > present else min(down, present)
        if chosen > present:
            before = min(value for at, value in self._had if at >= now - rules.up_period_s)
            chosen = min(chosen, max(math.ceil(before * (1 + rules.up_share)), before + rules.up_pods))
            chosen = max(chosen, present)
        elif chosen < present:
            before = max(value for at, value in self._had if at >= now - rules.down_period_s)
            chosen = min(present, max(chosen, before - rules.down_pods))
        return max(rules.least, min(rules.most, chosen))
