"""The configuration schema: frozen, typed, validated; nothing is read from the environment and nothing is global.

Encoders and objectives define their own sections beside their code; they are looked up by name (``ctclip/plugins.py``).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, model_validator

from ctclip import plugins
from ctclip.errors import ConfigError
from ctclip.schema import Section, read_typed, validated

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=4096)]


def _in_order(window: tuple[float, float]) -> tuple[float, float]:
    if window[0] >= window[1]:
        raise ValueError("the lower limit of a HU window must be below its upper limit")
    return window


HuWindow = Annotated[tuple[float, float], AfterValidator(_in_order)]


class EncoderConfig(Section):
    """Settings that every volume encoder has; each adds its own."""

    kind: str = Field(description="encoder: vit3d, ctvit, resnet3d, slices, or your own as module:Name")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    tuning: Literal["full", "lora"] = Field(
        "full", description="full: train all weights; lora: train low-rank adapters and freeze the weights"
    )
    lora_rank: int = Field(8, ge=1, le=4096, description="rank of the low-rank adapters")
    lora_projection: bool = Field(
        False,
        description="lora: also train an adapter instead of all weights of the projection to the shared embedding",
    )

    @model_validator(mode="after")
    def _projection_has_adapters(self) -> EncoderConfig:
        if self.lora_projection and self.tuning != "lora":
            raise ValueError("lora_projection=true needs tuning=lora")
        return self


def encoder_config(given: Any) -> Any:
    """The section of the encoder that ``given`` names; ``kind: module:Name`` uses the user's own class."""
    if not isinstance(given, dict):
        return given
    values = {"kind": "vit3d", **given}
    return validated(plugins.find("encoder", str(values["kind"])).Config, values, path="model.volume")


VolumeEncoderConfig = Annotated[SerializeAsAny[EncoderConfig], BeforeValidator(encoder_config)]


class TextConfig(Section):
    """A text encoder: a small BERT trained from scratch, or any model of Hugging Face (BERT and similar models, CLIP,
    T5, decoders)."""

    pretrained: str | None = Field(
        None, description="folder, or name on the Hugging Face Hub; null: train a small BERT from scratch"
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="random: take only the architecture and tokenizer of `pretrained`",
    )
    vocabulary: int = Field(
        2000, ge=64, le=10**6, description="number of WordPiece tokens learned from the training reports"
    )
    width: int = Field(192, ge=1, le=2**16, description="number of channels of a token, in the BERT from scratch")
    depth: int = Field(3, ge=1, le=512, description="number of transformer layers of the BERT from scratch")
    heads: int = Field(
        6, ge=1, le=1024, description="number of attention heads of the BERT from scratch; it must divide the width"
    )
    max_tokens: int = Field(
        512,
        ge=3,
        le=10**6,
        description="maximum number of tokens of a chunk; longer reports are cut into chunks at "
        "sentence ends, whose vectors are averaged",
    )
    chunks: Literal["full", "sentence"] = Field(
        "full",
        description="full: encode as many sentences together as fit; sentence: encode each sentence alone and "
        "average them",
    )
    pooling: Literal["cls", "mean", "attention", "last"] = Field(
        "mean",
        description="cls: the classification token; last: the last token, for encoders that read from left to right",
    )
    tuning: Literal["full", "lora", "frozen"] = Field(
        "full",
        description="full: train all weights; lora: train low-rank adapters and freeze the weights; frozen: train nothing",
    )
    lora_rank: int = Field(8, ge=1, le=4096, description="rank of the low-rank adapters")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextConfig:
        if self.pretrained is None and self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")
        return self


