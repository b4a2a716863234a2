"""The training loop."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils.data import DataLoader

from ctclip import distributed, extras, plugins
from ctclip.config import Config
from ctclip.data.batch import StoredBatch
from ctclip.data.dataset import StoredVolumes, as_read, stored_volumes
from ctclip.data.sampler import ScanSampler, rarity_weights
from ctclip.data.shared_memory import usable_workers
from ctclip.errors import CtclipError, DataError, TrainingError
from ctclip.inference.drift import summarise
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import SUMMARY, check_output
from ctclip.objectives.objective import Context, columns_needed
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.outputs import claim_folder
from ctclip.preprocessing.progress import track
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.training import state
from ctclip.training.allocator import keep_freed_memory
from ctclip.training.checkpoints import Checkpoints
from ctclip.training.cohort import Cohort, open_cohort
from ctclip.training.engine import Engine, check_two_pass
from ctclip.training.optimizer import micro_batches
from ctclip.training.records import MetricsLog, check_run_folder, open_run
from ctclip.training.run_model import (
    build_run_model,
    describe_training,
    keep_prompts,
    run_labels,
    run_prompts,
    save_run_model,
    warn,
    write_trained_on,
)
from ctclip.training.signals import Signals, leave_signals
from ctclip.training.step import TrainingStep
from ctclip.training.text_warmup import lock_text, read_all, warm_up_text
from ctclip.training.validation import Validation

# EX_TEMPFAIL of sysexits.h ("try again"), on which slurm/train.sbatch requeues the job.
INTERRUPTED = 75


class Interrupted(Exception):
    """The run was asked to stop and has written a checkpoint; the same command resumes it."""


def train(config: Config, output: Path, *, force: bool = False) -> Path:
    """Train according to ``config`` and return the model folder ``output/model``.

    An interrupted run resumes from its last checkpoint; a finished one returns at once. Raises Interrupted after
    SIGTERM, SIGUSR1 or Ctrl-C, once the current step is done and its checkpoint written; a second Ctrl-C ends the
    process at once.
    """
    extras.check("train")
    with distributed.process_group() as device, Signals() as signals:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":
            keep_freed_memory()
        held: list[IO[bytes]] = []
        try:
            distributed.on_main(lambda: held.append(_claim(output)))
            return _train(config, output, device, signals, force)
        except RuntimeError as error:
            # Raised by torch in a signal handler, so it may occur anywhere.
            if "DataLoader worker" in str(error):
                raise _worker_died() from error
            raise
        finally:
            for stream in held:
                stream.close()


def _claim(output: Path) -> IO[bytes]:
    """Lock the run folder, after checking that it is one and that a model folder can be written at the end."""
    check_run_folder(output)
    check_output(output / "model")
    return claim_folder(output)


def _train(config: Config, output: Path, device: torch.device, signals: Signals, force: bool) -> Path:
    if config.data.store is None:
        raise TrainingError("data.store is not set: name the folder that `ctclip preprocess` wrote (--store)")
    labels = run_labels(config, VolumeStore(config.data.store))
    # Needed only for the model folder at the end, but checked now.
    prompts = run_prompts(config, labels)
    columns = columns_of(config)
    data = StoredVolumes(
        config.data,
        config.data.train_split,
        seed=config.seed,
        columns=columns,
        labels=labels if config.reads_labels else None,
    )
    _check_spec(config.preprocessing, data.spec, config.data.store)
    _check_reports(config, data)
    _check_validation(config, data.store)
    distributed.on_main(lambda: open_run(output, config, force=force))
    distributed.on_main(lambda: keep_prompts(output, prompts))
    checkpoints = Checkpoints(output / "checkpoints", config.training.keep_checkpoints, data.spec.hash)
    learned = bool(checkpoints.found())
    cohorts: list[Cohort] = []
    distributed.on_main(lambda: cohorts.append(open_cohort(output, data, learned=learned, force=force)))
    first, resumed = checkpoints.newest()
    torch.manual_seed(config.seed)
    model, begins = build_run_model(config, output, data, labels, resumed=bool(resumed))
    if begins:
        warn(begins)
    step = TrainingStep(Context(model, labels, prompts, data.sentences), config.objectives)
    distributed.on_main(lambda: write_trained_on(output, describe_training(config, data, cohorts[0], labels)))
    if resumed:
        state.check_fits(step, resumed, checkpoints.folder)
    # Refuse a batch that cannot be divided among ranks or micro-batches before the warm-up.
    sampler, steps = _sampler(config, data, first)
    if micro_batches(config.training) > 1:
        check_two_pass(model.volume_encoder)
    warmup = config.training.text_warmup
    if not resumed and warmup.steps:
        warm_up_text(model, data.reports, warmup, seed=config.seed, device=device)
        if warmup.locks:
            lock_text(model, data.reports, device)
    elif warmup.locks:
        model.lock_text()
    engine = Engine(step, config, device, resumed)
    data.tokenisers, data.body = engine.tokenisers, model.volume_encoder.body_tokens()
    # At stage 3, vectors cannot be cached.
    if resumed and warmup.locks and config.training.zero.stage < 3:
        read_all(model, data.reports, device)
    del resumed
    if first < steps:
        validation = Validation(config, engine, labels, prompts) if config.training.validate_every else None
        Run(config, output, engine, checkpoints, signals, validation).train(data, sampler, steps)
    learned_state = engine.parameters()
    distributed.on_main(lambda: _save(config, output, model, learned_state, data.store, device))
    return output / "model"


def _save(
    config: Config, output: Path, model: DualEncoder, learned: dict[str, torch.Tensor], store: VolumeStore,
    device: torch.device,
) -> None:  # fmt: skip
    """Write the model folder and the summary of its training scans, unless they exist, so that a finished run returns
    at once."""
    written = save_run_model(output / "model", config, output, model, learned)
    if written or not (output / "model" / SUMMARY).is_file():
        _summarise(config, output / "model", store, device)


def _summarise(config: Config, model: Path, store: VolumeStore, device: torch.device) -> None:
    """Save a summary of the training scans with the model. If that fails, there is only a warning."""
    if not config.training.summary_patients:
        return
    try:
        summarise(model, store, device, split=config.data.train_split, most=config.training.summary_patients)
    except (CtclipError, PreprocessingError) as error:
        warn(f"the model has no summary of its training scans: {error}")


def _check_spec(wanted: str, kept: PreprocessingSpec, store: str) -> None:
    """Raise TrainingError unless a store was prepared with the spec of the configuration, given by name or as the
    user's own file."""
    same = PreprocessingSpec.load(wanted).hash == kept.hash if Path(wanted).is_file() else kept.name == wanted
    if not same:
        raise TrainingError(
            f"{store}: prepared with spec {kept.name!r}, but the configuration needs {wanted!r}. Run `ctclip preprocess "
            f"--spec {wanted}`, or set preprocessing="
        )


