"""What a GHN knows: the sorts of layers that it met in its training. Layers of another sort it leaves to the fallback.

What it makes of them means nothing, and can cost: a transformer that a GHN of convolutions made as a whole trains worse
than from He, and as well with He in the layers that it never met (docs/results/cifar10-unseen). A GHN decodes all the
same with `ghn.config = dataclasses.replace(ghn.config, met=())`.
"""

from __future__ import annotations

from collections.abc import Collection

from generators.inventory import ParameterInfo, Role


def sort_of(info: ParameterInfo) -> str:
    """What sort of layer a weight makes: "convolution", "grouped convolution", "linear layer", "classifier", ..."""
    if info.output:
        return "classifier"
    if info.role is not Role.CONV_WEIGHT:
        return "attention" if info.role is Role.ATTENTION_WEIGHT or info.blocks > 1 else "linear layer"
    facts = {"transposed": info.transposed, "grouped": info.groups > 1, "1-D": len(info.kernel) == 1}
    return " ".join([*(name for name, true in facts.items() if true), "convolution"])


def strange(info: ParameterInfo, met: Collection[str]) -> str | None:
    """Why a weight is left to the fallback, or None if it is not.

    Args:
        info: a weight that could be decoded.
        met: sorts of layers; none if it is not known, and nothing is strange.
    """
    return f"the GHN met no {sort_of(info)} in its training" if met and sort_of(info) not in met else None
