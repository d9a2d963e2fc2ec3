"""What a command line varies: Hydra's sweep syntax as lists of overrides, or as Optuna's distributions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from neurogen.config.compose import explain
from neurogen.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass
class Space:
    """A command line taken apart.

    Arguments:
        fixed: overrides with one value.
        choices: per key, its values as the command line spells them.
        intervals: per key, the bounds of a continuous range (for a search only).
    """

    fixed: list[str] = field(default_factory=list)
    choices: dict[str, list[str]] = field(default_factory=dict)
    intervals: dict[str, IntervalSweep] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Space:
        """Read overrides such as `optimizer.lr=1e-3,2e-3`. Raises UserError for one that cannot be read or that sets
        what the sweep itself sets."""
        try:
            overrides: list[Override] = OverridesParser.create().parse_overrides(list(words))
        except HydraException as error:
            raise UserError(explain(error)) from error
        space = cls()
        for override in overrides:
            key = override.get_key_element()
            if key in ("run_dir", "resume"):
                raise UserError(f"{key}: a sweep gives each job its own; name the sweep's folder with sweep.dir=...")
            value = override.value()
            if not override.is_sweep_override():
                space.fixed.append(str(override.input_line))
            elif isinstance(value, IntervalSweep):
                space.intervals[key] = value
            elif override.is_discrete_sweep():
                space.choices[key] = list(override.sweep_string_iterator())
            else:
                raise UserError(f"{override.input_line}: sweep over values, a range or an interval instead")
        return space

    def grid(self) -> Iterator[dict[str, str]]:
        """Every combination, the last key changing fastest. Raises UserError if there is an interval."""
        for key in self.intervals:
            raise UserError(f"{key}: an interval has no end of values; list them, or search with sweep=optuna")
        for values in itertools.product(*self.choices.values()):
            yield dict(zip(self.choices, values))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view: intervals are numbers (integers if both ends are; logarithmic with tag(log, ...)), all
        else is categorical."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {key: CategoricalDistribution(values) for key, values in self.choices.items()}
        for key, interval in self.intervals.items():
            low, high, log = interval.start, interval.end, "log" in interval.tags
            assert low is not None
            assert high is not None
            kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
            try:
                found[key] = kind(low, high, log=log)  # type: ignore[arg-type]
            except ValueError as error:
                raise UserError(f"{key}: {error}") from error
        if not found:
            raise UserError("sweep=optuna: nothing to search; give a key several values or an interval(low, high)")
        return found
