"""The wheel in a new environment outside the checkout, run by a user who owns neither and has no home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .environment import ROOT, build, checked, new_environment
from .stranger import NUMBER, Stranger

DECOY = "raise RuntimeError('somebody else\\'s preprocessing.py was imported')\n"


@dataclass
class Installed:
    """``full``, ``base``: ``bin`` folders of the wheel with and without its extras."""

    wheel: Path
    sdist: Path
    again: Path
    full: Path
    base: Path
    user: Stranger


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    # Other users cannot enter pytest's own temporary folder.
    folder = Path(tempfile.mkdtemp(prefix="install-test-"))
    folder.chmod(0o755)
    try:
        wheel, sdist, again = build(folder)
        full = new_environment(folder / "full", again, ("train", "index"))
        base = new_environment(folder / "base", wheel)
        checked(["chmod", "-R", "a-w,a+rX", folder / "full", folder / "base"])
        user = Stranger(folder / "user", full / "python")
        (user.cwd / "preprocessing.py").write_text(DECOY)
        yield Installed(wheel, sdist, again, full, base, user)
    finally:
        subprocess.run(["chmod", "-R", "u+w", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def test_only_what_was_written_since_is_a_strangers_stray(tmp_path: Path) -> None:
    """TMPDIR may contain files of another run."""
    if Stranger(tmp_path / "first", Path(sys.executable)).other is False:
        pytest.skip("only root can be another user")
    stale, stray = (Path(tempfile.gettempdir()) / f"install-test-{name}-{os.getpid()}" for name in ("stale", "stray"))
    try:
        stale.touch()
        os.chown(stale, NUMBER, NUMBER)
        time.sleep(0.05)
        user = Stranger(tmp_path / "second", Path(sys.executable))
        time.sleep(0.05)
        stray.touch()
        os.utime(stray, (0, 0))
        os.chown(stray, NUMBER, NUMBER)
        created = user.created()
        assert str(stray) in created
        assert str(stale) not in created
    finally:
        stale.unlink(missing_ok=True)
        stray.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def demo(installed: Installed) -> Path:
    """The folder of the smoke demo."""
    output = installed.user.output / "demo"
    done = installed.user.run(installed.full / "ctclip", "demo", "--size", "smoke", "--output", output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (output / "report.html").is_file()
    assert "zero-shot mean AUROC" in done.stdout
    for noise in ("Traceback", "Matplotlib created", "cannot cache"):
        assert noise not in done.stderr
    return output


def test_wheel_and_sdist_hold_the_two_top_level_folders(installed: Installed) -> None:
    tracked = checked(["git", "-C", ROOT, "ls-files", "preprocessing/*.py", "configs/*.yaml"]).splitlines()
    ours = checked(["git", "-C", ROOT, "ls-files", "ctclip/*.py", "ctclip/*.yaml"]).splitlines()
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert len(tracked) > 30
    assert {f"ctclip/{name}" for name in tracked} | {*ours, "ctclip/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ctclip"}, "nothing else at the top level"
    assert names == set(zipfile.ZipFile(installed.again).namelist())
    with tarfile.open(installed.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= inside


def test_it_is_the_wheel_that_is_imported(installed: Installed) -> None:
    code = "import ctclip, ctclip.preprocessing.spec as s; print(ctclip.__file__, s.__file__)"
    for place in (installed.full, installed.base):
        done = installed.user.run(place / "python", "-c", code)
        assert done.returncode == 0, done.stderr
        files = [Path(name) for name in done.stdout.split()]
        assert len(files) == 2
        assert all(file.is_relative_to(place.parent) for file in files)


def test_a_file_called_preprocessing_disturbs_no_launcher(installed: Installed) -> None:
    job = installed.user.cwd / "job.py"
    job.write_text(
        "import ctclip.preprocessing, ctclip.training.loop\nprint(ctclip.preprocessing.PreprocessingSpec.load('ct_224'))\n"
    )
    launcher = [installed.full / "python", "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    done = installed.user.run(*launcher, job)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PreprocessingSpec(name='ct_224'" in done.stdout


def test_sizes_and_plan_need_no_extra(installed: Installed) -> None:
    ctclip = installed.base / "ctclip"
    models = installed.user.run(ctclip, "models")
    assert models.returncode == 0, models.stderr[-3000:]
    assert all(name in models.stdout for name in ("tiny", "small", "base", "large", "ct_clip"))
    plan = installed.user.run(ctclip, "train", "--plan", "--config", "ct_rate_vit3d_base")
    assert plan.returncode == 0, plan.stderr[-3000:]
    assert "time:" in plan.stdout


def test_what_needs_no_extra_works_without_and_the_rest_says_which(installed: Installed, demo: Path) -> None:
    scan = next((demo / "cohort" / "dataset").rglob("valid*.nii.gz"))
    model, store, output = demo / "train" / "model", demo / "store", installed.user.output
    ctclip = installed.base / "ctclip"
    one = installed.user.run(ctclip, "zero-shot", "--model", model, scan, "--output", output / "one")
    assert one.returncode == 0, one.stderr[-3000:]
    table = (output / "one" / "predictions.csv").read_text().splitlines()
    assert len(table) == 2
    embedded = installed.user.run(ctclip, "embed", "--model", model, scan, "--output", output / "one.parquet")
    assert embedded.returncode == 0, embedded.stderr[-3000:]
    train = ["train", "--config", "phantom_tiny", "--store", store, "--output", output / "run"]
    index = ["index", "--model", model, "--store", store, "--output", output / "index"]
    absent = "deepspeed, tensorboard, peft, psutil are not installed"
    for command, line in (
        (train, f'error: {absent}: pip install "ctclip[train]"'),
        ([*train, "--processes", "2"], f'error: {absent}: pip install "ctclip[train]"'),
        (index, 'error: faiss is not installed: pip install "ctclip[index]"'),
    ):
        done = installed.user.run(ctclip, *command)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.strip() == line
    assert not (output / "run").exists()
    assert not (output / "index").exists()


def test_nothing_is_written_outside_the_output_and_tmpdir(installed: Installed, demo: Path) -> None:
    user = installed.user
    if not user.other:
        pytest.skip("only root can be another user")
    probe = Path(tempfile.gettempdir()) / f"install-test-probe-{NUMBER}"
    assert user.run("touch", probe).returncode == 0
    seen = user.created()
    probe.unlink()
    assert str(probe) in seen, "a stray file would be seen"
    assert [path for path in seen if path != str(probe)] == []
    assert demo.stat().st_uid == NUMBER
    assert list((user.tmp / f"ctclip-{NUMBER}").rglob("*.nbi")), "numba kept what it compiled"
