"""What local generators are made of: options of every kind, and the configuration of a generator.

One set of options serves all kinds of slice models (`generators.local.generator.SLICE_MODELS`); a kind reads those that
its docstring names and ignores the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from generators.errors import ConfigError, unknown_name
from generators.local.groups import GroupKey

LocalKind = Literal["conv-vae", "linear-vae", "topographic-vae", "vq-vae", "vq-vae-pixelcnn", "filter-vae"]
Scale = Literal["he", "zoo", "none"]


@dataclass(frozen=True)
class LocalOptions:
    """Options of a slice model and of how slices are cut.

    Attributes:
        kind: Slice model of every weight group.
        depth_buckets: Into how many parts of equal depth networks are divided.
        patch: Length of the row patches of matrices (1x1 convolutions, linear layers).
        latent: Latent units of a slice at most; never more than a slice has weights.
        channels: Channels of the encoder's and decoder's maps.
        hidden: Width of the layers that see a whole slice.
        codes: Codes of a vector-quantised model.
        noise_bounds: Least and largest decoder variance, as shares of the data's variance.
        most_stretch: A kernel size that no group has is drawn from the nearest one if no axis is more than so many
            times longer or shorter (`generators.local.resize`), and left to He otherwise; 1 leaves all to He.
        scale: Spread of a generated tensor: "he" (the He std of its fan-in), "zoo" (as far from He's as the tensors of
            the group in the zoo are, root mean square), "none" (that of the zoo, whatever the fan-in).
        seed: Of the first weights; of a fit, also of its batches and posterior samples.
    """

    kind: LocalKind = "conv-vae"
    depth_buckets: int = 3
    patch: int = 8
    latent: int = 64
    channels: int = 16
    hidden: int = 64
    codes: int = 32
    noise_bounds: tuple[float, float] = (1e-3, 0.25)
    most_stretch: float = 1.0
    scale: Scale = "he"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, known in (("kind", self.kind, LocalKind), ("scale", self.scale, Scale)):
            if value not in get_args(known):
                raise unknown_name(option, value, get_args(known))
        for name in ("depth_buckets", "patch", "latent", "channels", "hidden", "codes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.most_stretch >= 1:
            raise ConfigError(f"most_stretch must be at least 1, got {self.most_stretch}")
        low, high = self.noise_bounds
        if not 0 < low < high <= 1:
            raise ConfigError(f"noise_bounds must be two shares with 0 < low < high <= 1, got {self.noise_bounds}")


@dataclass(frozen=True, kw_only=True)
class LocalConfig(LocalOptions):
    """What a `LocalGenerator` is made of.

    Attributes:
        groups: the weight groups it models, such as "conv_weight-3x3-0" (role, slice shape, depth bucket).
    """

    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.groups:
            GroupKey.parse(text)
