"""What an examination finds: one result a check, and the verdict over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_asr import __version__

SCHEMA = "edge_asr.doctor/1"
Status = Literal["ok", "warn", "fail"]
"""ok: as it should be, or not needed; warn: it runs, but less well than it could; fail: it does not run."""
SEVERITY: dict[Status, int] = {"ok": 0, "warn": 1, "fail": 2}
EXIT_CODES = (2, 3, 1)
"""Of checks that fail, the one that is first here is the exit code: each may be the cause of the later ones."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    status: Status
    found: str
    """One line as a rule."""
    remedy: str | None = None
    """What must be done; None where it is ok."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finding with the name of its check."""

    name: str
    """The same in every release."""
    finding: Finding
    exit_code: int
    """What the program ends with if this has failed."""

    def to_json(self) -> dict[str, Any]:
        """Return name, status, what was found, and the remedy (null where it is ok)."""
        found = self.finding
        return {"name": self.name, "status": found.status, "found": found.found, "remedy": found.remedy}


@dataclass(frozen=True, slots=True)
class Report:
    """All results, in the order of the checks."""

    results: Sequence[Result]

    @property
    def verdict(self) -> Status:
        """The worst status."""
        return max((result.finding.status for result in self.results), key=SEVERITY.__getitem__, default="ok")

    @property
    def exit_code(self) -> int:
        """0 where nothing has failed, else 2 (configuration), 3 (model or engine) or 1 (anything else)."""
        failed = {result.exit_code for result in self.results if result.finding.status == "fail"}
        return next((code for code in EXIT_CODES if code in failed), 0)

    def to_json(self) -> dict[str, Any]:
        """Return the report as one object, with the name of its schema."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "checks": [result.to_json() for result in self.results],
        }


def ok(found: str) -> Finding:
    """Return that all is well."""
    return Finding("ok", found)


def warn(found: str, remedy: str) -> Finding:
    """Return that it runs, but not as well as it could."""
    return Finding("warn", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    """Return that it does not run."""
    return Finding("fail", found, remedy)


def lacking(need: Status, found: str, remedy: str) -> Finding:
    """Return that something is not there, or unfit; `need` is how bad that is, ok: it is not needed."""
    return Finding(need, found if need != "ok" else f"{found}; not needed here", None if need == "ok" else remedy)
