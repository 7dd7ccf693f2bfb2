"""The record of a training: one JSON line per log in `log.jsonl`, always; Weights & Biases on request.

A killed training resumes from its last saved state, a little before its last line. The tracker therefore takes the step
of that state and drops the lines after it, which come again: no step is in the log twice, none is lost.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from collect.durable import durable
from generators.errors import ConfigError

log = logging.getLogger(__name__)

TRACKS = ("none", "wandb")
LOG_NAME = "log.jsonl"
Track = Literal["none", "wandb"]


def _plain(value: Any) -> Any:
    """A JSON value for a number, string or one-element tensor or array; None for NaN and infinities (not in JSON)."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log in `folder` as dicts; a last line that a kill cut short is left out."""
    path = Path(folder) / LOG_NAME
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # each complete line ends in a newline
    return [json.loads(line) for line in whole]


class Tracker:
    """Logs a training to `folder/log.jsonl` and, with `track="wandb"`, to Weights & Biases.

    Args:
        folder: where the log lies; made if it is not there.
        track: "none" or "wandb". Without an account, set `WANDB_MODE=offline`: the run is kept under `folder/wandb`.
        project: the wandb project.
        config: the resolved configuration, shown beside the run in wandb.
        resumed_at: the step of the state that training goes on from: lines up to that step stay, later ones are
            dropped because they come again. None begins a new log.

    Raises:
        ConfigError: `track` is neither, wandb is not installed, or it cannot start.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        track: Track = "none",
        project: str = "powerhouse",
        config: dict[str, Any] | None = None,
        resumed_at: int | None = None,
    ) -> None:
        if track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {track!r}")
        self.folder = Path(folder)
        kept = [] if resumed_at is None else [line for line in read_log(self.folder) if line["step"] <= resumed_at]
        self._run: Any = None
        if track == "wandb":
            self._run = _start_wandb(self.folder, project, config or {}, resumed=resumed_at is not None)
        with durable(self.folder / LOG_NAME) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file: IO[str] = (self.folder / LOG_NAME).open("a", encoding="utf-8")

    def log(self, step: int, **values: Any) -> None:
        """Write one line: `step` and named values (numbers, strings, one-element tensors); flushed at once."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), **plain}) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(plain, step=int(step))

    def close(self) -> None:
        """Close the file and end the wandb run."""
        self._file.close()
        if self._run is not None:
            self._run.finish()
            self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start_wandb(folder: Path, project: str, config: dict[str, Any], *, resumed: bool) -> Any:
    """The wandb run of `folder`. Its id is kept beside the log, so that a resumed training goes on in the same run."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "track='wandb' needs the wandb package: pip install 'powerhouse-init[train]', or leave --track at none"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "wandb_run_id"
    known = kept.read_text().strip() if resumed and kept.exists() else None
    try:
        run = wandb.init(project=project, dir=str(folder), config=config, id=known, resume="allow" if known else None)
    except (wandb.errors.Error, OSError) as error:
        raise ConfigError(
            f"wandb cannot start ({error}); run `wandb login`, or set WANDB_MODE=offline to work without an account"
        ) from error
    kept.write_text(run.id)
    log.info("wandb run %s in %s", run.id, folder)
    return run
