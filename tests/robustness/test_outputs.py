"""Where commands may write: they never replace a user's files or write through a link, and two commands with one output
never leave an incomplete table."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from ctclip.cli import main
from ctclip.evaluation.calibration import Calibration, Line, digest
from ctclip.heads.folder import save_head, write_prompt_head
from ctclip.heads.linear import LinearHead
from ctclip.inference import drift
from ctclip.inference.model import load
from ctclip.labels import load_labels
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import save_model
from ctclip.preprocessing import files
from ctclip.preprocessing.cohorts import COLUMNS
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import write_text
from ctclip.preprocessing.outputs import claim_folder, claimed_file, claimed_folder, put_in_place
from ctclip.preprocessing.store import VolumeStore
from ctclip.prompts import load_prompts
from ctclip.training.loop import _claim
from tests.unit.small import VIT, dual_encoder, spec_of

from .processes import Command

SPEC = spec_of((8, 8, 8))
LABELS = load_labels("ct_rate_18")
VOLUMES = [f"v{number}" for number in range(12)]
# Commands that write a folder, and commands that write one file. Each is refused before it reads its inputs.
FOLDERS = {
    "export": ["export", "run", "--output"],
    "import-checkpoint": ["import-checkpoint", "x.pt", "--text-encoder", "x", "--output"],
    "zero-shot": ["zero-shot", "--model", "x", "scan.nii.gz", "--output"],
    "index": ["index", "--model", "x", "--store", "x", "--output"],
    "evaluate": ["evaluate", "x.csv", "--output"],
    "phantom": ["phantom", "--volumes", "2"],
    "preprocess": ["preprocess", "x", "--output"],
    "demo": ["demo", "--size", "smoke", "--output"],
    "explain": ["explain", "scan.nii.gz", "--model", "x", "--output"],
    "find": ["find", "scan.nii.gz", "a nodule", "--model", "x", "--output"],
    "probe": ["probe", "--model", "x", "--store", "x", "--output"],
    "soup": ["soup", "a", "b", "--store", "x", "--output"],
    "publish": ["publish", "x", "--licence", "other", "--output"],
    "analyze": ["analyze", "--model", "x", "--store", "x", "--output"],
    "filter-pairs": ["filter-pairs", "--model", "x", "--store", "x", "--output"],
    "audit data": ["audit", "data", "--model", "x", "--store", "x", "--output"],
    "audit model": ["audit", "model", "--model", "x", "--store", "x", "--output"],
}
FILES = {
    "embed": (["embed", "--model", "x", "scan.nii.gz", "--output"], ".parquet"),
    "embed npy": (["embed", "--model", "x", "scan.nii.gz", "--output"], ".npy"),
    "report": (["report", "x", "--output"], ".html"),
    "quality": (["quality", "STORE", "--output"], ".html"),
    "labels": (["labels", "from-csv", "x.csv", "--output"], ".yaml"),
    "prompts mine": (["prompts", "mine", "--store", "x", "--output"], ".yaml"),
    "read-reports": (["read-reports", "x.csv", "--label-set", "ct_rate_18", "--output"], ".csv"),
    "clean-reports": (["clean-reports", "x.csv", "--label-set", "ct_rate_18", "--output"], ".csv"),
    "locate": (["locate", "x", "--masks", "x", "--model", "x", "--output"], ".json"),
    "draft": (["draft", "scan.nii.gz", "--model", "x", "--output"], ".json"),
    "draft of a store": (["draft", "--store", "x", "--model", "x", "--output"], ".csv"),
    "similar": (["similar", "--text", "a nodule", "--index", "x", "--output"], ".csv"),
}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve volumes of noise."""
    store = VolumeStore.create(tmp_path_factory.mktemp("small") / "store", SPEC)
    random = np.random.default_rng(0)
    for name in VOLUMES:
        store.write(name, random.integers(-1000, 1000, SPEC.shape).astype(np.int16))
    table = pd.DataFrame({name: VOLUMES for name in COLUMNS}).assign(split="valid")
    table.to_parquet(store.path / "cohort.parquet")
    return store.path


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return dual_encoder(VIT, SPEC).eval()


