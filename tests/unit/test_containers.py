"""The container files, as far as they can be checked without building: copied files exist, versions are the tested
ones, nothing runs as root, and the installed packages fit the size."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
APPTAINER = (ROOT / "apptainer.def").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
LARGEST_GB = 3.0
# Uncompressed, as Docker reports the image.
BASE_GB = 0.15


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [arguments for each, arguments in instructions() if each == name]


def installed_extras(text: str) -> set[str]:
    (names,) = re.findall(r'"\.\[([a-z,]+)\]"', text)
    return set(names.split(","))


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = [name for arguments in of("COPY") if not arguments.startswith("--from") for name in arguments.split()[:-1]]
    block = APPTAINER.partition("%files\n")[2].partition("\n\n")[0]
    copied += [name for line in block.splitlines() for name in line.split()[:-1]]
    assert {"ctclip", "configs", "preprocessing", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name


def test_images_and_packages_are_pinned_and_the_same() -> None:
    bases = [arguments.split()[0] for arguments in of("FROM")]
    bases += re.findall(r"^From: (\S+)$", APPTAINER, flags=re.MULTILINE)
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", bases[0])
    for text in (DOCKERFILE, APPTAINER):
        assert re.findall(r"torch==(\S+)", text) == re.findall(r"^torch==(\S+)$", CONSTRAINTS, flags=re.MULTILINE)
        assert "--constraint constraints.txt" in text
        assert installed_extras(text) <= set(EXTRAS)
    for service in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values():
        assert "build" in service or re.search(r":\d+(\.\d+)+$", service["image"])


def test_every_option_of_the_service_works_in_the_image() -> None:
    """Its options for an index and for a PACS need extras."""
    assert {"serve", "index", "dicom"} <= installed_extras(DOCKERFILE) & installed_extras(APPTAINER)


def test_it_runs_without_privileges_and_is_watched() -> None:
    names = [name for name, _ in instructions()]
    (user,) = of("USER")
    assert user.isdigit()
    assert int(user) > 0
    assert names.index("USER") < names.index("ENTRYPOINT")
    (watch,) = of("HEALTHCHECK")
    assert "/healthz" in watch
    assert not of("ADD")
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["ctclip"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    for each in yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in each["ports"])


def test_what_is_installed_for_the_cpu_fits() -> None:
    """The packages of the image, with the sizes that they have here."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("torch for CUDA is installed here")
    todo = [("ctclip", extra) for extra in ["", *installed_extras(DOCKERFILE)]]
    sizes: dict[str, int] = {}
    for name, extra in todo:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed here")
        if name not in sizes:
            sizes[name] = sum(path.stat().st_size for file in package.files or [] if (path := Path(str(file.locate()))).is_file())  # fmt: skip
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = [(requirement.name.lower(), each) for each in ("", *requirement.extras)]
                todo += [each for each in needed if each not in todo]
    assert "torch" in sizes
    assert "fastapi" in sizes
    assert sum(sizes.values()) / 1e9 + BASE_GB < LARGEST_GB
