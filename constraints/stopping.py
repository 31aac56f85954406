"""When a trial may end before its last step: its certificate is tight, or its thresholds are out of reach.

Both are judged from the rows of the dual steps so far, by every worker alike, so that a resumed run and one without Ray
stop at the same dual step. What training sees is an estimate: the certificate itself is made afterwards, on fresh draws.

Tight, for every constraint: the mean violation lies within the tolerance by one standard error, above and, unless the
multiplier is zero, below (complementary slackness: nothing is paid for room to spare); multiplier and violation have
stopped moving (the dual step stands still, and the model has followed). On the simplex violations count from the level.
A rule that looks at every dual step stops where the noise is kind, so dual steps that look tight only propose the end, and
other draws have to confirm it. Where the caller can draw them (``afresh``), a whole ``window`` proposes, and draws of the
model as it is confirm at once: half a window is too short to tell a run that stands from one that passes by, its multipliers
still on their way. Else half a window proposes, the second half confirms, and both together have to stand still. Without
confirmation the run goes on, and the next proposal needs half a window of later dual steps.

Out of reach, over the last ``patience`` dual steps and for some constraint: its violation stood above the tolerance
throughout, beyond noise, and fell by surely less than ``HOPE`` of itself; its multiplier lay at the guard of its domain, or
grew by ``GROWTH`` and, at what the violation fell for each unit of it, two standard errors on top, would not bring it to the
tolerance even ``HORIZON`` times as large. By duality a multiplier that grows without bound while the violation stays says
that no model of the family meets the threshold (the dual function has no maximum); one that is merely slow goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dualsweep.constraints.checks import checked_count, checked_number
from dualsweep.constraints.courses import ConstraintCourse, courses_of, line
from dualsweep.constraints.domains import DualDomain

FREE = 1e-3  # a multiplier below this is none: its constraint may hold with room to spare
SMALL = 0.1  # multipliers below this part of the largest one may drift as far as one of that size
GROWTH = 0.5  # rise of a multiplier over the patience, relative to its mean there
HORIZON = 10.0  # a multiplier that would have to grow by more than this factor is not on its way anywhere
HOPE = 0.25  # a violation that surely falls less over the patience than this part of itself is not on its way to zero
KEYS = ("dual_step", "multipliers", "violations", "violation_stderrs", "thresholds", "relaxations")


@dataclass(frozen=True)
class Finding:
    """Why a trial ends: ``kind`` is what a result is tagged with, ``evidence`` has the numbers."""

    kind: Literal["certificate", "infeasible"]
    evidence: str
    confirmed: int | None = None  # dual steps, the last ones, that stand for a certificate


class StoppingRule:
    """Looks at one dual step after the other; ``state`` is JSON-able and goes into the checkpoint."""

    def __init__(
        self,
        names: Sequence[str],
        domain: DualDomain,
        *,
        tolerance: float,
        window: int,
        drift: float,
        patience: int,
        pooled: int = 1,
        certificate: bool = True,
        infeasible: bool = True,
        state: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """
        Args:
            names: the constraints, at least one.
            tolerance: > 0, canonical units.
            window: >= 8 dual steps over which a certificate must be tight: they propose it, and draws made for it confirm it;
                without those, half of them propose and half of them confirm.
            drift: > 0, change of a multiplier over the window relative to its mean that still counts as standing.
            patience: > window, dual steps without progress after which thresholds count as out of reach.
            pooled: successive rows whose estimates share draws (``measure.window``).
            certificate, infeasible: which of the two ends a trial.
            state: that of a checkpoint; empty for a run that begins.
        Raises: ValueError naming the field and its range.
        """
        self.names, self.domain = tuple(names), domain
        self.tolerance = checked_number(tolerance, field="stopping.tolerance", above=0)
        self.window = checked_count(window, field="stopping.window", at_least=8)
        self.drift = checked_number(drift, field="stopping.drift", above=0)
        self.patience = checked_count(patience, field="stopping.patience", at_least=self.window + 1)
        self.pooled = checked_count(pooled, field="measure.window", at_least=1)
        self.certificate, self.infeasible = certificate, infeasible
        self._rows: list[dict[str, Any]] = [dict(row) for row in state]

    @property
    def state(self) -> list[dict[str, Any]]:
        """The last rows, as far back as is looked. The newest has in ``proposed`` the dual step of a certificate that waits to be
        confirmed, and in ``refuted`` the last one that was not."""
        return self._rows

    def see(self, row: Mapping[str, Any], afresh: Callable[[], Mapping[str, Any]] | None = None) -> Finding | None:
        """One dual step.

        Args:
            row: of the trace (the entries in ``KEYS``).
            afresh: measures the model of this dual step again, on draws of its own, ``repeats`` times what a row has; gives
                violations and violation_stderrs.
        Returns: why the trial ends, or None.
        """
        last = self._rows[-1] if self._rows else {}
        kept = {key: row[key] for key in KEYS} | {key: last.get(key) for key in ("proposed", "refuted")}
        self._rows = [*self._rows, kept][-max(self.patience, self.whole) :]
        if self.certificate:
            evidence = self._certified_later(kept) if afresh is None else self._certified_now(kept, afresh)
            if evidence:
                return Finding("certificate", evidence, self.confirmed if afresh is None else self.window)
        if self.infeasible and len(self._rows) >= self.patience:
            for name, course in zip(self.names, self._courses(self._rows[-self.patience :]), strict=True):
                evidence = self._out_of_reach(course)
                if evidence:
                    return Finding("infeasible", f"{name}: {evidence}")
        return None

    def _courses(self, rows: list[dict[str, Any]]) -> list[ConstraintCourse]:
        return courses_of(rows, np.array([row["dual_step"] for row in rows]), len(self.names), self.domain)

    @property
    def whole(self) -> int:
        """Dual steps from the first row of a proposal to its confirmation: between them lie rows that share draws."""
        return self.window + self.pooled - 1

    @property
    def confirmed(self) -> int:
        """Dual steps of the half that confirms: the last ones of a run without draws of their own."""
        return self.window - self.window // 2

    @property
    def repeats(self) -> int:
        """How many rows' draws a confirmation has: those of half a window and of what lies between two halves."""
        return self.whole - self.window // 2

    def _proposal(self, length: int) -> list[dict[str, Any]] | None:
        """The last rows, if they look tight and enough of them are later than the last proposal that was refuted."""
        rows, new = self._rows[-length:], self._rows[-(self.window // 2) :]
        if len(rows) < length or new[0]["dual_step"] <= (new[-1]["refuted"] or 0):
            return None
        courses = self._courses(rows)
        return rows if self._worst(courses) is not None and self._still(courses) else None

    def _certified_now(self, kept: dict[str, Any], afresh: Callable[[], Mapping[str, Any]]) -> str | None:
        """The evidence, from draws that are made for it."""
        proposal = self._proposal(self.window)
        if proposal is None:
            return None
        measured = afresh()
        fresh = {**kept, "violations": list(measured["violations"]), "violation_stderrs": list(measured["violation_stderrs"])}
        worst = self._worst(self._courses([fresh]))
        if worst is None:
            kept["refuted"] = kept["dual_step"]
            return None
        return self._told(worst, f"on draws of their own at dual step {kept['dual_step']}", "", proposal)

    def _certified_later(self, kept: dict[str, Any]) -> str | None:
        """The evidence, from later rows. A proposal waits in the newest row."""
        rows, proposed = self._rows, kept["proposed"]
        if proposed is None:
            kept["proposed"] = kept["dual_step"] if self._proposal(self.window // 2) is not None else None
            return None
        if kept["dual_step"] - proposed < self.repeats:
            return None
        kept["proposed"], second = None, rows[-self.confirmed :]
        worst = self._worst(self._courses(second))
        if worst is None or not self._still(self._courses(rows[-self.whole :])):
            return None
        span = f"over dual steps {second[0]['dual_step']} to {second[-1]['dual_step']}"
        return self._told(worst, span, " on average", rows[-self.whole :][: self.window // 2])

    def _worst(self, courses: list[ConstraintCourse]) -> float | None:
        """The largest mean violation (where the multiplier is active, in size); None: not all are within the tolerance."""
        # Rows that share draws: so many rows have (rows + pooled - 1) / pooled times the draws of one.
        share = (self.pooled / (len(courses[0].steps) + self.pooled - 1)) ** 0.5
        worst = 0.0
        for course in courses:
            violation, stderr = float(course.values.mean()), share * course.noise
            multiplier = float(course.multipliers.mean())
            held = violation + stderr <= self.tolerance
            slack = violation - stderr < -self.tolerance and multiplier > FREE
            if not held or slack:
                return None
            worst = max(worst, abs(violation) if multiplier > FREE else violation)
        return worst

    def _still(self, courses: list[ConstraintCourse]) -> bool:
        largest = max(float(course.multipliers.mean()) for course in courses)
        for course in courses:
            multiplier, drifted = float(course.multipliers.mean()), abs(line(course.multipliers)[0])
            change, uncertain = course.change
            moving = abs(change) - uncertain > self.tolerance and (change > 0 or multiplier > FREE)
            if moving or drifted > self.drift * max(multiplier, SMALL * largest, FREE):
                return False
        return True

    def _told(self, worst: float, where: str, how: str, proposal: list[dict[str, Any]]) -> str:
        return (
            f"{where} no active violation was off by more than {worst:.3g}{how} (tolerance {self.tolerance:.3g}), as over the dual "
            f"steps {proposal[0]['dual_step']} to {proposal[-1]['dual_step']}, which proposed this end, and no multiplier moved by "
            f"more than {self.drift:.3g} of itself"
        )

    def _out_of_reach(self, course: ConstraintCourse) -> str | None:
        guarded = course.at_guard.mean() >= 0.5
        if not course.stands(self.tolerance) or not (guarded or course.rise >= GROWTH):
            return None
        (change, stderr), violation = course.change, float(course.values.mean())
        fall = max(-change + 2 * stderr, 0.0)
        if fall >= HOPE * violation:
            return None
        grown, still = line(course.multipliers)[0], violation + change / 2 - self.tolerance
        if not guarded and fall / grown * (HORIZON - 1) * float(course.multipliers[-1]) >= still:
            return None  # in sight: the dual steps are small, or there are few of them
        return (
            f"multiplier went from {course.multipliers[0]:.4g} to {course.multipliers[-1]:.4g} over {course.span}"
            f"{', at the limit of its domain,' if guarded else ''} while the violation, {violation:.4g} on average, changed "
            f"by {change:+.2g} with standard error {stderr:.2g} (tolerance {self.tolerance:.3g})"
        )
