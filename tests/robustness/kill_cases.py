"""The commands that ``tests.robustness.kills`` kills, their inputs, and the outputs that are compared."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from ctclip.preprocessing.spec import PreprocessingSpec
from tests.end_to_end.conftest import TINY
from tests.robustness.processes import Command
from tests.unit.adaptation.conftest import Clinic, write_clinic

PUBLISHED = Path(__file__).parents[1] / "golden" / "data"
VOLUMES, SCALE = 16, 12
# Keys whose values are times and rates.
TIMED = ("second", "time", "per_s", "memory", "wait", "rate_of", "volumes_s")
# The demo's spec at half its resolution; and a coarser one, for a store with another spec.
SPECS = {
    "half": ((9.0, 6.4, 6.4), (32, 48, 64)),
    "coarse": ((18.0, 12.8, 12.8), (16, 32, 32)),
}
SECONDS = 600
ADAPTED = ["training.epochs=1", "training.batch=8", "training.checkpoint_every=1", "training.keep_checkpoints=4", "training.log_every=1", "data.workers=0"]  # fmt: skip
DECODER = ["networks.channels=[8]", "networks.latent=2", "networks.width=[32]", "networks.depth=1", "crop=null", "autoencoder.steps=60", "autoencoder.batch=2", "flow.steps=60", "flow.batch=4"]  # fmt: skip


@dataclass
class Case:
    """A command that writes to ``place``; ``other``: the same command with different inputs; ``given``: files that must
    be in ``place`` beforehand, by name."""

    name: str
    place: Path
    arguments: list[str]
    other: list[str] | None = None
    given: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for name, source in self.given.items():
            shutil.copytree(source, self.place / name)

    def whole(self, other: bool = False) -> dict[str, str]:
        """The output of the undisturbed command, and its duration."""
        self.reset()
        began = time.monotonic()
        done = start(self, other).wait(SECONDS)
        self.seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"{self.name}: exit code {done.returncode}: {done.stderr[-2000:]}")
        return tree(self.place)


def start(case: Case, other: bool = False) -> Command:
    """The command, with its own temporary folder beside the output."""
    scratch = case.place.with_name(f"{case.place.name}.tmp")
    scratch.mkdir(exist_ok=True)
    patch = f"import os, tempfile; os.environ['TMPDIR'] = {str(scratch)!r}; tempfile.tempdir = None"
    return Command(case.other if other and case.other else case.arguments, patch)


def cases(work: Path) -> list[Case]:
    """Every command that writes, with inputs made by the commands before it."""
    inputs, out = work / "inputs", work / "out"
    text = _published_text(work / "text")
    specs = {}
    for name, (spacing, shape) in SPECS.items():
        specs[name] = work / f"{name}.yaml"
        PreprocessingSpec(name, spacing=spacing, shape=shape).save(specs[name])
    small, cohort, store, run = (inputs / name for name in ("small", "cohort", "store", "run"))
    model, first, second = run / "model", inputs / "first", inputs / "second"
    # For commands that compare groups of patients and refuse small groups.
    many, small_model = Clinic(inputs / "clinic" / "store", inputs / "clinic" / "model")
    parts = [inputs / "parts" / name for name in ("a", "b")]
    tiny = [*TINY, "training.keep_checkpoints=4", f"preprocessing={specs['half']}"]
    scored = ["--store", str(store), "--protocol", "phantom", "--bootstrap", "20"]
    ready = work / "ready"
    for name, arguments in {} if ready.exists() else {
        "small": ["phantom", str(small), "--volumes", "8", "--scale", str(SCALE), "--seed", "3"],
        "cohort": ["phantom", str(cohort), "--volumes", str(VOLUMES), "--scale", str(SCALE), "--rare-floor", "0.5", "--valid-fraction", "0.5"],
        "store": ["preprocess", str(cohort), "--output", str(store), "--spec", str(specs["half"])],
        "run": ["train", "--config", "phantom_tiny", "--store", str(store), "--output", str(run), *tiny, "training.epochs=1"],
        "first": ["zero-shot", "--model", str(model), "--store", str(store), "--embed-reports", "--output", str(first)],
        "second": ["zero-shot", "--model", str(model), "--store", str(store), "--split", "valid", "--embed-reports", "--output", str(second)],
        "index": ["index", "--model", str(model), "--store", str(store), "--output", str(inputs / "index")],
        "scored": ["evaluate", str(first / "predictions.csv"), *scored, "--output", str(inputs / "scored")],
        "rescored": ["evaluate", str(second / "predictions.csv"), *scored, "--output", str(inputs / "rescored")],
    }.items():  # fmt: skip
        done = Command(arguments).wait(SECONDS)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    if not ready.exists():
        write_clinic(inputs / "clinic")
        _ingredients(small_model, many, parts)
    ready.touch()

    def case(
        name: str, *words: object, other: list[object] | None = None, given: dict[str, Path] | None = None
    ) -> Case:
        place = out / name.replace(" ", "-")
        fill = lambda all_words: [str(word).replace("OUT", str(place)) for word in all_words]  # noqa: E731
        command = name.split()
        return Case(name, place, [*command, *fill(words)], [*command, *fill(other)] if other else None, given or {})

    used, compared = ["--model", model, "--store", store], ["--model", small_model, "--store", many]
    predicted = first / "predictions.csv", second / "predictions.csv"
    scan, another = sorted(cohort.rglob("*.nii.gz"))[:2]
    table = inputs / "labels.csv"
    pd.read_parquet(store / "cohort.parquet").to_csv(table, index=False)
    return [
        case("phantom", "OUT/c", "--volumes", 8, "--scale", SCALE, "--seed", 3, "--workers", 2,
             other=["OUT/c", "--volumes", 8, "--scale", SCALE, "--seed", 4, "--workers", 2]),
        case("preprocess", small, "--output", "OUT/s", "--spec", specs["half"], "--workers", 2,
             other=[small, "--output", "OUT/s", "--spec", specs["coarse"], "--workers", 2]),
        case("quality", store, "--output", "OUT/q.html", other=[store, "--output", "OUT/q.html", "--split", "valid"]),
        case("train", "--config", "phantom_tiny", "--store", store, "--output", "OUT/r", *tiny, "training.epochs=1",
             other=["--config", "phantom_tiny", "--store", store, "--output", "OUT/r", *tiny, "training.epochs=1", "seed=1"]),
        case("export", run, "--output", "OUT/m"),
        case("import-checkpoint", PUBLISHED / "checkpoint.pt", "--text-encoder", text, "--output", "OUT/m"),
        case("zero-shot", *used, "--output", "OUT/p", "--batch", 1, "--embed-reports",
             other=[*used, "--output", "OUT/p", "--batch", 1, "--split", "valid"]),
        case("embed", *used, "--output", "OUT/e.parquet", other=[*used, "--output", "OUT/e.parquet", "--split", "valid"]),
        case("index", *used, "--output", "OUT/i", other=[*used, "--output", "OUT/i", "--split", "valid"]),
        case("calibrate", predicted[0], "--model", "OUT/model", "--store", store, given={"model": model},
             other=[predicted[0], "--model", "OUT/model", "--store", store, "--method", "temperature"]),
        case("evaluate", predicted[0], *scored, "--run", run, "--output", "OUT/v",
             other=[predicted[1], *scored, "--output", "OUT/v"]),
        case("report", inputs / "scored", inputs / "rescored", "--output", "OUT/r.html",
             other=[inputs / "rescored", "--output", "OUT/r.html"]),
        case("explain", scan, "--model", model, "--output", "OUT/x", "--abnormality", "Emphysema",
             other=[another, "--model", model, "--output", "OUT/x", "--abnormality", "Emphysema"]),
        case("find", scan, "a nodule", "--model", model, "--output", "OUT/f",
             other=[another, "a nodule", "--model", model, "--output", "OUT/f"]),
        case("probe", "--model", "OUT/model", "--store", store, "--output", "OUT/p", "--percent", "100", given={"model": model}),
        case("read-reports", store, "--label-set", "ct_rate_18", "--output", "OUT/labels.csv",
             other=[table, "--label-set", "ct_rate_18", "--output", "OUT/labels.csv"]),
        case("clean-reports", store, "--label-set", "ct_rate_18", "--output", "OUT/findings.csv"),
        case("prompts mine", "--store", store, "--output", "OUT/mined.yaml",
             other=["--store", store, "--output", "OUT/mined.yaml", "--split", "valid"]),
        case("labels from-csv", table, "--output", "OUT/mine.yaml"),
        case("draft", "--store", store, "--model", model, "--method", "template", "--count", 6, "--output", "OUT/d.csv",
             other=["--store", store, "--model", model, "--method", "template", "--count", 4, "--output", "OUT/d.csv"]),
        case("audit doubles", "--store", store, "--output", "OUT/d"),
        case("similar", "--text", "a nodule", "--index", inputs / "index", "--output", "OUT/s.csv",
             other=["--text", "an effusion", "--index", inputs / "index", "--output", "OUT/s.csv"]),
        case("publish", model, "--output", "OUT/copy", "--licence", "other"),
        case("adapt --method coop", "--model", "OUT/model", "--store", many, "--output", "OUT/a", "steps=300", given={"model": small_model},
             other=["--model", "OUT/model", "--store", many, "--output", "OUT/a", "steps=300", "--seed", 1]),
        case("adapt --method caption", "--model", "OUT/model", "--store", many, "--output", "OUT/a", "depth=1", "epochs=2", "batch=16",
             given={"model": small_model},
             other=["--model", "OUT/model", "--store", many, "--output", "OUT/a", "depth=1", "epochs=2", "batch=16", "--seed", 1]),
        case("adapt --method prior", "--model", "OUT/model", "--store", many, "--output", "OUT/a", "kind=diffusion", "epochs=100", "width=64", "batch=32",
             given={"model": small_model},
             other=["--model", "OUT/model", "--store", many, "--output", "OUT/a", "kind=ridge"]),
        case("adapt --method decode", "--model", "OUT/model", "--store", many, "--output", "OUT/a", *DECODER, given={"model": small_model},
             other=["--model", "OUT/model", "--store", many, "--output", "OUT/a", *DECODER, "--seed", 1]),
        case("adapt --method vocabfine", *compared, "--output", "OUT/a", *ADAPTED, other=[*compared, "--output", "OUT/a", *ADAPTED, "--seed", 1]),
        case("soup", *parts, "--store", many, "--split", "valid", "--output", "OUT/s"),
        case("locate", cohort, "--masks", cohort / "masks", "--model", model, "--split", "valid", "--output", "OUT/l.json",
             other=[cohort, "--masks", cohort / "masks", "--model", model, "--split", "train", "--output", "OUT/l.json"]),
        case("analyze", *compared, "--output", "OUT/a", other=[*compared, "--split", "train", "--output", "OUT/a"]),
        case("filter-pairs", *compared, "--output", "OUT/f", other=[*compared, "--seed", 1, "--output", "OUT/f"]),
        case("audit data", *compared, "--output", "OUT/d"),
        case("audit model", *compared, "--output", "OUT/m", other=[*compared, "--split", "train", "--output", "OUT/m"]),
        case("summarise", "--model", "OUT/model", "--store", many, given={"model": small_model},
             other=["--model", "OUT/model", "--store", many, "--seed", 1]),
        case("imagine", "a nodule", "--model", model, "--store", store, "--number", 3, "--steps", 10, "--output", "OUT/i.nii.gz",
             other=["an effusion", "--model", model, "--store", store, "--number", 3, "--steps", 10, "--output", "OUT/i.nii.gz"]),
        case("explain --method counterfactual", scan, "--model", model, "--output", "OUT/x", "--abnormality", "Emphysema", "--budget", 20,
             other=[another, "--model", model, "--output", "OUT/x", "--abnormality", "Emphysema", "--budget", 20]),
    ]  # fmt: skip


def _ingredients(model: Path, store: Path, folders: list[Path]) -> None:
    """Two models whose mean is better than each of them, so that `ctclip soup` writes: the model with opposite
    perturbations."""
    weights = load_file(model / "model.safetensors")
    for seed in range(50):
        random = torch.Generator().manual_seed(seed)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder)
        noise = {name: torch.randn(one.shape, generator=random) * one.std() for name, one in weights.items() if one.is_floating_point() and one.numel() > 1}  # fmt: skip
        for folder, sign in zip(folders, (1, -1), strict=True):
            save_file({name: one + sign * noise.get(name, 0) for name, one in weights.items()}, folder / "model.safetensors")  # fmt: skip
        tried = folders[0].with_name("tried")
        done = Command(["soup", *map(str, folders), "--store", str(store), "--split", "valid", "--output", str(tried)]).wait(SECONDS)  # fmt: skip
        if done.returncode == 0:
            return
        if done.returncode != 3:
            raise RuntimeError(f"soup: {done.stderr[-2000:]}")
    raise RuntimeError("no two models have a better mean")


def _published_text(folder: Path) -> Path:
    """The tokenizer and configuration of the recorded checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(115))]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    shape = json.loads((PUBLISHED / "config.json").read_text())["bert"]
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **shape}))
    return folder


def tree(place: Path) -> dict[str, str]:
    """The digest of each file below ``place``, by its relative name."""
    digests = {}
    for path in sorted(place.rglob("*")):
        if path.name.endswith(".lock") or "tensorboard" in path.parts or not path.is_file():
            continue
        digests[str(path.relative_to(place))] = hashlib.sha256(_content(path)).hexdigest()
    return digests


def _content(path: Path) -> bytes:
    if path.name in ("calibration.json", "adaptation.json"):
        values = json.loads(path.read_text())
        return json.dumps({**values, "salt": "", "patients": len(values["patients"])}).encode()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{k: v for k, v in line.items() if not any(word in k for word in TIMED)} for line in lines]).encode()  # fmt: skip
    if path.name == "page.html":
        # The file contains the time that the maps took.
        return re.sub(rb"[\d.]+ s\b", b"", path.read_bytes())
    return path.read_bytes()