class ModelConfig(Section):
    """The dual encoder."""

    volume: VolumeEncoderConfig = Field(default_factory=lambda: encoder_config({}))
    text: TextConfig = TextConfig()
    dim: int = Field(128, ge=1, le=2**16, description="width of the shared embedding")
    projection: Literal["linear", "mlp"] = Field(
        "linear",
        description="map from an encoder's vector to the shared embedding: one layer, or two with a GELU between them",
    )
    standardise: bool = Field(
        False, description="centre and scale the embeddings over the global batch before normalising"
    )
    logit_scale: float = Field(10.0, gt=0, le=10**4, description="initial inverse temperature")
    logit_scale_max: float = Field(100.0, gt=0, le=10**4, description="upper limit of the learned inverse temperature")
    init: str | None = Field(
        None,
        description="model folder, or name on the Hugging Face Hub, whose weights training starts from; null: from "
        "scratch",
    )
    init_sides: Literal["both", "volume", "text"] = Field("both", description="which encoders start from `init`")

    @model_validator(mode="after")
    def _scale_begins_below_its_limit(self) -> ModelConfig:
        if self.logit_scale > self.logit_scale_max:
            raise ValueError(f"logit_scale {self.logit_scale:g} is above logit_scale_max {self.logit_scale_max:g}")
        return self


class AugmentConfig(Section):
    """Random changes of a training volume; amplitudes of 0 switch them off.

    There are no flips, because reports state left and right.
    """

    shift_voxels: int = Field(0, ge=0, le=512, description="maximum shift along each axis, in voxels")
    scale: float = Field(0.0, ge=0, lt=0.5, description="maximum relative change of HU contrast")
    noise_hu: float = Field(0.0, ge=0, le=1000, description="standard deviation of added noise, HU")
    rotate_degrees: float = Field(0.0, ge=0, le=45, description="maximum rotation about each axis, in degrees")
    zoom: float = Field(0.0, ge=0, lt=0.5, description="maximum relative change of size")
    window_hu: float = Field(0.0, ge=0, lt=500, description="maximum shift of each limit of the HU window, in HU")
    crop: float = Field(
        0.0, ge=0, lt=1, description="maximum fraction of each axis that is cropped, as in a smaller scan"
    )


class DataConfig(Section):
    """The data, and how they are presented to the model."""

    store: str | None = Field(None, description="folder written by `ctclip preprocess`")
    train_split: str = Field("train", description="split of the cohort table to train on")
    valid_split: str = Field("valid", description="split that `training.validate_every` scores")
    sections: tuple[str, ...] = Field(
        ("findings", "impression"),
        min_length=1,
        description="columns of the cohort table that form a report, in order",
    )
    label_table: str | None = Field(
        None,
        description="table of your own labels (a CSV of volumes and 0 or 1), used instead of the store's; only volumes with a label are trained on",
    )
    language: str = Field(
        "english", description="language of the reports: a YAML file, or its name in configs/languages"
    )
    views: dict[str, Annotated[float, Field(ge=0, le=10**6)]] = Field(
        {"report": 1.0},
        description="sampling weight of each view of a report: report (all sections), a section by its name, sentence "
        "(one), sentences (a few, in random order), positive (sentences without a negation)",
    )
    views_per_volume: int = Field(
        1, ge=1, le=64, description="number of report views contrasted with each volume in a step"
    )
    shuffle_sentences: bool = Field(False, description="shuffle the sentences of a report each time")
    volumes: int | None = Field(
        None, ge=2, le=10**9, description="number of volumes to train on; null: all of the split"
    )
    min_pair_score: float | None = Field(
        None,
        ge=-(10**9),
        le=10**9,
        description="minimum score (log odds) of the pairs of volume and report to train on, see `ctclip filter-pairs "
        "--keep`; "
        "null: no limit",
    )
    best_pairs: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the pairs to train on, those with the best scores of `ctclip filter-pairs --keep`; "
        "null: all",
    )
    rarity: float = Field(
        0.0,
        ge=0,
        le=10,
        description="exponent by which scans with rare labels are sampled more often; 0: all scans equally often. A "
        "value above 0 uses labels",
    )
    augment: AugmentConfig = AugmentConfig()
    workers: int = Field(2, ge=0, le=256, description="number of reading processes per rank")

    @model_validator(mode="after")
    def _some_view(self) -> DataConfig:
        known = ("report", "sentence", "sentences", "positive", *self.sections)
        for name in self.views:
            if name not in known:
                raise ValueError(f"views: there is no view {name!r}; choose from {', '.join(known)}")
        if sum(self.views.values()) <= 0:
            raise ValueError("views: give at least one view a weight above 0")
        return self


