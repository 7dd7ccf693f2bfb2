"""Where the slices for a fit come from: the trained networks of a zoo, or a folder of `.npy` kernels made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collect import zoo_file
from collect.zoo import Zoo
from generators.errors import ConfigError, ZooError
from generators.local.groups import GroupKey
from generators.seeds import derive
from train_generators import slice_folder
from train_generators.slices import SliceGroup, open_groups
from train_generators.vae_config import VAEConfig


@dataclass(frozen=True)
class FitData:
    """What a fit works on.

    Attributes:
        groups: the weight groups that can be fitted.
        skipped: why the others cannot, by name.
        facts: about the networks, for the card; they decide whether a fit can be resumed.
    """

    groups: dict[GroupKey, SliceGroup]
    skipped: dict[str, str]
    facts: dict[str, Any]


def _collection(source: str | Path | Zoo) -> Path | None:
    """The folder if it holds `.npy` files and no zoo."""
    if isinstance(source, Zoo) or any(Path(source).glob(f"*{zoo_file.SUFFIX}")):
        return None
    return Path(source) if any(Path(source).rglob(f"*{slice_folder.SUFFIX}")) else None


def _of_zoo(zoo: Zoo, config: VAEConfig) -> tuple[dict[GroupKey, SliceGroup], dict[str, Any]]:
    chosen = zoo.where(status="ok") if config.init == "any" else zoo.where(status="ok", init=config.init)
    if not len(chosen):
        others = sorted(set(map(str, zoo.runs.column("init"))))
        raise ZooError(
            f"{zoo.folder}: no finished network started from {config.init!r}, only from {', '.join(others)}; "
            "collect some, or use --init any"
        )
    groups = open_groups(
        chosen, patch=config.patch, depth_buckets=config.depth_buckets, slices_per_tensor=config.slices_per_tensor,
        prune=config.prune, ram_limit=config.ram_limit,
    )  # fmt: skip
    runs = sorted(run["id"] for run in chosen.runs)
    architectures = sorted({run["architecture"] for run in chosen.runs})
    return groups, {
        "data": ", ".join(sorted({run["data"] for run in chosen.runs})),
        "zoo": {"runs": len(runs), "architectures": architectures, "digest": derive(0, *runs)},
    }


def _of_collection(folder: Path, config: VAEConfig) -> tuple[dict[GroupKey, SliceGroup], dict[str, Any]]:
    if config.scale == "zoo":
        raise ConfigError(f"{folder}: kernels without their layers have no gain over He; use --scale he or none")
    if config.kind == "filter-vae":
        raise ConfigError(f"{folder}: kernels without their layers make no filters; use another --kind")
    groups = slice_folder.open_folder(
        folder, slices_per_file=config.slices_per_tensor, prune=config.prune, ram_limit=config.ram_limit
    )
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(f"*{slice_folder.SUFFIX}"))
    sizes = [(folder / name).stat().st_size for name in files]
    return groups, {"data": folder.name, "zoo": {"files": len(files), "digest": derive(0, *files, *sizes)}}


def open_data(source: str | Path | Zoo, config: VAEConfig) -> FitData:
    """The slices of a zoo, or of a folder of `.npy` files, in groups large enough to be fitted.

    Raises:
        ZooError: no run or no group can be used.
        DataError: a file of the collection cannot be used.
        ConfigError: the collection does not know what the configuration asks for.
    """
    if folder := _collection(source):
        groups, facts = _of_collection(folder, config)
    else:
        groups, facts = _of_zoo(source if isinstance(source, Zoo) else Zoo(source), config)
    skipped = {
        str(key): f"{len(data.train)} training slices, fewer than {config.least_slices}"
        for key, data in groups.items()
        if len(data.train) < config.least_slices
    }
    usable = {key: data for key, data in groups.items() if str(key) not in skipped}
    if not usable:
        raise ZooError(
            f"{source}: none of {len(groups)} weight groups has {config.least_slices} training slices "
            f"({skipped}); collect more networks, or lower --least-slices"
        )
    return FitData(usable, skipped, facts)
