"""Start from a trained model: copy matching weights, freeze layers, and decrease learning rates towards the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ctclip.config import FreezeConfig
from ctclip.errors import ConfigError
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.lora import is_adapter, plain_name

SIDES = {
    "volume": ("volume_encoder.", "volume_projection.", "similarity.volume_standard."),
    "text": ("text_encoder.", "text_projection.", "similarity.text_standard."),
}


@dataclass
class Taken:
    """The result of copying weights from a source model: names of ``taken`` tensors, of ``new`` ones that the source
    lacks, of those with another shape in the source (``reshaped``), and of those that this model lacks (``unused``)."""

    taken: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def describe(self, source: str) -> str:
        """A few lines for the terminal and the model card."""
        lines = [f"from {source}: {len(self.taken)} tensors taken"]
        for words, names in (
            ("new, initialised at random", self.new),
            ("with another shape in the source, initialised at random", self.reshaped),
            ("in the source, not used here", self.unused),
        ):
            if names:
                listed = ", ".join(_parts(names))
                lines.append(f"  {len(names)} {words}: {listed}")
        return "\n".join(lines)


def take_weights(model: DualEncoder, source: dict[str, Tensor], sides: str, where: str) -> Taken:
    """Copy into ``model`` the tensors of ``source`` (``lora.merged_state`` of a model) of ``sides`` (both, volume or
    text), in place. Their low-rank adapters are initialised again.

    Raises ConfigError if no tensor of a requested side fits.
    """
    prefixes = [*(SIDES[sides] if sides != "both" else (*SIDES["volume"], *SIDES["text"]))]
    if sides == "both":
        prefixes.append("similarity.")
    own = model.state_dict()
    result = Taken()
    offered = {name: value for name, value in source.items() if name.startswith(tuple(prefixes))}
    with torch.no_grad():
        for name, value in own.items():
            if not name.startswith(tuple(prefixes)):
                continue
            given = offered.pop(plain_name(name), None) if not is_adapter(name) else None
            if given is None:
                result.new.append(name)
            elif given.shape != value.shape:
                result.reshaped.append(name)
            else:
                value.copy_(given)
                result.taken.append(name)
    result.unused = sorted(offered)
    for side in SIDES if sides == "both" else (sides,):
        if not any(name.startswith(f"{side}_encoder.") for name in result.taken):
            raise ConfigError(
                f"model.init={where}: no tensor of its {side} encoder fits this configuration; give model.{side} the "
                f"architecture of {where}/config.yaml, or start only the other side from it (model.init_sides)"
            )
    return result


def freeze(model: DualEncoder, config: FreezeConfig) -> None:
    """Freeze the layers that ``config`` names, in place. Raises ConfigError for layers that do not exist."""
    for side, layers in (("volume", volume_layers(model)), ("text", text_layers(model))):
        chosen = getattr(config, side)
        if chosen == "none":
            continue
        if chosen == "all":
            module: nn.Module = model.volume_encoder if side == "volume" else model.text_encoder
            if side == "text":
                model.text_encoder.freeze()
            module.requires_grad_(False)
            model.frozen.append(module)
            continue
        first, last = (int(part) for part in chosen.split("-"))
        if not first <= last < len(layers):
            raise ConfigError(f"training.freeze.{side}={chosen}: the {side} encoder has layers 0 to {len(layers) - 1}")
        for layer in layers[first : last + 1]:
            for part in layer:
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    model.frozen.append(part)
    model.train(model.training)


def volume_layers(model: DualEncoder) -> Sequence[Sequence[nn.Module | nn.Parameter]]:
    """Layers of the volume encoder from input to output."""
    return model.volume_encoder.layers()


def text_layers(model: DualEncoder) -> list[list[nn.Module | nn.Parameter]]:
    """Layers of the text encoder from input to output; the first holds the word embeddings."""
    modules = dict(model.text_encoder.bert.named_modules())
    stacks = [part for part in modules.values() if isinstance(part, nn.ModuleList) and len(part)]
    embeddings = [part for name, part in modules.items() if name.rpartition(".")[2] in ("embeddings", "wte", "embed_tokens", "shared")]  # fmt: skip
    if not stacks:
        return [list(embeddings[:1])]
    blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    first, *others = blocks
    return [[*embeddings[:1], first], *([block] for block in others)]


def rate_factors(model: DualEncoder, decay: float) -> dict[int, float]:
    """Factor of the learning rate of each parameter, by its ``id``: ``decay`` to the power of how many layers lie between
    it and the end of its encoder (Clark et al. 2020, ELECTRA, section 3.1); 1 where it belongs to no layer."""
    factors: dict[int, float] = {}
    if decay == 1.0:
        return factors
    for layers in (volume_layers(model), text_layers(model)):
        for depth, layer in enumerate(layers):
            for parameter in _parameters(layer):
                factors[id(parameter)] = decay ** (len(layers) - depth)
    return factors


def _parameters(layer: Sequence[nn.Module | nn.Parameter]) -> Iterator[nn.Parameter]:
    for part in layer:
        yield from (part,) if isinstance(part, nn.Parameter) else part.parameters()


def _parts(names: list[str]) -> list[str]:
    """The distinct first three components of each name."""
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
