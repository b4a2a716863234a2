"""The training loop: batches in, a model folder out."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ctclip import distributed, extras
from ctclip.config import Config
from ctclip.config_files import find_config
from ctclip.data.dataset import ReadBatch, ScanSampler, StoredVolumes, as_read, rarity_weights
from ctclip.errors import TrainingError
from ctclip.findings import FINDINGS
from ctclip.inference.prompts import load_prompts
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.folder import save_model
from ctclip.models.text import load_tokenizer, train_tokenizer
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.training.allocator import keep_freed_memory
from ctclip.training.checkpoints import Checkpoints
from ctclip.training.engine import Engine
from ctclip.training.records import MetricsLog, claim_run, open_run
from ctclip.training.step import ContrastiveStep
from ctclip.training.text_warmup import lock_text, read_all, warm_up_text
from ctclip.training.validation import Validation
from ctclip.versions import revision

# sysexits.h's "temporary failure, try again": what slurm/train.sbatch requeues on.
INTERRUPTED = 75


class Interrupted(Exception):
    """The run was asked to stop, has written a checkpoint, and wants to be started again."""


def train(config: Config, output: Path, *, force: bool = False) -> Path:
    """Train as ``config`` says and return the model folder ``output/model``.

    A run that was interrupted continues from its last checkpoint; a finished one returns at once. Raises Interrupted
    after SIGTERM or SIGUSR1, once the step at hand is done and its checkpoint written.
    """
    extras.check("train")
    with distributed.process_group() as device, Signals() as signals:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            keep_freed_memory()
        held: list[IO[str]] = []
        try:
            _on_main(lambda: held.append(claim_run(output)))
            return _train(config, output, device, signals, force)
        except RuntimeError as error:
            # torch says so from a signal handler: it may come up anywhere.
            if "DataLoader worker" in str(error):
                raise _worker_died() from error
            raise
        finally:
            for stream in held:
                stream.close()


class Signals:
    """Notes SIGTERM and SIGUSR1 (a preempted or ending Slurm job) for the loop to see between two steps."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = number


def _train(config: Config, output: Path, device: torch.device, signals: Signals, force: bool) -> Path:
    # The model folder takes them at the end: what is wrong with them is said here.
    prompts = load_prompts(config.prompts)
    labels = list(FINDINGS) if reads_labels(config) else []
    data = StoredVolumes(config.data, config.data.train_split, seed=config.seed, labels=labels)
    if data.spec.name != config.preprocessing:
        raise TrainingError(
            f"{config.data.store}: prepared with spec {data.spec.name!r}, the configuration wants "
            f"{config.preprocessing!r}. Run `ctclip preprocess --spec {config.preprocessing}`, or set preprocessing="
        )
    _on_main(lambda: open_run(output, config, force=force))
    torch.manual_seed(config.seed)
    model = build_model(config.model, run_tokenizer(config, output, data))
    checkpoints = Checkpoints(output / "checkpoints", config.training.keep_checkpoints, data.spec.hash)
    first, resumed = checkpoints.newest()
    warmup = config.training.text_warmup
    if not resumed and warmup.steps:
        warm_up_text(model, data.reports, warmup, seed=config.seed, device=device)
        if warmup.locks:
            lock_text(model, data.reports, device)
    elif warmup.locks:
        model.lock_text()
    engine = Engine(ContrastiveStep(model, config.objectives, labels, prompts), config, device, resumed)
    # At stage 3 nothing read is kept.
    if resumed and warmup.locks and config.training.zero.stage < 3:
        read_all(model, data.reports, device)
    del resumed
    sampler, steps = _sampler(config, data, first)
    if first < steps:
        Run(config, output, engine, checkpoints, signals).train(data, sampler, steps)
    state = engine.parameters()
    _on_main(lambda: save_run_model(output / "model", config, model, data.spec, len(data), state))
    return output / "model"


