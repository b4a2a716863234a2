"""Text encoders: a small BERT trained from scratch, or any BERT-like encoder of Hugging Face.

Nothing here runs code that came with a checkpoint: folders that declare their own code (CXR-BERT does) are
loaded as the plain BERT they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctclip import extras
from ctclip.config import TextConfig
from ctclip.errors import CheckpointError, ConfigError
from ctclip.sentences import sentences

# Vectors of a frozen text encoder that are kept: 300 MB at BERT's 768 dimensions.
LARGEST_CACHE = 100_000


def train_tokenizer(reports: Iterable[str], vocabulary: int) -> Any:
    """A lower-casing WordPiece tokenizer (BERT's) for ``reports``: their commonest words, and single characters to
    spell the rest.

    The same reports give the same vocabulary: ties are broken by the alphabet, where the merging trainers of
    `tokenizers` follow the order of a hash table and differ from run to run.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    count: Counter[str] = Counter()
    for report in reports:
        count.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(report)))
    characters = sorted({character for word in count for character in word})
    words = sorted((word for word in count if len(word) > 1), key=lambda word: (-count[word], word))
    pieces = [*special, *characters, *[f"##{character}" for character in characters], *words]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces[:vocabulary])}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub name, without remote code."""
    from transformers import AutoTokenizer, BertTokenizer

    own_code = "auto_map" in _tokenizer_config(source)
    try:
        loader = BertTokenizer if own_code else AutoTokenizer
        return loader.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no tokenizer could be loaded. Put tokenizer.json, or vocab.txt with "
            f"tokenizer_config.json, in a folder and name it in model.text.pretrained (--text of import-checkpoint)"
        ) from error


def _tokenizer_config(source: str | Path) -> dict[str, Any]:
    folder = Path(source)
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            if "auto_map" in values:
                return values
    return {}


class TextEncoder(nn.Module):
    """A BERT-like encoder with its tokenizer and pooling.

    ``forward`` takes token ids and returns one vector a text; ``tokenise`` makes the ids. Texts longer than
    ``max_tokens`` are cut at sentence ends into chunks whose vectors are averaged, weighted by length. With
    ``chunks: sentence`` every sentence is a chunk and weighs alike: a report is the mean of what it says, a prompt of
    one sentence lies in the same space, and a sentence that many reports share is encoded once.
    """

    def __init__(self, bert: Any, tokenizer: Any, config: TextConfig) -> None:
        super().__init__()
        self.bert = bert
        self.tokenizer = tokenizer
        self.config = config
        self.width: int = bert.config.hidden_size
        self.max_tokens = min(config.max_tokens, getattr(bert.config, "max_position_embeddings", config.max_tokens))
        self.attention = nn.Linear(self.width, 1) if config.pooling == "attention" else None
        # Of a frozen BERT: vectors of the chunks seen so far, by their token ids.
        self.known: dict[bytes, Tensor] = {}
        self.frozen = False
        if config.tuning == "frozen":
            self.freeze()

    def freeze(self) -> None:
        """From here on BERT learns nothing."""
        self.frozen = True
        self.known.clear()
        self.bert.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TextEncoder:
        """A frozen BERT stays in evaluation mode: its dropout would only add noise."""
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
        ``chunk[i]``; None for one chunk a text. Returns (texts, width)."""
        if self._cacheable():
            pooled = self._remembered(input_ids, attention_mask)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            pooled = self._pool(hidden, attention_mask)
        if chunk is None or owner is None:
            return pooled
        weight = torch.ones_like(pooled[:, :1])
        if self.config.chunks == "full":
            weight = attention_mask.sum(dim=1, keepdim=True).to(pooled.dtype)
        texts = int(owner[-1]) + 1
        total = pooled.new_zeros(texts, pooled.shape[1]).index_add(0, owner, (pooled * weight)[chunk])
        return total / weight.new_zeros(texts, 1).index_add(0, owner, weight[chunk])

    def _cacheable(self) -> bool:
        """Whether a chunk's vector never changes. Attention pooling learns; and under ZeRO 3 every rank must run the
        same modules, whatever each has seen before."""
        if not self.frozen or self.attention is not None:
            return False
        return not any(hasattr(parameter, "ds_id") for parameter in self.bert.parameters())

    @torch.no_grad()
    def _remembered(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, L) -> (n, width); only chunks never seen before go through BERT."""
        keys = [
            row[kept].numpy().tobytes() for row, kept in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)
        ]
        new = [index for index, key in enumerate(keys) if key not in self.known]
        if len(self.known) + len(new) > LARGEST_CACHE:
            self.known.clear()
            new = list(range(len(keys)))
        if new:
            # Rows of zeros at the end are padding that only the longer, known chunks needed.
            length = int(attention_mask[new].sum(dim=1).max())
            ids, mask = input_ids[new, :length], attention_mask[new, :length]
            pooled = self._pool(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state, mask).float().cpu()
            self.known.update({keys[index]: vector for index, vector in zip(new, pooled, strict=True)})
        return torch.stack([self.known[key] for key in keys]).to(input_ids.device)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return hidden[:, 0]
        if self.attention is not None:
            score = self.attention(hidden).squeeze(-1).masked_fill(mask == 0, float("-inf"))
            return torch.einsum("nl,nlc->nc", score.softmax(dim=1), hidden)
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def tokenise(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (n, L) and, where texts are of several chunks, ``chunk``, ``owner`` (m,)."""
        room = self.max_tokens - 2
        rows: dict[tuple[int, ...], int] = {}
        chunk: list[int] = []
        owner: list[int] = []
        for index, pieces in enumerate(self._pieces(texts, room)):
            for piece in pieces:
                chunk.append(rows.setdefault(tuple(piece), len(rows)))
                owner.append(index)
        first, last, pad = (
            self.tokenizer.cls_token_id,
            self.tokenizer.sep_token_id,
            self.tokenizer.pad_token_id,
        )
        lengths = torch.tensor([len(piece) + 2 for piece in rows])
        length = int(lengths.max())
        input_ids = torch.full((len(rows), length), pad, dtype=torch.long)
        for row, distinct in enumerate(rows):
            input_ids[row, : len(distinct) + 2] = torch.tensor([first, *distinct, last])
        tokens = {"input_ids": input_ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}
        if chunk != list(range(len(texts))):
            tokens |= {"chunk": torch.tensor(chunk), "owner": torch.tensor(owner)}
        return tokens

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
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _chunks(self, text: str, room: int) -> list[list[int]]:
        chunks: list[list[int]] = [[]]
        for sentence in sentences(text):
            ids = self.tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"]
            # A sentence longer than a chunk has no better place to be cut than where the chunk is full.
            for start in range(0, len(ids), room):
                piece = ids[start : start + room]
                if len(chunks[-1]) + len(piece) > room:
                    chunks.append([])
                chunks[-1].extend(piece)
        return chunks