class ObjectiveConfig(Section):
    """Settings that every objective has; each adds its own. A number alone stands for the weight."""

    weight: float = Field(1.0, ge=0, le=10**6, description="weight of the objective's loss in the sum; 0 leaves it out")
    begin: float = Field(0.0, ge=0, lt=1, description="fraction of the steps after which the objective begins")


def objective_configs(given: Any) -> Any:
    """The sections of the objectives that a mapping names; those of weight 0 are left out."""
    if not isinstance(given, dict):
        return given
    sections: dict[str, ObjectiveConfig] = {}
    for name, value in given.items():
        if isinstance(value, ObjectiveConfig):
            section = value
        else:
            value = read_typed(value)
            values = {"weight": value} if isinstance(value, int | float) else value
            section = validated(plugins.find("objective", str(name)).Config, values, path=f"objectives.{name}")
        if section.weight > 0:
            sections[str(name)] = section
    if not sections:
        raise ConfigError("objectives: give at least one a weight above 0, for example objectives.clip=1")
    return sections


ObjectiveConfigs = Annotated[dict[str, SerializeAsAny[ObjectiveConfig]], BeforeValidator(objective_configs)]


class ZeroConfig(Section):
    """DeepSpeed ZeRO; can be written as one word: ``training.zero=2`` or ``training.zero=3+offload``."""

    stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what is sharded over the ranks: 0 nothing; 1 optimizer state; 2 gradients, too; 3 parameters, too",
    )
    offload: bool = Field(False, description="keep the optimizer state (and at stage 3 the parameters) in host memory")

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, given: Any) -> Any:
        if not isinstance(given, int | float | str):
            return given
        word = re.fullmatch(r"([0-3])(\+offload)?", str(given))
        if word is None:
            raise ValueError(
                "choose 0, 1, 2 or 3, or 1+offload, 2+offload or 3+offload to keep the optimizer in host memory"
            )
        return {"stage": int(word[1]), "offload": word[2] is not None}

    @model_validator(mode="after")
    def _offloads_what_is_shared(self) -> ZeroConfig:
        if self.offload and self.stage == 0:
            raise ValueError("offload needs stage 1, 2 or 3; it has no effect at stage 0")
        return self


class TextWarmupConfig(Section):
    """Training of the text encoder on reports alone (matching their sections) before the first volume; 0 steps: none."""

    steps: int = Field(
        0, ge=0, le=10**8, description="number of steps of text training before the first volume; 0: none"
    )
    batch: int = Field(128, ge=2, le=10**6, description="number of reports in the global batch")
    learning_rate: float = Field(2e-3, gt=0, le=10, description="peak learning rate of the warm-up")
    keep: float = Field(
        0.7, gt=0, le=1, description="fraction of the sentences of the findings section that the text encoder gets"
    )
    lock: bool = Field(False, description="freeze the text encoder after the warm-up, so that volumes are fitted to it")

    @property
    def locks(self) -> bool:
        return self.lock and self.steps > 0


class FreezeConfig(Section):
    """Encoder layers that are frozen: ``all``, ``none``, or a range such as ``0-5`` (counted from the input; the patch
    or word embedding is frozen with layer 0)."""

    volume: str = Field(
        "none",
        pattern=r"^(none|all|\d+-\d+)$",
        description="layers of the volume encoder to freeze: all, none, or a range such as 0-5",
    )
    text: str = Field(
        "none",
        pattern=r"^(none|all|\d+-\d+)$",
        description="layers of the text encoder to freeze: all, none, or a range such as 0-5",
    )