class Run:
    """The loop itself: steps, log lines, validations and checkpoints."""

    def __init__(
        self, config: Config, output: Path, engine: Engine, checkpoints: Checkpoints, signals: Signals
    ) -> None:
        self.config, self.settings = config, config.training
        self.output, self.engine, self.checkpoints, self.signals = output, engine, checkpoints, signals
        self.validation = Validation(config) if self.settings.validate_every else None
        self.shown = ""
        self.divergence = Divergence()
        self.good = 0  # steps after which the loss was still where it belongs

    def train(self, data: StoredVolumes, sampler: ScanSampler, steps: int) -> None:
        """Steps ``sampler.start`` to ``steps``."""
        main = distributed.is_main()
        self.good = sampler.start
        log = MetricsLog(self.output, sampler.start, self.settings.wandb_project) if main else None
        try:
            self._steps(iter(self._batches(data, sampler)), data.spec, sampler, steps, log)
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            if log is not None:
                log.close()

    def _steps(
        self, stream: Any, spec: PreprocessingSpec, sampler: ScanSampler, steps: int, log: MetricsLog | None
    ) -> None:
        numbers: Any = range(sampler.start, steps)
        if log is not None:
            numbers = track(numbers, steps - sampler.start, "training", "steps", lambda: self.shown)
        meter = Meter()
        for step in numbers:
            with meter.waiting():
                read = _next(stream)
            logged = self.engine.step(read.on(self.engine.device, spec), step, steps)
            meter.volumes += self.settings.batch
            if step == self.engine.labels_until(steps):
                self.divergence = Divergence()  # more is summed from here on: another loss
            self._check(logged, step)
            done, last = step + 1, step + 1 == steps
            if log is not None and (done % self.settings.log_every == 0 or last):
                logged |= {"epoch": step / sampler.steps_per_epoch, **meter.read()}
                logged["memory_gb"] = _memory_gb(self.engine.device)
                log.write(step, logged)
                self.shown = _line(logged)
            stop = distributed.any_rank(self.signals.received is not None, self.engine.device)
            validated = None
            if self.validation is not None and not stop and (done % self.settings.validate_every == 0 or last):
                validated = self.validation(self.engine)
                if log is not None:
                    log.write(step, validated)
                meter.read()
            if done % self.settings.checkpoint_every == 0 or last or stop or validated is not None:
                state = self.engine.state()
                if log is not None:
                    self.checkpoints.save(done, state, None if validated is None else validated["valid_loss"])
            if stop and not last:
                self.checkpoints.wait()
                # A rank that leaves early would have the launcher end the one that still writes.
                distributed.barrier()
                raise Interrupted(f"stopped after step {done} of {steps}; the same command continues from there")

    def _batches(self, data: StoredVolumes, sampler: ScanSampler) -> Any:
        return DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=as_read,
            num_workers=self.config.data.workers,
            persistent_workers=self.config.data.workers > 0,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _check(self, logged: dict[str, float], step: int) -> None:
        """Stop at the first loss or gradient that is not a number: what follows it is lost, and so would a checkpoint be."""
        loss, norm = logged["loss"], logged["gradient_norm"]
        risen = self.divergence.seen(loss)
        if math.isfinite(loss) and math.isfinite(norm) and risen <= 1:
            if risen <= 0.5:
                self.good = step + 1
            return
        self.checkpoints.wait()
        # The figures are of all ranks, so all come here; one that left early would have the launcher end the one that writes.
        distributed.barrier()
        what = f"the loss has grown to {loss:.3g}" if math.isfinite(loss) else f"the loss is {loss}"
        if math.isfinite(loss) and not math.isfinite(norm):
            what = "the gradient is not finite"
        raise TrainingError(
            f"{what} at step {step} (logit scale {logged['logit_scale']:.3g}, gradient norm {norm:.3g}, learning rate "
            f"{logged['learning_rate']:.3g}): lower training.learning_rate or raise training.warmup, with --force to go on in "
            f"this folder; {self._last_good()}"
        )

    def _last_good(self) -> str:
        found = self.checkpoints.found()
        if not found:
            return "no checkpoint had been written yet"
        good = [path for step, path in found if step <= self.good]
        if not good:
            return f"all checkpoints kept are of steps after {self.good}, when it had begun: start in another folder"
        later = "" if good[0] == found[0][1] else ": remove those after it, the run would go on from them"
        return f"the last good checkpoint is {good[0]}{later}"


