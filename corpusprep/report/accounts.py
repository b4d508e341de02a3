"""Row counts by stage, pair and reason, the check that no row is lost, and the printed tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpusprep.errors import RunError
from corpusprep.report.tables import columns


@dataclass
class Accounts:
    """Rows read, dropped and kept.

    Attributes:
        read: pair -> rows.
        dropped: (stage, pair, reason) -> rows.
        stages: the stages that ran, in order; no other stage may drop rows.
    """

    stages: Sequence[str]
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, read: Mapping[str, int], dropped: Iterable[tuple[str, str, str, int]]) -> None:
        self.read.update(read)
        for stage, pair, reason, count in dropped:
            if stage not in self.stages:  # its rows would be missing from the tables
                raise RunError(
                    f"{reason}: {stage} is not a stage of this run. This is a bug in corpusprep: please report it."
                )
            self.dropped[stage, pair, reason] += count

    def kept(self, pair: str | None = None) -> int:
        """Rows that no stage dropped, of one pair or of all."""
        read = sum(n for p, n in self.read.items() if pair in (None, p))
        return read - sum(n for (_, p, _), n in self.dropped.items() if pair in (None, p))

    def check(self, kept: int, rejected: int) -> None:
        """Compares the counts with the rows that were written.

        Raises:
            RunError: a row is missing or occurs twice.
        """
        read, lost = sum(self.read.values()), sum(self.dropped.values())
        if read != kept + rejected or rejected != lost:
            raise RunError(
                f"The row counts do not add up: {read:,} rows read, {kept:,} kept, {rejected:,} rejected ({lost:,} "
                "counted). Please report this, and start the run again in an empty folder."
            )

    def by_stage(self) -> list[dict[str, Any]]:
        """One entry per stage: rows in, kept, dropped, and the reasons."""
        entries, rows = [], sum(self.read.values())
        for stage in self.stages:
            reasons: Counter[str] = Counter()
            for (name, _, reason), count in self.dropped.items():
                if name == stage:
                    reasons[reason] += count
            lost = sum(reasons.values())
            entry = {"stage": stage, "read": rows, "kept": rows - lost, "dropped": lost}
            entries.append(entry | {"reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))})
            rows -= lost
        return entries

    def by_pair(self) -> list[dict[str, Any]]:
        """One entry per pair: rows read and kept, and the rows that each stage dropped."""
        entries = []
        for pair in sorted(self.read):
            lost: Counter[str] = Counter()
            reasons: Counter[str] = Counter()
            for (stage, name, reason), count in self.dropped.items():
                if name == pair:
                    lost[stage] += count
                    reasons[reason] += count
            entry = {"pair": pair, "read": self.read[pair], "kept": self.kept(pair)}
            entries.append(
                entry | {"dropped": {s: lost[s] for s in self.stages}, "reasons": dict(sorted(reasons.items()))}
            )
        return entries


def summary(accounts: Accounts) -> str:
    """The tables at the end of a run: by stage with reasons, then by pair."""
    stages = [
        (e["stage"], e["read"], e["kept"], e["dropped"], _reasons(e["reasons"], e["stage"]))
        for e in accounts.by_stage()
    ]
    pairs = [(e["pair"], e["read"], *[e["dropped"][s] for s in accounts.stages], e["kept"]) for e in accounts.by_pair()]
    return "\n\n".join(
        [
            columns(stages, ("stage", "rows in", "kept", "dropped", "reasons")),
            columns(pairs, ("pair", "rows", *("malformed" if s == "read" else s for s in accounts.stages), "kept")),
        ]
    )


def mix_line(manifest: Mapping[str, Any], out: Path) -> str:
    """The size of the mix, and how much of the budget it fills."""
    mix, tokens = manifest["mix"], manifest["tokens"]
    lines = [f"{mix['examples']:,} examples, {mix['tokens']:,} tokens ({tokens['counted']}) in {out / 'mix'}"]
    if tokens["budget"]:
        lines.append(f"budget {tokens['budget']:,}, reached {mix['tokens'] / tokens['budget']:.1%}")
        short = (tokens["plan"] or {}).get("short") or {}
        if short:
            lines.append("short of their share: " + ", ".join(f"{pair} by {n:,}" for pair, n in sorted(short.items())))
    return "\n".join(lines)


def _reasons(reasons: Mapping[str, int], stage: str, most: int = 6) -> str:
    shown = [f"{reason.removeprefix(stage + '.')} {count:,}" for reason, count in list(reasons.items())[:most]]
    rest = sum(list(reasons.values())[most:])
    return ", ".join(shown + ([f"others {rest:,}"] if rest else []))
