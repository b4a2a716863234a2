"""The one configuration schema: frozen, typed, validated; nothing is read from the environment and nothing is global."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration; immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)


class ViT3DConfig(Section):
    """Our 3-D vision transformer with a convolutional stem (``ctclip/models/vit3d.py``)."""

    kind: Literal["vit3d"] = "vit3d"
    patch: tuple[int, int, int] = Field((4, 4, 4), description="voxels [slice, row, column] of one stem cell")
    stages: tuple[tuple[int, int], ...] = Field(
        ((64, 1), (128, 1)),
        description="width and 3x3x3 residual convolutions of each stage of the stem; each ends with a strided "
        "one that halves the axes. No stages: a linear patch embedding",
    )
    width: int = 192
    depth: int = 4
    heads: int = 6
    registers: int = 4
    spacing: tuple[float, float, float] = Field((1.5, 1.5, 3.0), description="mm [slice, row, column] of a voxel")
    windows: tuple[tuple[float, float], ...] = Field(
        ((-1000.0, 1000.0),), description="HU windows shown side by side as input channels"
    )
    hu_window: tuple[float, float] = Field((-1000.0, 1000.0), description="HU that -1 and 1 of the input stand for")
    pooling: tuple[Literal["attention", "mean", "max"], ...] = ("attention", "mean")
    extremes: bool = Field(
        False,
        description="beside a patch's voxels, the largest and smallest of them under each window: for small "
        "bright or dark spots, wherever in the patch they lie",
    )
    pool_stem: bool = Field(
        False, description="mean and largest of every stage of the stem beside the pooled tokens: for small findings"
    )
    window: tuple[int, int, int] | None = Field(
        None, description="tokens [slice, row, column] of a local attention window; null: full attention"
    )
    global_every: int = Field(4, ge=1, description="with a window: every n-th layer is a global one")
    global_over: Literal["tokens", "windows"] = Field(
        "tokens",
        description="what a global layer works on: all tokens, or one a window, the mean of its tokens: far cheaper",
    )
    drop_air: bool = Field(False, description="drop tokens of nothing but air outside the body")
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ViT3DConfig:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _windows_to_be_global_over(self) -> ViT3DConfig:
        if self.global_over == "windows" and self.window is None:
            raise ValueError("global_over=windows needs window: without one every layer is over all tokens")
        return self


class CTViTConfig(Section):
    """The published CT-CLIP's encoder (``ctclip/models/ctvit.py``)."""

    kind: Literal["ctvit"] = "ctvit"
    shape: tuple[int, int, int] = Field((240, 480, 480), description="voxels [slice, row, column] of a volume")
    patch: tuple[int, int, int] = Field((10, 20, 20), description="voxels [slice, row, column] of one token")
    width: int = 512
    spatial_depth: int = 4
    temporal_depth: int = 4
    heads: int = 8
    head_width: int = 32
    codebook_size: int = 8192
    quantise: bool = True
    activation_checkpointing: bool = False


class ResNet3DConfig(Section):
    """MONAI's 3-D ResNets (``ctclip/models/resnet3d.py``)."""

    kind: Literal["resnet3d"] = "resnet3d"
    depth: Literal[18, 50] = 18
    stem_stride: tuple[int, int, int] = (2, 2, 2)
    norm: Literal["batch", "group"] = "group"
    width_factor: float = 1.0
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _counts_once(self) -> ResNet3DConfig:
        if self.activation_checkpointing and self.norm == "batch":
            raise ValueError("activation_checkpointing would count a batch's statistics twice: set norm=group")
        return self


class SlicesConfig(Section):
    """A 2-D vision model of Hugging Face on every slice, and an aggregator over slices (``ctclip/models/slices.py``)."""

    kind: Literal["slices"] = "slices"
    pretrained: str = Field("", description="folder or hub name of a vision model, for example facebook/dinov2-small")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: keep the architecture of `pretrained`, not its weights"
    )
    aggregator: Literal["mean", "lstm", "transformer", "cross"] = "transformer"
    depth: int = Field(2, ge=1, description="layers of the transformer or LSTM over slices")
    heads: int = 8
    spacing: float = Field(3.0, gt=0, description="mm between slices")
    every: int = Field(1, ge=1, description="take every n-th slice")
    windows: tuple[tuple[float, float], ...] = Field(
        ((-1000.0, 400.0), (-160.0, 240.0), (-500.0, 1000.0)), description="HU windows shown as the colour channels"
    )
    hu_window: tuple[float, float] = Field((-1000.0, 1000.0), description="HU that -1 and 1 of the input stand for")
    slices_at_once: int = Field(64, ge=1, description="slices encoded together, over the batch")
    activation_checkpointing: bool = False