@pytest.fixture(scope="module")
def model(encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(encoder, tmp_path_factory.mktemp("model") / "model")


def written(encoder: DualEncoder, folder: Path) -> Path:
    prompts = load_prompts("report_style")
    return save_model(
        folder, encoder, LABELS, write_more=lambda partial: write_prompt_head(partial, prompts, LABELS.names)
    )


def typed(*arguments: object) -> int:
    """Exit code of a command, run in this process."""
    return main([str(argument) for argument in arguments])


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """The contents of a folder, without following links."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path).encode() if path.is_symlink() else b""
        found[str(path.relative_to(root))] = (stat.S_IFMT(mode), content)
    return found


def home(place: Path) -> Path:
    """A user's folder, with files that could be mistaken for those of ctclip."""
    folder = place / "home"
    for name in ("thesis.tex", "config.yaml", "metrics.json", "report.html", "model.safetensors", ".home.replaced/a", "volumes/.note",
                 ".prompts.partial/a", ".lock", "run.json", "predictions.csv", "embeddings.parquet", "spec.yaml.old"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def a_file(place: Path) -> Path:
    (place / "thesis").write_text("mine")
    return place / "thesis"


def a_link_to_a_folder(place: Path) -> Path:
    (place / "elsewhere").mkdir()
    (place / "link").symlink_to(place / "elsewhere")
    return place / "link"


def a_link_to_a_file(place: Path) -> Path:
    (place / "link").symlink_to(a_file(place))
    return place / "link"


def a_link_to_nothing(place: Path) -> Path:
    (place / "link").symlink_to(place / "nothing")
    return place / "link"


def a_fifo(place: Path) -> Path:
    os.mkfifo(place / "fifo")
    return place / "fifo"


def below_a_file(place: Path) -> Path:
    return a_file(place) / "below"


def here(place: Path) -> Path:
    os.chdir(home(place))
    return Path(".")


def a_device(_: Path) -> Path:
    return Path("/dev/null")


LYING_THERE: list[Callable[[Path], Path]] = [
    home, here, a_file, a_link_to_a_folder, a_link_to_a_file, a_link_to_nothing, a_fifo, below_a_file, a_device,
]  # fmt: skip


def refused(arguments: list[object], place: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The single line with which a command is refused; nothing may have changed."""
    before, device = tree(place), os.stat("/dev/null").st_mode
    capsys.readouterr()
    assert typed(*arguments) == 2, arguments
    out, err = capsys.readouterr()
    assert tree(place) == before, arguments
    assert os.stat("/dev/null").st_mode == device
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, (arguments, err)
    assert not out
    return lines[0]


@pytest.mark.parametrize("what", LYING_THERE)
@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_not_ours_is_left_alone(
    command: str, what: Callable[[Path], Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused([*FOLDERS[command], what(tmp_path)], tmp_path, capsys)
    assert "not empty" in line or "not a folder" in line or "symbolic link" in line, line


@pytest.mark.parametrize("what", LYING_THERE)
@pytest.mark.parametrize("command", FILES)
def test_a_file_that_is_not_ours_is_left_alone(
    command: str, what: Callable[[Path], Path], small_store: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, ending = FILES[command]
    target = what(tmp_path)
    if target.parent == tmp_path:
        # The same file under a name that the command accepts.
        target = target.rename(target.with_suffix(ending))
    line = refused([str(small_store) if a == "STORE" else a for a in arguments] + [target], tmp_path, capsys)
    if target.suffix == ending or "end the name in" not in line:
        assert any(words in line for words in ("exists", "would be written there", "not a folder")), line


@pytest.mark.parametrize("what", LYING_THERE)
def test_a_run_folder_and_its_model_are_checked_before_training(
    what: Callable[[Path], Path], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = what(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(PreprocessingError):
        _claim(target)
    assert tree(tmp_path) == before
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.tex").write_text("mine")
    (tmp_path / "run" / ".lock").write_text("process 1 on here")
    with pytest.raises(PreprocessingError, match="model: is not empty and holds no model folder"):
        _claim(tmp_path / "run")


@pytest.mark.parametrize("kind", ["link", "fifo", "mine"])
def test_a_lock_is_never_written_through(kind: str, tmp_path: Path) -> None:
    lock, target = tmp_path / "run" / ".lock", tmp_path / "target"
    lock.parent.mkdir()
    # Empty, like a lock that another command is creating.
    target.write_text("")
    if kind == "link":
        lock.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(PreprocessingError, match=r"\.lock: is "):
        claim_folder(tmp_path / "run")
    assert tree(tmp_path) == before


def test_a_read_only_place_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """Root may write anywhere, so the error that another user would get is simulated."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    for arguments in FOLDERS.values():
        assert "cannot be written into" in refused([*arguments, tmp_path / "new"], tmp_path, capsys)


def test_a_model_or_store_that_cannot_be_added_to_is_one_line_before_any_work(
    encoder: DualEncoder, small_store: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Root may write anywhere, so the error of another user is simulated, for the model and the store only."""
    model, access = written(encoder, tmp_path / "model"), os.access
    closed = (str(model), str(model / "heads"), str(small_store))
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and str(path) in closed) and access(path, mode)
    )
    used = ["--model", model, "--store", small_store]
    for arguments in (
        ["adapt", "--method", "coop", *used, "--output", tmp_path / "o"],
        ["adapt", "--method", "caption", *used, "--output", tmp_path / "o"],
        ["probe", *used, "--output", tmp_path / "o"],
        ["check-precision", *used],
        ["filter-pairs", *used, "--keep", "--output", tmp_path / "o"],
    ):
        assert "cannot be written into, and" in refused(arguments, tmp_path, capsys)
    monkeypatch.setattr(drift, "_patients", lambda *_: 20)
    assert "cannot be written into, and" in refused(["summarise", *used], tmp_path, capsys)


@pytest.mark.parametrize("name", ["adaptation.json", "heads/prompts/calibration.json", "text_config.json"])
def test_json_that_is_nested_too_deep_is_one_line(
    name: str, encoder: DualEncoder, small_store: Path, tmp_path: Path, capsys
) -> None:
    model = written(encoder, tmp_path / "model")
    (model / name).write_text("[" * 100_000)
    typed("zero-shot", "--model", model, "--store", small_store, "--output", tmp_path / "p")
    assert name in capsys.readouterr().err
    assert typed("publish", model, "--licence", "other", "--output", tmp_path / "copy") == 2
    assert str(model / name) in capsys.readouterr().err


def test_no_terminal_obeys_a_model_folder(encoder: DualEncoder, small_store: Path, tmp_path: Path, capsys) -> None:
    model = written(encoder, tmp_path / "model")
    (model / "trained_on.yaml").write_text('cohort: "\\e]0;owned\\a"\nbody_part: "\\e[2J"\nsupervision: "a\\nb"\n')
    capsys.readouterr()
    for command in (["zero-shot", "--store", small_store, "--output", tmp_path / "p"], ["models"], ["summarise", "--store", small_store]):  # fmt: skip
        typed(*command, "--model", model)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        assert "\a" not in out + err
    assert typed("publish", model, "--licence", "other", "--output", tmp_path / "copy") == 0
    assert "\x1b" not in (tmp_path / "copy" / "README.md").read_text()


def test_a_model_folder_is_replaced_and_nothing_else_is(encoder: DualEncoder, tmp_path: Path, monkeypatch) -> None:
    folder = written(encoder, tmp_path / "model")
    first = (folder / "model.safetensors").stat().st_ino
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "mine").write_text("mine")
    written(encoder, folder)
    assert (folder / "model.safetensors").stat().st_ino != first
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.replaced", "model"]
    assert (tmp_path / ".model.replaced" / "mine").is_file()
    for name in (
        "thesis.tex",
        ".hidden",
        "tokenizer/thesis.txt",
        "heads/notes.txt",
        "heads/prompts/thesis.tex",
        ".cache/mine",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(PreprocessingError, match="holds no model folder of ours alone"):
            written(encoder, folder)
        assert tree(tmp_path) == before
        (folder / name).unlink()
        if name.startswith(".cache"):
            (folder / ".cache").rmdir()
    monkeypatch.chdir(folder / "heads")
    with pytest.raises(PreprocessingError, match="is the current folder or contains it"):
        written(encoder, Path(".."))


def test_a_head_is_replaced_and_nothing_else_is(encoder: DualEncoder, tmp_path: Path) -> None:
    folder = written(encoder, tmp_path / "model")
    head = LinearHead(encoder, LABELS.names, torch.ones(18, 12), torch.zeros(18))
    save_head(folder, "mine", head)
    (folder / "heads" / ".mine.partial").mkdir()
    (folder / "heads" / ".mine.partial" / "a").write_text("mine")
    save_head(folder, "mine", head)
    assert (folder / "heads" / ".mine.partial" / "a").read_text() == "mine"
    (folder / "heads" / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(PreprocessingError, match="holds no head"):
        save_head(folder, "mine", head)


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(PreprocessingError, match="symbolic link"):
        write_text(tmp_path / "link", "ours")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "mine"


def test_a_store_sweeps_only_what_it_left(small_store: Path) -> None:
    volumes = small_store / "volumes"
    left, mine = volumes / ".v1.b2nd.abcd1234.partial", volumes / ".mine"
    for path in (left, mine):
        path.write_text("x")
        os.utime(path, (0, 0))
    VolumeStore(small_store).sweep()
    assert not left.exists()
    assert mine.exists()
    mine.unlink()


def test_a_table_of_another_run_is_not_overwritten(
    model: Path, encoder: DualEncoder, small_store: Path, tmp_path: Path, capsys
) -> None:
    other = written(dual_encoder(VIT, SPEC, seed=1).eval(), tmp_path / "other")
    for command, output, table in (
        ("zero-shot", tmp_path / "p", tmp_path / "p" / "predictions.csv"),
        ("index", tmp_path / "i", tmp_path / "i" / "rows.parquet"),
        ("embed", tmp_path / "e.parquet", tmp_path / "e.parquet"),
    ):
        arguments = ["--store", small_store, "--output", output]
        assert typed(command, "--model", model, *arguments) == 0
        assert typed(command, "--model", model, *arguments) == 0, "the same run may be repeated"
        before = table.read_bytes()
        assert "another run" in refused([command, "--model", other, *arguments], tmp_path, capsys)
        assert table.read_bytes() == before
        assert typed(command, "--model", other, *arguments, "--force") == 0
        if command != "index":
            assert table.read_bytes() != before
    # Another table of ctclip in the same folder as the first.
    assert typed("index", "--model", model, "--store", small_store, "--output", tmp_path / "p") == 0
    assert (tmp_path / "p" / "predictions.csv").is_file()


def test_a_row_that_is_missing_is_never_exit_code_0(
    model: Path, small_store: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from ctclip.inference import run

    honest = run._join
    shortened = lambda parts, summary, order: [next(parts.glob("*.parquet")).unlink(), honest(parts, summary, order)]  # noqa: E731
    monkeypatch.setattr(run, "PART_BATCHES", 1)
    monkeypatch.setattr(run, "_join", shortened)
    assert typed("zero-shot", "--model", model, "--store", small_store, "--batch", 4, "--output", tmp_path / "p") == 2
    assert "4 of them have no row" in capsys.readouterr().err


def test_two_processes_into_one_folder(model: Path, small_store: Path, tmp_path: Path) -> None:
    """Both outputs are complete, or the second command is refused in one line; never an incomplete table with exit code
    0."""
    slow = "import time; from ctclip.inference.scans import StoredScans as S; read = S.voxels; S.voxels = lambda s, i: (time.sleep(0.1), read(s, i))[1]"
    for command, name, table in (("zero-shot", "p", "p/embeddings.parquet"), ("embed", "e.parquet", "e.parquet")):
        arguments = [
            command,
            "--model",
            str(model),
            "--store",
            str(small_store),
            "--output",
            str(tmp_path / name),
            "--batch",
            "2",
        ]
        running = [Command(arguments, slow) for _ in range(2)]
        ended = [one.wait() for one in running]
        assert 0 in [one.returncode for one in ended]
        for one in ended:
            if one.returncode:
                assert one.returncode == 2
                assert len(one.stderr.strip().splitlines()[-1:]) == 1
                assert "Traceback" not in one.stderr
                assert "wait for it" in one.stderr
        assert sorted(pq.read_table(tmp_path / table)["volume"].to_pylist()) == sorted(VOLUMES)
    assert sorted(pd.read_csv(tmp_path / "p" / "predictions.csv")["volume"]) == sorted(VOLUMES)
    assert not (tmp_path / "p" / "parts").exists()
    assert not list(tmp_path.glob(".*.lock"))


def test_what_goes_to_a_hub_names_no_patient(encoder: DualEncoder, tmp_path: Path) -> None:
    folder = written(encoder, tmp_path / "model")
    kept = Calibration(
        "platt", "x", "m", {"Emphysema": Line(1.0, 0.0, 0.5, 9, 20)}, patients=(digest("p1", "salt"),), salt="salt"
    )
    kept.save(folder / "heads" / "prompts" / "calibration.json")
    assert Calibration.load(folder / "heads" / "prompts" / "calibration.json").saw(["p1", "p2"]) == ["p1"]
    load(folder).save_pretrained(tmp_path / "copy")
    text = (tmp_path / "copy" / "heads" / "prompts" / "calibration.json").read_text()
    assert digest("p1", "salt") not in text
    assert '"salt": ""' in text
    assert load(tmp_path / "copy").head().calibration is None  # from other weights, as the note states
    assert Calibration.load(tmp_path / "copy" / "heads" / "prompts" / "calibration.json").lines == kept.lines
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").write_text("mine")
    with pytest.raises(PreprocessingError, match="not empty"):
        load(folder).save_pretrained(tmp_path / "home")


def test_of_two_stores_made_at_once_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both commands have found an empty folder; the spec of the other command appears just before this command would
    replace it."""
    other, put = spec_of((16, 16, 16)), files._put_once
    raced = []

    def late(partial: Path, final: Path) -> None:
        if not raced:
            raced.append(VolumeStore.create)
            VolumeStore.create(tmp_path / "store", other)
        put(partial, final)

    monkeypatch.setattr(files, "_put_once", late)
    with pytest.raises(PreprocessingError, match="holds volumes of spec"):
        VolumeStore.create(tmp_path / "store", SPEC)
    assert VolumeStore(tmp_path / "store").spec.hash == other.hash


def test_two_cohorts_into_one_folder_are_one_cohort(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(claim_folder(tmp_path / "c")):
        line = refused(["phantom", tmp_path / "c", "--volumes", 2], tmp_path, capsys)
    assert "another run is using this folder" in line


@pytest.mark.parametrize("moment", ["while it steps aside", "after"])
def test_a_folder_that_another_command_puts_in_place_stays(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands replace one folder: the later one is refused in one line, and no output is lost."""
    for name in ("partial", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    rename = Path.rename

    def raced(path: Path, target: Path) -> Path:
        if path.name == ("final" if moment == "while it steps aside" else "partial"):
            monkeypatch.setattr(Path, "rename", rename)
            if moment == "while it steps aside":
                rename(path, tmp_path / "elsewhere")
            (tmp_path / "final").mkdir()
            (tmp_path / "final" / "which").write_text("theirs")
            if moment == "while it steps aside":
                (tmp_path / "final").rename(tmp_path / "gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", raced)
    with pytest.raises(PreprocessingError, match="could not be put in its place"):
        put_in_place(tmp_path / "partial", tmp_path / "final", lambda _: True, "folder")
    assert (tmp_path / "partial" / "which").read_text() == "partial"
    assert (tmp_path / ("gone" if moment == "while it steps aside" else "final") / "which").read_text() == "theirs"
    assert not list(tmp_path.glob("*.replaced/final"))


def test_files_of_a_folder_in_its_place_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """Even if a library, such as safetensors, wrote the file so that only its owner can read it."""
    (tmp_path / "partial" / "heads").mkdir(parents=True)
    (tmp_path / "mine").touch()
    for name in ("weights", "heads/weights"):
        (tmp_path / "partial" / name).touch(0o600)
    put_in_place(tmp_path / "partial", tmp_path / "final", lambda _: True, "folder")
    for name in ("weights", "heads/weights"):
        assert (tmp_path / "final" / name).stat().st_mode == (tmp_path / "mine").stat().st_mode


def test_what_a_killed_command_left_is_removed_by_who_holds_the_lock(tmp_path: Path) -> None:
    left = [tmp_path / ".e.parquet.a1b2c3d_.partial", tmp_path / ".run.json.12345678.partial"]
    mine = [
        tmp_path / name
        for name in (".e.parquet.partial", ".other.parquet.a1b2c3d4.partial", "e.parquet.a1b2c3d4.partial")
    ]
    for path in (*left, *mine):
        path.write_text("x")
    (tmp_path / ".e.parquet.abcdefgh.partial").mkdir()
    with claimed_file(tmp_path / "e.parquet"):
        assert not left[0].exists()
    with claimed_folder(tmp_path, "x", "key", ["rows.parquet"], lambda _: True):
        assert not left[1].exists()
    assert all(path.exists() for path in mine)
    assert (tmp_path / ".e.parquet.abcdefgh.partial").is_dir()
