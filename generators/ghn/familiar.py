"""What a GHN knows: the sorts of layers that it met in its training, and what of another network it leaves to He.

A start from a GHN is worth training from since its layers fit each other; taken for themselves they are worth little
more than He's (docs/results/cifar10-anatomy). So a layer of a sort that the GHN never met is left to the fallback, and
in a network that has many of them, so are the others: there is nothing that they would fit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from generators.inventory import ParameterInfo, Role

MOST_STRANGE = 0.25  # of the matrices of a network; above, all of them are left


def sort_of(info: ParameterInfo) -> str:
    """What sort of layer a weight makes: "convolution", "grouped convolution", "linear layer", "classifier", ..."""
    if info.output:
        return "classifier"
    if info.role is not Role.CONV_WEIGHT:
        return "attention" if info.role is Role.ATTENTION_WEIGHT or info.blocks > 1 else "linear layer"
    facts = {"transposed": info.transposed, "grouped": info.groups > 1, "1-D": len(info.kernel) == 1}
    return " ".join([*(name for name, true in facts.items() if true), "convolution"])


def strange(weights: Sequence[ParameterInfo], met: Collection[str]) -> dict[str, str]:
    """Which of the weights of a network are left to the fallback, and why.

    Args:
        weights: all that could be decoded.
        met: sorts of layers; none if it is not known, and nothing is strange.
    """
    if not met:
        return {}
    unmet = {info.name: sort_of(info) for info in weights if sort_of(info) not in met}
    left = {name: f"the GHN met no {sort} in its training" for name, sort in unmet.items()}
    if sum(info.blocks for info in weights if info.name in unmet) <= MOST_STRANGE * sum(
        info.blocks for info in weights
    ):
        return left
    because = f"it would not fit the rest: the GHN met no {' or '.join(sorted({*unmet.values()}))} in its training"
    return {info.name: because for info in weights} | left
