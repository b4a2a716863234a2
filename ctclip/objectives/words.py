"""A decoder of Transformers that attends to the tokens of a volume, shared by the objectives on words."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ctclip.config import ObjectiveConfig
from ctclip.errors import CheckpointError, ConfigError
from ctclip.models.encoded import Encoded

# Tokens of a report that are looked at; the phantom's have some 150, real ones 291 in the median.
LONGEST = 256


# Waves along each axis by which the decoder is told places, the longest twice the volume.
WAVES = 4


class WordsConfig(ObjectiveConfig):
    """The decoder's size; its width is the text encoder's."""

    depth: int = Field(2, ge=1, le=512, description="layers of the decoder")
    heads: int | None = Field(
        None, ge=1, le=1024, description="attention heads of the decoder; null: one per 64 channels"
    )


class WordDecoder(nn.Module):
    """A small GPT-2 (Radford et al. 2019) of random weights whose layers also attend to volume tokens.

    ``language`` is Transformers' GPT2LMHeadModel, so its ``generate`` writes texts when it is given ``attended(encoded)``.
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
        """length: the maximum number of tokens of a text, with the marks around it; local_width: channels of
        ``Encoded.local``, which are attended to beside the tokens; places: whether it is told where each token is."""
        super().__init__()
        if heads is None:
            heads = max(number for number in range(1, max(1, width // 64) + 1) if width % number == 0)
        if width % heads:
            raise ConfigError(f"heads={heads} does not divide the decoder's width, {width} as the text encoder's")
        # All that is needed to build it again.
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
        # Channels of finer grids have scales of their own.
        self.memory_norm = nn.LayerNorm(token_width + local_width) if local_width else nn.Identity()
        self.places = nn.Linear(6 * WAVES, width) if places else None
        self.language = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=depth, n_head=heads,
                activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, add_cross_attention=True,
                # Of GPT-2's 0.02, made for widths of 768 and more, a narrow one would hardly hear of the volume.
                initializer_range=width**-0.5,
                bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
            )
        )  # fmt: skip

    def forward(self, words: Tensor, mask: Tensor, encoded: Encoded) -> Tensor:
        """words (B, L) ids, read left to right, or vectors (B, L, width), each of which sees all; mask (B, L) 1 where there
        is a word; encoded: B volumes. Returns a score for every word of the vocabulary (B, L, vocabulary)."""
        length = mask.shape[1]
        # Masks of four dimensions are taken as they are: of others Transformers asks the device what they hold.
        seen = (mask == 1)[:, None, None, :].expand(-1, 1, length, -1)
        given = {"inputs_embeds": words}
        if not words.is_floating_point():
            given, seen = {"input_ids": words}, seen.tril()
        scores: Tensor = self.language(**given, attention_mask=seen, **self.attended(encoded)).logits
        return scores

    def attended(self, encoded: Encoded) -> dict[str, Tensor]:
        """What ``language`` is given of B volumes, by the names of its arguments."""
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
    """(N, 6 * WAVES) float32: sines and cosines of the place of each token along each axis, in slice, row, column order."""
    axes = [(torch.arange(extent) + 0.5) / extent for extent in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3, 1)
    angles = (places * math.pi * 2.0 ** torch.arange(WAVES)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
