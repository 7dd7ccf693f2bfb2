"""Everything that fixes the shape and the meaning of a GHN's weights."""

from __future__ import annotations

from dataclasses import dataclass, fields

from generators.errors import ConfigError, unknown_name
from generators.ghn.decoder import DECODERS, DecoderSettings
from generators.ghn.encoder import ENCODERS


@dataclass(frozen=True)
class GHNConfig:
    """See the module docstring.

    Attributes:
        classes: number of classes of the classifiers it was trained to make.
        hidden: width of the node embeddings.
        layers, heads: depth and attention heads of the encoder.
        distance_limit: nodes further apart exchange no messages directly.
        width, rank, cells: hidden width, core size and table resolution of the decoder.
        spectrum_steps: how strongly the core decoder equalises the spectrum of a matrix, 0 for not at all; the others
            do not read it.
        gain_bound: spread of a layer is He's times at most this factor, at least its inverse.
        anchor: share of white noise in every weight, as a standard deviation in [0, 1).
        decoded_limit: in a sampled matrix the decoded part is at most so many times as large in any direction as white
            noise, and noise takes its place; 0 for no limit. Training knows none.
        code: length of the noise code, 0 for a deterministic GHN.
        code_per: each node of a network has a code of its own, or all nodes share one of the network.
        widest: largest channel count seen in training, of inputs or outputs, 0 if not known.
        met: sorts of layers seen in training ("convolution", "classifier", ...); others are left to the fallback, see
            `generators.ghn.familiar`. Empty if not known, or to have all decoded.
        seed: seed of the start values.
        encoder: what passes messages over the graph, a name in `generators.ghn.encoder.ENCODERS`.
        decoder: what makes matrices of node embeddings, a name in `generators.ghn.decoder.DECODERS`.
        block, block_kernel: side of the blocks of block decoders, and of their kernels.
    """

    classes: int = 10
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    distance_limit: int = 8
    width: int = 128
    rank: int = 16
    cells: int = 16
    spectrum_steps: int = 3
    gain_bound: float = 1.0
    anchor: float = 0.0
    decoded_limit: float = 0.0
    code: int = 0
    code_per: str = "node"
    widest: int = 0
    met: tuple[str, ...] = ()
    seed: int = 0
    encoder: str = "sparse"
    decoder: str = "core"
    block: int = 64
    block_kernel: int = 11

    def __post_init__(self) -> None:
        if not 0 <= self.anchor < 1:
            raise ConfigError(f"anchor is the share of white noise and must be in [0, 1), got {self.anchor}")
        sizes = (self.classes, self.hidden, self.heads, self.distance_limit, self.width, self.rank, self.cells,
                 self.block, self.block_kernel)  # fmt: skip
        for what, name, known in (("encoder", self.encoder, ENCODERS), ("decoder", self.decoder, DECODERS)):
            if name not in known:
                raise unknown_name(what, name, known)
        if min(sizes) < 1 or self.hidden % self.heads:
            raise ConfigError(f"sizes must be at least 1, and hidden divisible by heads, got {self}")
        if self.cells < self.rank:
            raise ConfigError(f"tables of {self.cells} cells cannot carry rank {self.rank}; raise cells or lower rank")
        if min(self.layers, self.spectrum_steps, self.code, self.widest) < 0:
            raise ConfigError(f"layers, spectrum_steps, code and widest must not be negative, got {self}")
        if self.code_per not in ("node", "network"):
            raise ConfigError(f"code_per must be 'node' or 'network', got {self.code_per!r}")
        if self.decoded_limit < 0:
            raise ConfigError(f"decoded_limit is a ratio of norms, or 0 for none, got {self.decoded_limit}")
        if self.decoded_limit and not self.anchor:
            raise ConfigError(
                "decoded_limit lets noise take the place of what is decoded, so it needs an anchor above 0"
            )
        if self.gain_bound < 1:
            raise ConfigError(f"gain_bound is a factor of at least 1, got {self.gain_bound}")

    @property
    def decoder_settings(self) -> DecoderSettings:
        shared = {field.name for field in fields(DecoderSettings)} & {field.name for field in fields(self)}
        return DecoderSettings(
            node_width=self.hidden + self.code, **{name: getattr(self, name) for name in sorted(shared)}
        )