def build_text_encoder(config: TextConfig, tokenizer: Any | None = None) -> TextEncoder:
    """The encoder ``config`` describes; ``tokenizer`` is needed where nothing pretrained is named."""
    if config.pretrained is None:
        if tokenizer is None:
            raise ConfigError("model.text.pretrained is not set: a tokenizer trained on the reports is needed")
        if config.tuning == "lora":
            raise ConfigError("model.text.tuning=lora adapts a pretrained encoder: name one in model.text.pretrained")
        return TextEncoder(_small_bert(config, tokenizer), tokenizer, config)
    tokenizer = tokenizer or load_tokenizer(config.pretrained)
    bert = _pretrained_bert(config)
    if config.tuning == "lora":
        bert = with_lora(bert, config)
    return TextEncoder(bert, tokenizer, config)


def with_lora(bert: Any, config: TextConfig) -> nn.Module:
    """Low-rank adapters (Hu et al. 2021) on the attention of ``bert``, whose own weights are frozen."""
    peft = extras.require("peft")
    targets = ["query", "key", "value"]
    return peft.get_peft_model(bert, peft.LoraConfig(r=config.lora_rank, target_modules=targets))


def small_bert_config(config: TextConfig, tokens: int | None = None, padding: int = 0) -> Any:
    """Transformers' description of the BERT that is trained from scratch."""
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


def _small_bert(config: TextConfig, tokenizer: Any) -> nn.Module:
    from transformers import BertModel

    return BertModel(small_bert_config(config, len(tokenizer), tokenizer.pad_token_id), add_pooling_layer=False)


def _pretrained_bert(config: TextConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModel, BertConfig, BertModel

    source = str(config.pretrained)
    own_code = _declares_code(source)
    try:
        shape = BertConfig.from_pretrained(source) if own_code else AutoConfig.from_pretrained(source)
        if config.weights == "random":
            if own_code:
                return BertModel(shape, add_pooling_layer=False)
            return AutoModel.from_config(shape)
        if own_code:
            return BertModel.from_pretrained(source, add_pooling_layer=False)
        return AutoModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no text encoder could be loaded ({' '.join(str(error).split())[:200]}). The folder needs "
            f"config.json, the tokenizer and model.safetensors (model.text.weights=random does without weights)"
        ) from error


def _declares_code(source: str) -> bool:
    config = Path(source) / "config.json"
    return config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))
