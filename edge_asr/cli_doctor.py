"""What `doctor` prints: a line for each check, its remedy below, and the verdict; or all of it as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from edge_asr.config import Config
from edge_asr.doctor.examination import examine
from edge_asr.doctor.report import Report, Result, Status

STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
INDENT = " " * 6


def show(read: Callable[[], Config], as_json: bool) -> int:
    """Examine this machine, print the report, and return the exit code; `read` may raise ConfigError."""
    report = examine(read)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
        return report.exit_code
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    width = max(len(result.name) for result in report.results)
    for result in report.results:
        console.print(_lines(result, width))
    console.print(_verdict(report))
    return report.exit_code


def _lines(result: Result, width: int) -> Text:
    finding = result.finding
    first, *more = finding.found.splitlines() or [""]
    text = Text.assemble((f"{finding.status:<5}", STYLES[finding.status]), f" {result.name:<{width}}  {first}")
    for line in more:
        text.append(f"\n{INDENT}{'':<{width}}  {line}")
    if finding.remedy:
        text.append(f"\n{INDENT}{'':<{width}}  -> {finding.remedy}", style="bold")
    return text


def _verdict(report: Report) -> Text:
    counts = {status: [r.finding.status for r in report.results].count(status) for status in STYLES}
    warnings = f"{counts['warn']} warning{'' if counts['warn'] == 1 else 's'}"
    if counts["fail"]:
        failures = f"{counts['fail']} check{'' if counts['fail'] == 1 else 's'} failed"
        return Text(f"This machine is not ready: {failures}, {warnings}.", style=STYLES["fail"])
    return Text(f"This machine is ready, {warnings if counts['warn'] else 'without warnings'}.", style=STYLES["ok"])
