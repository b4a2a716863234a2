"""A decoder of Transformers that attends to the tokens of a volume, shared by the objectives on words."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from ctclip.config import ObjectiveConfig
from ctclip.errors import ConfigError
from ctclip.models.encoded import Encoded

# Tokens of a report that are looked at; the phantom's have some 150, real ones 291 in the median.
LONGEST = 256


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
    ) -> None:
        """length: the maximum number of tokens of a text, with the marks around it."""
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
        }
        self.memory = nn.Linear(token_width, width)
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
        tokens = self.memory(encoded.tokens)
        given = {"encoder_hidden_states": tokens}
        if encoded.real is not None:
            given["encoder_attention_mask"] = encoded.real[:, None, None, :]
        return given