VolumeEncoderConfig = Annotated[ViT3DConfig | CTViTConfig | ResNet3DConfig | SlicesConfig, Field(discriminator="kind")]


class TextConfig(Section):
    """A text encoder: a small BERT trained from scratch, or any of Hugging Face (BERT's kind, CLIP's, T5's, decoders)."""

    pretrained: str | None = Field(None, description="folder or hub name; null: a small BERT from scratch")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="random: keep the architecture and tokenizer of `pretrained`, not its weights",
    )
    vocabulary: int = Field(2000, description="WordPiece tokens learned from the training reports")
    width: int = 192
    depth: int = 3
    heads: int = 6
    max_tokens: int = Field(512, description="longer reports are cut into chunks at sentence ends and averaged")
    chunks: Literal["full", "sentence"] = Field(
        "full",
        description="full: as many sentences as fit are read together; sentence: each alone, their mean is the report",
    )
    pooling: Literal["cls", "mean", "attention", "last"] = Field(
        "mean",
        description="cls: the token that stands for a text; last: the last token, for encoders that read left to right",
    )
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = 8


class ModelConfig(Section):
    """The dual encoder."""

    volume: VolumeEncoderConfig = ViT3DConfig()
    text: TextConfig = TextConfig()
    dim: int = Field(128, description="width of the shared embedding")
    projection: Literal["linear", "mlp"] = "linear"
    standardise: bool = Field(
        False, description="centre and scale the embeddings over the global batch before normalising"
    )
    logit_scale: float = Field(10.0, gt=0, description="initial inverse temperature")
    logit_scale_max: float = 100.0


class ViewConfig(Section):
    """How often each view of a report is drawn (weights, not probabilities)."""

    report: float = Field(1.0, ge=0, description="findings and impression together")
    findings: float = Field(0.0, ge=0)
    impression: float = Field(0.0, ge=0)
    sentence: float = Field(0.0, ge=0, description="one sentence of findings or impression")
    sentences: float = Field(0.0, ge=0, description="a few sentences, in random order")
    positive: float = Field(0.0, ge=0, description="sentences that negate nothing, by their wording alone")

    @model_validator(mode="after")
    def _some_weight(self) -> ViewConfig:
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("give at least one view a weight above 0")
        return self


class AugmentConfig(Section):
    """Random changes of a training volume; amplitudes of 0 switch them off.

    There are no flips: a report says left and right.
    """

    shift_voxels: int = Field(0, ge=0, description="largest shift along each axis")
    scale: float = Field(0.0, ge=0, lt=0.5, description="largest relative change of HU contrast")
    noise_hu: float = Field(0.0, ge=0, description="standard deviation of added noise, HU")
    rotate_degrees: float = Field(0.0, ge=0, le=45, description="largest turn about each axis")
    zoom: float = Field(0.0, ge=0, lt=0.5, description="largest relative change of size")
    window_hu: float = Field(0.0, ge=0, lt=500, description="largest move of each end of the HU window")
    crop: float = Field(
        0.0, ge=0, lt=1, description="largest share of each axis that is cut away, as of a smaller scan"
    )


class DataConfig(Section):
    """What is read, and how it is shown to the model."""

    store: str | None = Field(None, description="folder written by `ctclip preprocess`")
    train_split: str = "train"
    valid_split: str = "valid"
    views: ViewConfig = ViewConfig()
    views_per_volume: int = Field(1, ge=1, description="report views contrasted with each volume in a step")
    shuffle_sentences: bool = False
    volumes: int | None = Field(None, ge=2, description="learn from so many volumes only; null: all of the split")
    rarity: float = Field(
        0.0, ge=0, description="draw scans by how rare their labels are, to this power; 0: all alike. Reads labels"
    )
    augment: AugmentConfig = AugmentConfig()
    workers: int = Field(2, ge=0, description="reading processes per rank")


