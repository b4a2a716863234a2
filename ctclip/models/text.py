"""Text encoders: a small BERT trained from scratch, or any text model of Transformers, with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctclip import extras
from ctclip.config import TextConfig
from ctclip.errors import ConfigError
from ctclip.models.huggingface import text_model, text_model_of
from ctclip.models.reading import Reading, reading_of, word_vectors
from ctclip.models.tokenizers import load_tokenizer, train_tokenizer
from ctclip.sentences import sentences

__all__ = ["TextEncoder", "build_text_encoder", "load_tokenizer", "small_bert_config", "train_tokenizer"]

# Maximum number of cached vectors of a frozen text encoder: 300 MB at BERT's 768 dimensions.
LARGEST_CACHE = 100_000
# Names of the projections of queries, keys and values in Transformers.
ATTENTION = frozenset(
    [
        "query",
        "key",
        "value",
        "query_proj",
        "key_proj",
        "value_proj",
        "q_proj",
        "k_proj",
        "v_proj",
        "q_lin",
        "k_lin",
        "v_lin",
        "q",
        "k",
        "v",
        "q_head",
        "k_head",
        "v_head",
        "Wqkv",
        "qkv",
        "qkv_proj",
        "query_key_value",
        "c_attn",
        "in_proj",
    ]
)


class TextEncoder(nn.Module):
    """A text model of Transformers with its tokenizer and pooling; the attribute is called ``bert`` for any
    architecture.

    ``forward`` takes token ids and returns one vector per text; ``tokenise`` returns the ids. Texts longer than
    ``max_tokens`` are cut at sentence ends into chunks whose vectors are averaged, weighted by length. With ``chunks:
    sentence`` every sentence is a chunk of equal weight: a report is the mean of its sentences, comparable with a
    prompt of one sentence, and a sentence that many reports share is encoded once.
    """

    def __init__(self, bert: Any, tokenizer: Any, config: TextConfig) -> None:
        super().__init__()
        self.bert = bert
        self.tokenizer = tokenizer
        self.config = config
        self.reading = reading_of(bert, tokenizer)
        self.width: int = bert.config.hidden_size
        self.max_tokens = min(config.max_tokens, self.reading.positions or config.max_tokens)
        if self.max_tokens <= self.reading.around:
            raise ConfigError(
                f"model.text.max_tokens={self.max_tokens} leaves no room for a word beside {self.reading.around} special "
                f"tokens; raise it"
            )
        self.last = pools_last(config, self.reading, bert, tokenizer)
        self.attention = nn.Linear(self.width, 1) if config.pooling == "attention" else None
        # Cached vectors of chunks, by their token ids, if the encoder is frozen.
        self.known: dict[bytes, Tensor] = {}
        self.frozen = False
        if config.tuning == "frozen":
            self.freeze()
        self.register_load_state_dict_pre_hook(_without_pooler)

    def freeze(self) -> None:
        """Freeze BERT from now on."""
        self.frozen = True
        self.known.clear()
        self.bert.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TextEncoder:
        """Set the training mode, but keep a frozen encoder in evaluation mode, because dropout would only add noise."""
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        chunk: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> Tensor:
        """input_ids, attention_mask (n, L) int: n distinct chunks. chunk, owner (m,): text ``owner[i]`` holds chunk
        ``chunk[i]``; None for one chunk per text. Returns (texts, width). Inputs should be on the host, as ``tokenise``
        returns them, so that nothing waits for the device."""
        texts = 0 if owner is None else int(owner[-1]) + 1
        device = next(self.bert.parameters()).device
        if self._cacheable():
            pooled = self._remembered(input_ids, attention_mask)
            attention_mask = attention_mask.to(device, non_blocking=True)
        else:
            input_ids, attention_mask = (part.to(device, non_blocking=True) for part in (input_ids, attention_mask))
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            pooled = self.pool(hidden, attention_mask)
        if chunk is None or owner is None:
            return pooled
        weight = torch.ones_like(pooled[:, :1])
        if self.config.chunks == "full":
            weight = attention_mask.sum(dim=1, keepdim=True).to(pooled.dtype)
        chunk, owner = chunk.to(device, non_blocking=True), owner.to(device, non_blocking=True)
        total = pooled.new_zeros(texts, pooled.shape[1]).index_add(0, owner, (pooled * weight)[chunk])
        return total / weight.new_zeros(texts, 1).index_add(0, owner, weight[chunk])

    def _cacheable(self) -> bool:
        """Whether the vectors of chunks are constant. They are not with attention pooling, which is trained. Under ZeRO
        3 they are not cached, because every rank must run the same modules."""
        if not self.frozen or self.attention is not None:
            return False
        return not any(hasattr(parameter, "ds_id") for parameter in self.bert.parameters())

    @torch.no_grad()
    def _remembered(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, L) -> (n, width); only new chunks are encoded."""
        keys = [
            row[kept].numpy().tobytes() for row, kept in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)
        ]
        device = next(self.bert.parameters()).device
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if len(self.known) + len(new) > LARGEST_CACHE:
            self.known.clear()
            new = list(range(len(keys)))
        if new:
            # Trailing columns of padding were needed only for longer chunks, which are cached.
            length = int(attention_mask[new].sum(dim=1).max())
            ids, mask = (part[new, :length].to(device) for part in (input_ids, attention_mask))
            pooled = self.pool(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state, mask).float().cpu()
            self.known.update({keys[index]: vector for index, vector in zip(new, pooled, strict=True)})
        return torch.stack([self.known[key] for key in keys]).to(device)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (n, L, width) of chunks with their mask (n, L) -> (n, width), as ``pooling`` says."""
        if self.config.pooling in ("cls", "last"):
            place = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1) if self.last else 0
            return hidden[torch.arange(len(hidden), device=hidden.device), place]
        if self.attention is not None:
            score = self.attention(hidden).squeeze(-1).masked_fill(mask == 0, float("-inf"))
            return torch.einsum("nl,nlc->nc", score.softmax(dim=1), hidden)
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (n, L) and, where texts are of several chunks, ``chunk``, ``owner`` (m,)."""
        reading = self.reading
        room = self.max_tokens - reading.around
        rows: dict[tuple[int, ...], int] = {}
        chunk: list[int] = []
        owner: list[int] = []
        for index, pieces in enumerate(self._pieces(texts, room)):
            for piece in pieces:
                chunk.append(rows.setdefault(tuple(piece), len(rows)))
                owner.append(index)
        # Without special tokens, an empty text would have no token.
        whole = [[*reading.prefix, *piece, *reading.suffix] or [reading.padding] for piece in rows]
        tokens = self._padded(whole)
        if chunk != list(range(len(texts))):
            tokens |= {"chunk": torch.tensor(chunk), "owner": torch.tensor(owner)}
        return tokens

    @property
    def marks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and after a text for a decoder: the special tokens of the tokenizer, else its end token, else
        padding."""
        end = self.tokenizer.eos_token_id
        mark = (self.reading.padding if end is None else end,)
        return self.reading.prefix or mark, self.reading.suffix or mark

    def whole(self, texts: Sequence[str], longest: int) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (n, L) of texts that are not cut into chunks, with ``marks`` around each;
        ids beyond ``longest`` are cut off."""
        before, after = self.marks
        room = longest - len(before) - len(after)
        return self._padded([[*before, *ids[:room], *after] for ids in self._ids(list(texts))])

    def _padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        length = max(map(len, rows))
        ids = [[*row, *[self.reading.padding] * (length - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def _pieces(self, texts: Sequence[str], room: int) -> list[list[list[int]]]:
        """Token ids of each text's chunks."""
        if self.config.chunks == "full":
            encoded = self._ids(list(texts))
            whole = zip(texts, encoded, strict=True)
            return [[ids] if len(ids) <= room else self._chunks(text, room) for text, ids in whole]
        cut = [sentences(text) or [text] for text in texts]
        distinct = list(dict.fromkeys(sentence for parts in cut for sentence in parts))
        ids = {sentence: piece[:room] for sentence, piece in zip(distinct, self._ids(distinct), strict=True)}
        return [[ids[sentence] for sentence in parts] for parts in cut]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _chunks(self, text: str, room: int) -> list[list[int]]:
        chunks: list[list[int]] = [[]]
        for sentence in sentences(text):
            (ids,) = self._ids([sentence])
            # A sentence longer than a chunk is cut where the chunk is full.
            for start in range(0, len(ids), room):
                piece = ids[start : start + room]
                if len(chunks[-1]) + len(piece) > room:
                    chunks.append([])
                chunks[-1].extend(piece)
        return chunks


def pools_last(config: TextConfig, reading: Reading, bert: Any, tokenizer: Any) -> bool:
    """Whether the last token represents the text: with ``pooling: last``, and with a classification token at the end,
    as in CLIP. Raises ConfigError if the encoder has no such token."""
    if config.pooling != "cls" or tokenizer is None:
        return config.pooling == "last"
    if reading.left_to_right and reading.suffix:
        return True
    if not reading.left_to_right and reading.prefix:
        return False
    if not reading.left_to_right and tokenizer.cls_token_id in reading.suffix:
        return True
    remedy = "last" if reading.left_to_right else "mean"
    raise ConfigError(
        f"model.text.pooling=cls: a {bert.config.model_type} encoder has no token that represents the whole text; set "
        f"model.text.pooling={remedy}"
    )


def build_text_encoder(config: TextConfig, tokenizer: Any | None = None) -> TextEncoder:
    """The encoder ``config`` describes; ``tokenizer`` is needed if no pretrained encoder is named."""
    if config.pretrained is None:
        if tokenizer is None:
            raise ConfigError("model.text.pretrained is not set: a tokenizer trained on the reports is needed")
        if config.tuning == "lora":
            raise ConfigError("model.text.tuning=lora adapts a pretrained encoder: name one in model.text.pretrained")
        shape = small_bert_config(config, len(tokenizer), tokenizer.pad_token_id).to_dict()
        return TextEncoder(text_model_of(shape, "model.text"), tokenizer, config)
    bert = text_model(config.pretrained, weights=config.weights == "pretrained")
    tokenizer = tokenizer or load_tokenizer(config.pretrained)
    if config.tuning == "full":
        give_vectors(bert, tokenizer)
    return TextEncoder(with_lora(bert, config) if config.tuning == "lora" else bert, tokenizer, config)


def text_encoder_of(values: dict[str, Any], tokenizer: Any, config: TextConfig, source: str | Path) -> TextEncoder:
    """The encoder of a model folder, before its weights are loaded. ``values``: the contents of ``text_config.json``,
    written by ``TextEncoder.bert.config``; ``source`` is named in errors."""
    bert = text_model_of(values, source)
    known = word_vectors(bert)
    # The vector of padding is never used.
    largest = max(number for token, number in tokenizer.get_vocab().items() if token != tokenizer.pad_token)
    if known is not None and largest >= known:
        raise ConfigError(f"{source}: knows {known} tokens, but the tokenizer beside it has one of number {largest}")
    return TextEncoder(with_lora(bert, config) if config.tuning == "lora" else bert, tokenizer, config)


def give_vectors(bert: Any, tokenizer: Any) -> None:
    """Give tokens that were added to ``tokenizer`` but not to ``bert`` the mean of the other word vectors as initial
    vector."""
    known, wanted = word_vectors(bert), max(tokenizer.get_vocab().values()) + 1
    if known is not None and wanted > known:
        bert.resize_token_embeddings(wanted, mean_resizing=False)
        with torch.no_grad():
            weight = bert.get_input_embeddings().weight
            weight[known:] = weight[:known].mean(dim=0)


def with_lora(bert: Any, config: TextConfig) -> nn.Module:
    """Add low-rank adapters (Hu et al. 2021) to the attention of ``bert`` and freeze its own weights."""
    peft = extras.require("peft")
    from transformers.pytorch_utils import Conv1D

    projections = {
        name.rsplit(".", 1)[-1]: isinstance(module, Conv1D)
        for name, module in bert.named_modules()
        if name.rsplit(".", 1)[-1] in ATTENTION and isinstance(module, nn.Linear | Conv1D)
    }
    if not projections:
        raise ConfigError(
            f"model.text.tuning=lora: the attention of a {bert.config.model_type} encoder has no projections that can be "
            f"adapted; set model.text.tuning=full or frozen"
        )
    lora = peft.LoraConfig(
        r=config.lora_rank, target_modules=sorted(projections), fan_in_fan_out=any(projections.values())
    )
    return peft.get_peft_model(bert, lora)


def small_bert_config(config: TextConfig, tokens: int | None = None, padding: int = 0) -> Any:
    """The Transformers configuration of the BERT that is trained from scratch."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=tokens or config.vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=config.max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=padding,
    )


def _without_pooler(encoder: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Drop the unused pooler in folders and checkpoints of earlier versions."""
    own = encoder.state_dict().keys()
    for name in [name for name in state if name.startswith(f"{prefix}bert.") and ".pooler." in name]:
        if name.removeprefix(prefix) not in own:
            del state[name]
