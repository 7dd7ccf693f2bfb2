"""Errors that a user can act on.

Every message names the thing, the reason and the way out. Command lines turn any `PowerhouseError` into one line on
stderr and exit code 2 (`generators.commandline`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PowerhouseError(Exception):
    """Base of all errors that are about the user's input, files or model, not about a fault in this package."""


class UnknownNameError(PowerhouseError):
    """A name that is in no registry; the message carries near names."""


class ModelError(PowerhouseError):
    """A model that cannot be initialised: no parameters, lazy modules, meta device, ..."""


class TraceError(ModelError):
    """The graph of a model could not be traced; carries the model's own exception as `__cause__`."""


class ProposalError(PowerhouseError):
    """An initialiser proposed tensors that do not fit the model (shape, non-finite values)."""


class CollapseError(PowerhouseError):
    """Generated weights have lost their variance: a collapsed generator must not be used silently."""


class CheckpointError(PowerhouseError):
    """A checkpoint is missing, foreign, of another format, or does not match its own sha256."""


class DataError(PowerhouseError):
    """A data set is missing, has wrong keys, shapes or values."""


class ZooError(PowerhouseError):
    """A zoo or population file is truncated, foreign, of another schema, or does not match its digests."""


class ConfigError(PowerhouseError):
    """A configuration value that makes no sense."""


def near(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The `most` names of `known` that look most like `name`, best first (case does not matter)."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=most, cutoff=0.5)]


def unknown_name(kind: str, name: str, known: Iterable[str], *, way_out: str = "") -> UnknownNameError:
    """The error for `name` not being a known `kind` ("initialiser", "data set", ...), with near names.

    Args:
        kind: what was looked for, in the user's words.
        name: what the user wrote.
        known: every name that would have worked.
        way_out: a last sentence, such as the command that lists what exists.
    """
    known = sorted(known)
    close = near(name, known)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(known) or 'none'}."
    return UnknownNameError(" ".join(part for part in (f"unknown {kind} {name!r}:", hint, way_out) if part))