def _check_reports(config: Config, data: StoredVolumes) -> None:
    """Raise TrainingError if volumes are contrasted with reports, but all reports are the same."""
    needs = [plugins.find("objective", name).needs for name in config.objectives]
    if not any("features" in needed and "labels" not in needed for needed in needs):
        return
    texts = {" ".join(report.text().lower().split()) for report in data.reports}
    if len(texts) == 1 and len(data) > 1:
        raise TrainingError(
            f"{data.store.path}: all {len(data)} reports of split {data.split!r} have the same text, so nothing can be learned "
            f"from them: check the reports table and data.sections={list(data.config.sections)}"
        )


def _check_validation(config: Config, store: VolumeStore) -> None:
    """Raise DataError, before the warm-up, if the validation split does not exist."""
    if config.training.validate_every:
        try:
            stored_volumes(store, config.data.valid_split)
        except DataError as error:
            raise DataError(
                f"{error}: name another one in data.valid_split, or set training.validate_every=0"
            ) from error


def columns_of(config: Config) -> tuple[str, ...]:
    """Columns of a batch that the objectives of a run request."""
    names = (name for objective in config.objectives for name in columns_needed(plugins.find("objective", objective)))
    return tuple(dict.fromkeys(names))


class Run:
    """The loop itself: steps, log lines, validations and checkpoints."""

    def __init__(
        self,
        config: Config,
        output: Path,
        engine: Engine,
        checkpoints: Checkpoints,
        signals: Signals,
        validation: Validation | None,
    ) -> None:
        self.config, self.settings = config, config.training
        self.output, self.engine, self.checkpoints, self.signals = output, engine, checkpoints, signals
        self.validation = validation
        self.status = ""
        self.divergence = Divergence()
        self.good = 0  # last step at which the loss was still normal

    def train(self, data: StoredVolumes, sampler: ScanSampler, steps: int) -> None:
        """Steps ``sampler.start`` to ``steps``."""
        main = distributed.is_main()
        self.good = sampler.start
        log = MetricsLog(self.output, sampler.start, self.settings.wandb_project, self.config) if main else None
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
            numbers = track(numbers, steps - sampler.start, "training", "steps", lambda: self.status)
        meter, unread = Meter(), sampler.start
        begins = self.engine.progress_at(steps)
        for step in numbers:
            with meter.waiting():
                read = _next(stream)
            self.engine.step(read.to(self.engine.device, spec), step, steps)
            meter.volumes += self.settings.batch
            done, last = step + 1, step + 1 == steps
            stop = distributed.any_rank(self.signals.received is not None)
            validates = self.validation is not None and not stop and (done % self.settings.validate_every == 0 or last)
            checkpoint = done % self.settings.checkpoint_every == 0 or last or stop or validates
            if done % self.settings.log_every == 0 or checkpoint:
                logged = self.engine.read()
                for number, values in enumerate(logged, start=unread):
                    if number in begins:
                        self.divergence = Divergence()  # another objective begins, which changes the loss
                    self._check(values, number)
                unread = done
                if log is not None and (done % self.settings.log_every == 0 or last):
                    values = logged[-1] | {"epoch": step / sampler.steps_per_epoch, **meter.read()}
                    values["memory_gb"] = _memory_gb(self.engine.device)
                    log.write(step, values)
                    self.status = _line(values)
            validated = self.validation(step / steps) if validates and self.validation is not None else None
            if validated:
                if log is not None:
                    log.write(step, validated)
                meter.read()
            if checkpoint:
                state = self.engine.state()
                if log is not None:
                    self.checkpoints.save(done, state, validated.get("valid_loss") if validated else None)
            if stop and not last:
                self.checkpoints.wait()
                # If a rank left early, the launcher would end the rank that is still writing.
                distributed.barrier()
                raise Interrupted(f"stopped after step {done} of {steps}; the same command resumes from there")

    def _batches(self, data: StoredVolumes, sampler: ScanSampler) -> Any:
        share = self.settings.batch // distributed.world_size()
        batch_bytes = 2 * share * math.prod(data.spec.shape)
        workers, warning = usable_workers(self.config.data.workers, batch_bytes, ranks=distributed.local_ranks())
        if warning:
            warn(f"warning: {warning}")
        return DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=as_read,
            worker_init_fn=leave_signals if workers else None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _check(self, logged: dict[str, float], step: int) -> None:
        """Stop at the first non-finite loss or gradient, because further training and checkpoints would be useless."""
        loss, norm = logged["loss"], logged["gradient_norm"]
        risen = self.divergence.seen(loss)
        if math.isfinite(loss) and math.isfinite(norm) and risen <= 1:
            if risen <= 0.5:
                self.good = step + 1
            return
        self.checkpoints.wait()
        # All ranks have the same values and arrive here; if a rank left early, the launcher would end the rank that
        # writes.
        distributed.barrier()
        what = f"the loss has grown to {loss:.3g}" if math.isfinite(loss) else f"the loss is {loss}"
        if math.isfinite(loss) and not math.isfinite(norm):
            what = "the gradient is not finite"
        raise TrainingError(
            f"{what} at step {step} (logit scale {logged['logit_scale']:.3g}, gradient norm {norm:.3g}, learning rate "
            f"{logged['learning_rate']:.3g}): lower training.learning_rate or raise training.warmup, and use --force to resume in "
            f"this folder; {self._last_good()}"
        )

    def _last_good(self) -> str:
        found = self.checkpoints.found()
        if not found:
            return "no checkpoint had been written yet"
        good = [path for step, path in found if step <= self.good]
        if not good:
            return (
                f"all kept checkpoints are from steps after {self.good}, when the loss was already rising: start in "
                f"another folder"
            )
        later = "" if good[0] == found[0][1] else ": remove the later ones, because the run would resume from them"
        return f"the last good checkpoint is {good[0]}{later}"