class TrainingConfig(Section):
    """The optimisation."""

    batch: int = Field(32, ge=2, le=10**6, description="number of volumes in the global batch, over all ranks")
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="number of volumes that a rank encodes at once; if it is below the rank's share of the batch, gradients "
        "take two passes (GradCache)",
    )
    epochs: float = Field(
        10.0, gt=0, le=10**6, description="number of passes over the training scans; fractions are allowed"
    )
    learning_rate: float = Field(
        1e-3, gt=0, le=10, description="peak learning rate of AdamW; it falls to 0 along a cosine"
    )
    text_learning_rate: float | None = Field(
        None, gt=0, le=10, description="peak learning rate of the text encoder; null: the same as learning_rate"
    )
    text_warmup: TextWarmupConfig = TextWarmupConfig()
    weight_decay: float = Field(0.05, ge=0, le=100, description="AdamW's weight decay; not applied to biases and norms")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="AdamW's decay rates of the two moments")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps during which the learning rate rises")
    gradient_clip: float = Field(
        1.0, gt=0, le=10**9, description="maximum norm of the gradient; larger ones are scaled down"
    )
    freeze: FreezeConfig = FreezeConfig()
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor between the learning rates of successive encoder layers, from the last to the first",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="numerical precision of the encoders; bf16 is faster on a GPU or a CPU that has instructions for it, "
        "and slower on others (losses stay in fp32)",
    )
    compile: bool = Field(False, description="compile the volume encoder with torch.compile; needs a C++ compiler")
    zero: ZeroConfig = ZeroConfig()
    checkpoint_every: int = Field(500, ge=1, le=10**9, description="number of steps between two checkpoints")
    keep_checkpoints: int = Field(
        2, ge=1, le=10**6, description="number of newest checkpoints to keep, besides the best one"
    )
    validate_every: int = Field(0, ge=0, le=10**9, description="number of steps between two validations; 0: none")
    validate_volumes: int = Field(512, ge=2, le=10**9, description="maximum number of validation volumes, one per scan")
    summary_patients: int = Field(
        300,
        ge=0,
        le=10**6,
        description="number of training patients from which the model's summary is computed, used to warn of scans unlike "
        "them; 0: no summary",
    )
    wandb_project: str | None = Field(
        None, description="also log to this Weights & Biases project, if wandb is installed"
    )
    log_every: int = Field(10, ge=1, le=10**9, description="number of steps between two lines of the log")


class Config(Section):
    """One training run."""

    name: str = Field("run", description="name of the run, kept in its records")
    seed: int = Field(
        0, ge=0, lt=2**32, description="random seed; the same seed on the same data gives the same weights"
    )
    preprocessing: str = Field("ct_224", description="preprocessing spec of the volumes")
    labels: str | None = Field(
        None, description="label set: a YAML file, or the name of one in configs/labels; null: the store's"
    )
    prompts: str | None = Field(
        None,
        description="prompt set kept with the model: a YAML file, or the name of one in configs/prompts; null: the "
        "label set's",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = Field(default_factory=ModelConfig)
    objectives: ObjectiveConfigs = Field(default_factory=lambda: objective_configs({"clip": 1.0}))
    training: TrainingConfig = TrainingConfig()

    def reads(self, column: str) -> bool:
        """Whether an objective of the run needs ``column`` (``labels``, ``masks``, ...)."""
        return any(column in plugins.find("objective", name).needs for name in self.objectives)

    @property
    def reads_labels(self) -> bool:
        """Whether the run uses labels in any way, which all its results then state."""
        return self.reads("labels") or self.data.rarity > 0

    @model_validator(mode="after")
    def _begins_with_something(self) -> Config:
        if all(section.begin > 0 for section in self.objectives.values()):
            raise ValueError("objectives: at least one must begin at step 0")
        return self
