"""A Transformers decoder that attends to the tokens of a volume, used by the objectives on words."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ctclip.config import ObjectiveConfig
from ctclip.errors import CheckpointError, ConfigError
from ctclip.models.encoded import Encoded

# Maximum number of tokens of a report; phantom reports have about 150, real reports a median of 291.
LONGEST = 256


# Number of sine waves that encode positions along each axis; the longest spans twice the volume.
WAVES = 4


class WordsConfig(ObjectiveConfig):
    """Size of the decoder; its width is that of the text encoder."""

    depth: int = Field(2, ge=1, le=512, description="number of layers of the decoder")
    heads: int | None = Field(
        None, ge=1, le=1024, description="number of attention heads of the decoder; null: one per 64 channels"
    )


class WordDecoder(nn.Module):
    """A small GPT-2 (Radford et al. 2019) with random initial weights whose layers also attend to volume tokens.

    ``language`` is Transformers' GPT2LMHeadModel, whose ``generate`` writes texts given ``attended(encoded)``.
    """

    def __init__(
        self,
        vocabulary: int,
        token_width: int,
        width: int,
        *,
        depth: int = 2,
        heads: int | None = None,
        length: int = LONGEST,
        local_width: int = 0,
        places: bool = False,
    ) -> None:
        """``length``: maximum number of tokens of a text, including start and end; ``local_width``: number of channels
        of ``Encoded.local``, which is attended to in addition to the tokens; ``places``: whether it gets the position
        of each token."""
        super().__init__()
        if heads is None:
            heads = max(number for number in range(1, max(1, width // 64) + 1) if width % number == 0)
        if width % heads:
            raise ConfigError(f"heads={heads} does not divide the decoder's width, {width} as the text encoder's")
        # The arguments needed to build the decoder again.
        self.size = {
            "vocabulary": vocabulary,
            "token_width": token_width,
            "width": width,
            "depth": depth,
            "heads": heads,
            "length": length,
            "local_width": local_width,
            "places": places,
        }
        self.memory = nn.Linear(token_width + local_width, width)
        # Channels of finer grids have different scales.
        self.memory_norm = nn.LayerNorm(token_width + local_width) if local_width else nn.Identity()
        self.places = nn.Linear(6 * WAVES, width) if places else None
        self.language = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=depth, n_head=heads,
                activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, add_cross_attention=True,
                # With GPT-2's 0.02, meant for widths from 768, a narrow decoder would barely respond to the volume.
                initializer_range=width**-0.5,
                bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
            )
        )  # fmt: skip

    def forward(self, words: Tensor, mask: Tensor, encoded: Encoded) -> Tensor:
        """``words``: ids (B, L) with causal attention, or vectors (B, L, width) with full attention; ``mask`` (B, L): 1
        for words, 0 for padding; ``encoded``: B volumes. Returns scores of all words of the vocabulary (B, L,
        vocabulary)."""
        length = mask.shape[1]
        # Transformers uses four-dimensional masks unchanged; for others it would wait for the device to inspect them.
        seen = (mask == 1)[:, None, None, :].expand(-1, 1, length, -1)
        given = {"inputs_embeds": words}
        if not words.is_floating_point():
            given, seen = {"input_ids": words}, seen.tril()
        scores: Tensor = self.language(**given, attention_mask=seen, **self.attended(encoded)).logits
        return scores

    def attended(self, encoded: Encoded) -> dict[str, Tensor]:
        """Keyword arguments of ``language`` for B volumes."""
        tokens = encoded.tokens
        if local_width := self.size["local_width"]:
            if encoded.local is None or encoded.local.shape[2] != local_width:
                raise CheckpointError(
                    f"this caption head expects {local_width} channels of finer grids, which the encoder does not give: it "
                    f"belongs to another model"
                )
            tokens = torch.cat([tokens, encoded.local], dim=2)
        tokens = self.memory(self.memory_norm(tokens))
        if self.places is not None:
            tokens = tokens + self.places(grid_waves(encoded.grid).to(tokens))
        given = {"encoder_hidden_states": tokens}
        if encoded.real is not None:
            given["encoder_attention_mask"] = encoded.real[:, None, None, :]
        return given


def grid_waves(grid: tuple[int, int, int]) -> Tensor:
    """Sines and cosines (N, 6 * WAVES), float32, of the position of each token along each axis, in slice, row, column
    order."""
    axes = [(torch.arange(extent) + 0.5) / extent for extent in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3, 1)
    angles = (places * math.pi * 2.0 ** torch.arange(WAVES)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