class Meter:
    """Volumes per second, and the fraction of the time spent waiting for data, since the last reading."""

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
    """Detects a loss that rises above its early values, by its running mean over about 20 steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.mean = 0.0
        self.first: float | None = None

    def seen(self, loss: float) -> float:
        """Record a loss and return how far it has risen. Above 1, the run diverges: the loss is more than twice its
        value after the first 20 steps, and more than one nat higher."""
        self.steps += 1
        self.mean += (loss - self.mean) / min(self.steps, 20)
        if self.steps == 20:
            self.first = self.mean
        return 0.0 if self.first is None else (self.mean - self.first) / (self.first + 1)


def _next(stream: Any) -> StoredBatch:
    """The next batch; an error in a reading process is raised with a one-line message."""
    try:
        batch: StoredBatch = next(stream)
        return batch
    except PreprocessingError as error:
        # torch wraps an exception of a worker in the worker's traceback; the last line is the message.
        reason = str(error).strip().splitlines()[-1]
        raise TrainingError(reason.partition("PreprocessingError: ")[2] or reason) from error
    except (ConnectionError, EOFError) as error:
        raise _worker_died() from error


def _worker_died() -> TrainingError:
    # Disable torch's handler, which would raise again while the first exception is reported.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return TrainingError(
        "a data-loading process died (out of memory?): lower data.workers, and start the same command again: it "
        "resumes from the last checkpoint"
    )


def _line(logged: dict[str, float]) -> str:
    return (
        f"loss {logged['loss']:.3f}, scale {logged['logit_scale']:.1f}, rate {logged['learning_rate']:.1e}, "
        f"{logged['volumes_per_second']:.1f} volumes/s, waiting {logged['data_wait']:.0%}, {logged['memory_gb']:.1f} GB"
    )


def _memory_gb(device: torch.device) -> float:
    """Peak memory of this rank: on its GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