class Meter:
    """Volumes a second, and the share of the time that was spent waiting for them, since the last reading."""

    def __init__(self) -> None:
        self.began, self.waited, self.volumes = time.monotonic(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        asked = time.monotonic()
        yield
        self.waited += time.monotonic() - asked

    def read(self) -> dict[str, float]:
        elapsed = time.monotonic() - self.began
        found = {"volumes_per_second": self.volumes / elapsed, "data_wait": self.waited / elapsed}
        self.began, self.waited, self.volumes = time.monotonic(), 0.0, 0
        return found


class Divergence:
    """Whether the loss leaves the ground it began on, by its running mean over some 20 steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.mean = 0.0
        self.first: float | None = None

    def seen(self, loss: float) -> float:
        """Note a loss; how far it has risen: above 1, at more than twice (and a nat above) what it was after the first
        20 steps, the run diverges."""
        self.steps += 1
        self.mean += (loss - self.mean) / min(self.steps, 20)
        if self.steps == 20:
            self.first = self.mean
        return 0.0 if self.first is None else (self.mean - self.first) / (self.first + 1)


def _next(stream: Any) -> ReadBatch:
    """The next batch; what went wrong in a reading process becomes one line here."""
    try:
        batch: ReadBatch = next(stream)
        return batch
    except PreprocessingError as error:
        # torch wraps what a worker raised in the worker's whole traceback; its last line is the message.
        said = str(error).strip().splitlines()[-1]
        raise TrainingError(said.partition("PreprocessingError: ")[2] or said) from error
    except (ConnectionError, EOFError) as error:
        raise _worker_died() from error


def _worker_died() -> TrainingError:
    # From here on torch's handler would raise a second time, wherever the first is being told.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return TrainingError(
        "a reading process died (out of memory?): lower data.workers, and start the same command again: it "
        "continues from the last checkpoint"
    )


def _line(logged: dict[str, float]) -> str:
    return (
        f"loss {logged['loss']:.3f}, scale {logged['logit_scale']:.1f}, rate {logged['learning_rate']:.1e}, "
        f"{logged['volumes_per_second']:.1f} volumes/s, waiting {logged['data_wait']:.0%}, {logged['memory_gb']:.1f} GB"
    )


def _memory_gb(device: torch.device) -> float:
    """The most memory this rank has held: of its GPU, or resident in the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reads_labels(config: Config) -> bool:
    """Whether the run looks at labels in any way; if it does, it says so wherever its figures are shown."""
    return config.objectives.reads_labels or config.data.rarity > 0


def _sampler(config: Config, data: StoredVolumes, first: int) -> tuple[ScanSampler, int]:
    weights = None
    if config.data.rarity and data.labels is not None:
        weights = rarity_weights(data.labels, data.scan_numbers, config.data.rarity)

    def make(steps: int) -> ScanSampler:
        return ScanSampler(
            data.scan_numbers,
            config.training.batch,
            steps,
            seed=config.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start=first,
            weights=weights,
        )

    steps = max(1, round(config.training.epochs * make(first).steps_per_epoch))
    return make(steps), steps


def run_tokenizer(config: Config, output: Path, data: StoredVolumes | None) -> Any:
    """The pretrained encoder's tokenizer, or one learned once from the training reports and kept in the run."""
    if config.model.text.pretrained is not None:
        return load_tokenizer(config.model.text.pretrained)
    folder = output / "tokenizer"

    def learn() -> None:
        if not (folder / "tokenizer.json").is_file() and data is not None:
            texts = np.unique([report.text() for report in data.reports])
            train_tokenizer(texts.tolist(), config.model.text.vocabulary).save_pretrained(folder)

    _on_main(learn)
    return load_tokenizer(folder)


def save_run_model(
    folder: Path,
    config: Config,
    model: DualEncoder,
    spec: PreprocessingSpec,
    volumes: int,
    state: dict[str, torch.Tensor],
) -> None:
    """A model folder of a checkpoint's state (names under ``state/model.``)."""
    prefix = "state/model."
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    card = _card(config, volumes)
    save_model(folder, model, spec, prompts=find_config(config.prompts, "prompts"), card=card, state=tensors)


def _card(config: Config, volumes: int) -> str:
    supervision = "label-supervised" if reads_labels(config) else "reports only"
    return (
        f"# {config.name}\n\nsupervision: {supervision}\n\n"
        f"Trained on {volumes} volumes of {config.data.train_split!r}, spec {config.preprocessing!r}, seed {config.seed}, "
        f"code {revision()}. The configuration of the run is in the run's config.yaml. Not a medical device.\n"
    )


def _on_main(action: Any) -> None:
    """Do something on rank 0; if it fails there, every rank stops with its message instead of waiting for it."""
    fault: Exception | None = None
    if distributed.is_main():
        try:
            action()
        except Exception as error:
            fault = error
    message = distributed.broadcast_object(None if fault is None else str(fault))
    if fault is not None:
        raise fault
    if message is not None:
        sys.exit(2)
