"""What an initialiser did: every tensor of the model is generated, a named fallback, or kept; together 100 %."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

from generators.errors import ProposalError

Row = TypeVar("Row", str, dict[str, float])


@dataclass(frozen=True)
class InitReport:
    """The account of one initialisation. The three dicts have disjoint keys that together are the model's state dict.

    Attributes:
        initialiser: the chain that ran, such as `"he+lsuv"`.
        seed: the root seed.
        member: which member of the population that `seed` names.
        generated: tensor name -> the initialiser that filled it.
        fallbacks: tensor name -> which simpler initialiser filled it, and why.
        kept: tensor name -> why the value that was there is still there.
        statistics: tensor name -> figures measured on the written value (`std`, `target_std`, `std_ratio`, ...), and
            what refining steps did to it, the last one of those that tell: `std_before`, `std_after`, `scale`, ...
        figures: step of the chain -> figures of the step as a whole (`iterations`, `layers`, ...).
        seconds: step of the chain -> time that its proposal took, by the clock, without a trace that steps share and
            what a GPU has still to do; reports are equal whatever it is.
        notes: what the user should know and no tensor carries, such as a width far outside the training range.
    """

    initialiser: str
    seed: int
    member: int
    generated: dict[str, str]
    fallbacks: dict[str, str]
    kept: dict[str, str]
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)

    def check(self, names: set[str]) -> None:
        """Raise `ProposalError` unless the three dicts partition `names`."""
        groups = [set(self.generated), set(self.fallbacks), set(self.kept)]
        union = set().union(*groups)
        if union != names or sum(map(len, groups)) != len(union):
            lost, extra = sorted(names - union), sorted(union - names)
            raise ProposalError(
                f"{self.initialiser}: the report does not account for every tensor exactly once "
                f"(missing {lost[:5]}, not in the model {extra[:5]}); this is a fault of the initialiser, please tell"
            )

    def renamed(self, names: Mapping[str, str]) -> InitReport:
        """The same with other names of tensors, those of a model with wrappers."""

        def outside(table: dict[str, Row]) -> dict[str, Row]:
            return {names[name]: row for name, row in table.items()}

        return replace(
            self, generated=outside(self.generated), fallbacks=outside(self.fallbacks), kept=outside(self.kept),
            statistics=outside(self.statistics),
        )  # fmt: skip

    @property
    def coverage(self) -> float:
        """Share of tensors that the initialiser itself generated (the rest are fallbacks or kept), in [0, 1]."""
        total = len(self.generated) + len(self.fallbacks) + len(self.kept)
        return len(self.generated) / total if total else 0.0

    def to_json(self) -> str:
        """The report as a JSON object (sorted keys)."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    def __str__(self) -> str:
        lines = [
            f"{self.initialiser} (seed {self.seed}, member {self.member}): {len(self.generated)} tensors generated, "
            f"{len(self.fallbacks)} by a fallback, {len(self.kept)} kept"
        ]
        reasons: dict[tuple[str, str], int] = {}
        for group in ("generated", "fallbacks", "kept"):
            for reason in getattr(self, group).values():
                reasons[group, reason] = reasons.get((group, reason), 0) + 1
        lines += [f"  {group:10s} {count:4d} x {reason}" for (group, reason), count in reasons.items()]
        for step in dict.fromkeys((*self.seconds, *self.figures)):
            parts = [f"{self.seconds[step]:.3g} s"] if step in self.seconds else []
            parts += [f"{key} {value:.4g}" for key, value in self.figures.get(step, {}).items()]
            lines.append(f"  {step}: {', '.join(parts)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