class ObjectiveConfig(Section):
    """Weights of the objectives; 0 leaves one out."""

    clip: float = Field(1.0, ge=0, description="symmetric InfoNCE over the global batch")
    convirt: float = Field(0.0, ge=0, description="ConVIRT's weighted bidirectional loss")
    siglip: float = Field(0.0, ge=0, description="pairwise sigmoid loss")
    negatives: int | None = Field(
        None,
        ge=2,
        description="contrast only within groups of so many volumes, as the published training did; null: all",
    )
    by_identity: bool = Field(
        True,
        description="reconstructions of one scan and equal reports are no negatives of each other; false: all but the "
        "volume's own report are, as in the published training",
    )
    memory: int = Field(
        0, ge=0, description="texts of earlier steps that volumes are contrasted with too (clip); 0: the batch alone"
    )
    labels: float = Field(
        0.0, ge=0, description="cross-entropy on report-derived labels, of both embeddings: not zero-shot any more"
    )
    prompts: float = Field(
        0.0, ge=0, description="the same cross-entropy, of the zero-shot scores that the run's prompts give (VocabFine)"
    )
    labels_first: float = Field(
        0.0, ge=0, lt=1, description="share of the steps, the first, in which nothing is contrasted"
    )
    captioning: float = Field(0.0, ge=0, description="writing the report from the volume, word by word")
    mlm: float = Field(0.0, ge=0, description="filling masked words of the report in, reading the volume")

    @property
    def reads_labels(self) -> bool:
        return self.labels > 0 or self.prompts > 0

    @model_validator(mode="after")
    def _contrasts(self) -> ObjectiveConfig:
        if not (self.clip or self.convirt or self.siglip):
            raise ValueError("give clip, convirt or siglip a weight above 0: nothing else joins volumes and reports")
        if self.negatives is not None and self.siglip:
            raise ValueError("negatives belongs to clip and convirt; siglip contrasts every pair")
        if self.memory and (not self.clip or self.negatives is not None):
            raise ValueError("memory gives clip more negatives: it needs clip, and no bound on negatives")
        if self.labels_first and not self.reads_labels:
            raise ValueError("labels_first needs labels or prompts: give one a weight above 0")
        return self


class ZeroConfig(Section):
    """DeepSpeed ZeRO; in one word too: ``training.zero=2`` or ``training.zero=3+offload``."""

    stage: Literal[0, 1, 2, 3] = 1
    offload: bool = Field(False, description="optimizer (and at stage 3 parameters) in host memory")

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, given: Any) -> Any:
        if not isinstance(given, int | float | str):
            return given
        word = re.fullmatch(r"([0-3])(\+offload)?", str(given))
        if word is None:
            raise ValueError(
                "write 0, 1, 2 or 3, or with the optimizer in host memory 1+offload, 2+offload or 3+offload"
            )
        return {"stage": int(word[1]), "offload": word[2] is not None}

    @model_validator(mode="after")
    def _offloads_what_is_shared(self) -> ZeroConfig:
        if self.offload and self.stage == 0:
            raise ValueError("offload needs stage 1, 2 or 3: at stage 0 nothing is moved")
        return self


class TextWarmupConfig(Section):
    """Section matching on reports alone, before the first volume is seen; 0 steps leave it out."""

    steps: int = Field(0, ge=0)
    batch: int = Field(128, ge=2, description="reports in the global batch")
    learning_rate: float = 2e-3
    keep: float = Field(0.7, gt=0, le=1, description="share of the findings' sentences that is shown")
    lock: bool = Field(False, description="afterwards the text side learns no more: volumes are fitted to it")

    @property
    def locks(self) -> bool:
        return self.lock and self.steps > 0


class TrainingConfig(Section):
    """The optimisation."""

    batch: int = Field(32, ge=2, description="volumes in the global batch, over all ranks")
    micro_batch: int | None = Field(
        None,
        description="volumes a rank encodes at once; fewer than its share: two-pass gradients (GradCache)",
    )
    epochs: float = 10.0
    learning_rate: float = 1e-3
    text_learning_rate: float | None = Field(None, description="null: the same as learning_rate")
    text_warmup: TextWarmupConfig = TextWarmupConfig()
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps")
    gradient_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    zero: ZeroConfig = ZeroConfig()
    checkpoint_every: int = Field(500, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones; the best one is kept beside them")
    validate_every: int = Field(0, ge=0, description="steps between validations; 0: none")
    validate_volumes: int = Field(512, ge=2, description="volumes of the validation split, one a scan")
    wandb_project: str | None = Field(None, description="log to this Weights & Biases project too, where installed")
    log_every: int = Field(10, ge=1, description="steps")


class Config(Section):
    """One training run."""

    name: str = "run"
    seed: int = 0
    preprocessing: str = Field("ct_224", description="spec the volumes must have been prepared with")
    prompts: str = Field("report_style", description="prompt set stored with the model")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objectives: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
