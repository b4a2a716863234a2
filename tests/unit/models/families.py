"""Tiny models of the families of text encoders, each with its own kind of tokenizer, as folders that Hugging Face
writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as tk
import torch
import transformers as hf

REPORTS = [
    "The heart is enlarged.",
    "No pleural effusion is seen.",
    "A nodule of 5 mm lies in the upper lobe.",
    "Emphysema; no consolidation, no ground-glass opacity (both lungs).",
] * 8
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
POSITIONS = 40


def _bpe(special: list[str], **ending: str) -> dict[str, Any]:
    """Vocabulary and merges of a byte-level BPE. ``ending``: ``end_of_word_suffix``."""
    tokenizer = tk.Tokenizer(tk.models.BPE(**ending))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **ending
    )
    tokenizer.train_from_iterator(REPORTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    tokenizer = tk.Tokenizer(tk.models.Unigram())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Metaspace()
    trainer = tk.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token=special[-1], show_progress=False
    )
    tokenizer.train_from_iterator(REPORTS, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]


def wordpiece() -> Any:
    characters = sorted({character for report in REPORTS for character in report.lower() if character != " "})
    words = sorted({word.strip(".,;()").lower() for report in REPORTS for word in report.split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *words]
    return hf.BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))})


def _roberta() -> Any:
    return hf.RobertaTokenizer(**_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))


def _modernbert() -> Any:
    """As published: a byte-level BPE with BERT's special tokens, without its own class."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    tokenizer = tk.Tokenizer(tk.models.BPE(**_bpe(special)))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token", "mask_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@dataclass(frozen=True)
class Family:
    """``model``: from vocabulary size and sizes of a BERT; ``special``: ids before and after each text."""

    model: Callable[[int], Any]
    tokenizer: Callable[[], Any]
    poolings: tuple[str, ...]
    special: tuple[int, int]
    longest: int | None = POSITIONS


def _of(kind: Any, shape: Any, **options: Any) -> Callable[[int], Any]:
    return lambda tokens: kind(shape(vocab_size=tokens, **{**SIZES, **options}))


def _named(kind: Any, shape: Any, **options: Any) -> Callable[[int], Any]:
    """For a family with different names for every size."""
    return lambda tokens: kind(shape(vocab_size=tokens, **options))


BOTH_WAYS = ("mean", "cls", "attention")
FAMILIES: dict[str, Family] = {
    "bert": Family(_of(hf.BertModel, hf.BertConfig, max_position_embeddings=POSITIONS), wordpiece, BOTH_WAYS, (1, 1)),
    "bert for words": Family(_of(hf.BertForMaskedLM, hf.BertConfig, max_position_embeddings=POSITIONS), wordpiece, BOTH_WAYS, (1, 1)),
    "roberta": Family(_of(hf.RobertaModel, hf.RobertaConfig, max_position_embeddings=POSITIONS + 2), _roberta, BOTH_WAYS, (1, 1)),
    "xlm-roberta": Family(
        _of(hf.XLMRobertaModel, hf.XLMRobertaConfig, max_position_embeddings=POSITIONS + 2),
        lambda: hf.XLMRobertaTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"])), BOTH_WAYS, (1, 1),
    ),
    "longformer": Family(
        _of(hf.LongformerModel, hf.LongformerConfig, max_position_embeddings=POSITIONS + 2, attention_window=8, pad_token_id=1),
        _roberta, BOTH_WAYS, (1, 1),
    ),
    "distilbert": Family(
        _named(hf.DistilBertModel, hf.DistilBertConfig, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=POSITIONS),
        wordpiece, BOTH_WAYS, (1, 1),
    ),
    "electra": Family(_of(hf.ElectraModel, hf.ElectraConfig, max_position_embeddings=POSITIONS, embedding_size=16), wordpiece, BOTH_WAYS, (1, 1)),
    "deberta-v2": Family(
        _of(hf.DebertaV2Model, hf.DebertaV2Config, max_position_embeddings=POSITIONS, relative_attention=True, pos_att_type=["p2c", "c2p"],
            position_biased_input=False, position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm"),
        lambda: hf.DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])), BOTH_WAYS, (1, 1),
    ),
    "modernbert": Family(
        _of(hf.ModernBertModel, hf.ModernBertConfig, max_position_embeddings=POSITIONS, pad_token_id=3, cls_token_id=1, sep_token_id=2,
            bos_token_id=1, eos_token_id=2, local_attention=8),
        _modernbert, BOTH_WAYS, (1, 1),
    ),
    "clip": Family(
        lambda tokens: hf.CLIPModel(hf.CLIPConfig(
            text_config={**SIZES, "vocab_size": tokens, "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 1},
            vision_config={**SIZES, "image_size": 16, "patch_size": 8})),
        lambda: hf.CLIPTokenizer(**_bpe(["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>")), ("cls", "mean", "last"), (1, 1),
    ),
    "t5": Family(
        _named(hf.T5ForConditionalGeneration, hf.T5Config, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0),
        lambda: hf.T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0), ("mean", "attention", "last"), (0, 1), None,
    ),
    "gpt2": Family(
        _named(hf.GPT2LMHeadModel, hf.GPT2Config, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS),
        lambda: hf.GPT2Tokenizer(**_bpe(["<|endoftext|>"])), ("last", "mean", "attention"), (0, 0),
    ),
    "qwen2": Family(
        _of(hf.Qwen2Model, hf.Qwen2Config, num_key_value_heads=1, max_position_embeddings=POSITIONS),
        lambda: hf.Qwen2Tokenizer(**_bpe(["<|endoftext|>"])), ("last", "mean", "attention"), (0, 0),
    ),
}  # fmt: skip


def family_folder(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder of one family, with random weights."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    family.model(len(tokenizer)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
