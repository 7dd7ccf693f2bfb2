"""The settings of a comparison. Imports nothing heavy, so that command lines can show their help at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from generators.errors import ConfigError

SHIFT_NAMES = ("noise", "blur", "rotation", "translation", "contrast")


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, and how."""

    zoo: tuple[Path, ...]
    """Zoo folders with trained populations that differ only in architecture, initialiser and learning rate."""
    out: Path = Path("runs/comparison")
    """Folder for report.html, report.md, results.json, plots/ and records/."""
    baseline: str = "he"
    """Initialiser that all others are compared with, run by run of equal seed."""
    architectures: tuple[str, ...] = ()
    """Only these architectures; none = all that the zoo holds."""
    inits: tuple[str, ...] = ()
    """Only these initialisers besides the baseline; none = all that the zoo holds."""
    horizons: tuple[int, ...] = (0, 100, 200, 400, 800)
    """Training steps at which accuracies are compared; the first evaluation after step 0 and the end are added."""
    target_share: float = 0.9
    """Target of "steps to target" as a share of the baseline's mean accuracy at the end, per architecture."""
    target: float | None = None
    """Target accuracy in [0, 1] for all architectures, instead of `target_share`."""
    ensemble_size: int = 5
    """Members of an ensemble, drawn from the runs without replacement."""
    ensemble_sets: int = 10
    """Ensembles per initialiser, if there are enough runs for more than one."""
    shifts: tuple[str, ...] = SHIFT_NAMES
    """Kinds of shift of the test images; none = clean images only."""
    shift_images: int = 500
    """Test images per shift and severity (the first so many), which bounds the time; clean images are always all."""
    data: str | None = None
    """Data set to evaluate ensembles on, if it has moved: a name or the path of an .npz; None = the recipe's own."""
    data_root: Path | None = None
    """Folder where torchvision data sets lie."""
    seed: int = 0
    """Seed of the shifts and of the draws of ensembles."""

    def __post_init__(self) -> None:
        if not self.zoo:
            raise ConfigError("no zoo folder given; name at least one, for example --zoo runs/zoo")
        unknown = [name for name in self.shifts if name not in SHIFT_NAMES]
        if unknown:
            raise ConfigError(f"unknown shift {unknown[0]!r}; known: {', '.join(SHIFT_NAMES)}")
        if self.target is not None and not 0 < self.target <= 1:
            raise ConfigError(f"target is an accuracy in (0, 1], got {self.target}")
        if not 0 < self.target_share <= 1:
            raise ConfigError(f"target_share is a share in (0, 1], got {self.target_share}")
        if any(step < 0 for step in self.horizons):
            raise ConfigError(f"horizons are training steps from 0 on, got {self.horizons}")
        for name, least in (("ensemble_size", 2), ("ensemble_sets", 1), ("shift_images", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
