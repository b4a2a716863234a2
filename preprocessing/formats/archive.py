"""Unpack zip and tar archives of one scan, within a size limit, into a temporary folder.

The sizes that the archive's directory states are checked first, and the bytes that come out are counted, because
stated sizes can be false.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.formats import streams
from ctclip.preprocessing.scratch import scratch_folder

# About the size of the largest real CT; ``--largest-gb`` raises it.
LARGEST_GB = 4.0
MOST_MEMBERS = 20000
DEEPEST = 3
ZIP = (b"PK\3\4", b"PK\5\6")
SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2")
PREFIX = "ctclip-unpacked-"
# Files of macOS, Windows and the viewers on patient CDs, not part of a scan.
JUNK = re.compile(r"(^|/)(__MACOSX/|\._|\.DS_Store$|Thumbs\.db$|desktop\.ini$)", re.IGNORECASE)
VIEWERS = {
    ".exe", ".dll", ".inf", ".ini", ".htm", ".html", ".css", ".js", ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ico",
    ".txt", ".pdf", ".xml", ".jar", ".bat", ".sh", ".chm", ".cfg", ".log", ".md", ".json", ".csv", ".rtf", ".swf",
}  # fmt: skip
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".hdr.gz", ".npz")
VOXELS = (".raw", ".raw.gz", ".zraw", ".img", ".img.gz", ".gz", ".bz2")
PLAIN = re.compile(r"[\w()+-][\w .()+-]{0,100}")


def is_zip(path: Path) -> bool:
    with streams.open_regular(path, str(path)) as stream:
        return stream.read(4) in ZIP


def may_hold_scans(name: str, head: bytes) -> bool:
    """Whether a member of an archive may itself be an archive, by its name and first bytes."""
    packed = head[:4] in ZIP or bool(streams.compression(head)) or head[257:262] == b"ustar"
    return packed and not name.lower().endswith(VOLUMES)


def is_tar(path: Path) -> bool:
    """Whether a file is a tar, compressed or not: POSIX and GNU write their mark into the first header."""
    return streams.start(path, str(path))[1][257:262] == b"ustar"


@contextlib.contextmanager
def unpacked(path: Path, source: str, largest: int) -> Iterator[Path]:
    """The scan in an archive, for the duration of the context: its only volume file, or a folder of DICOM slices.

    ``largest`` limits the unpacked size in bytes; nested archives are unpacked too. Members keep only the names needed
    to find them, and none can leave the folder. Raises PreprocessingError.
    """
    with scratch_folder(PREFIX) as held:
        folder = held / "scan"
        folder.mkdir()
        _Unpacking(source, largest).unpack(path, folder, 1)
        volumes = [file for file in sorted(folder.rglob("*")) if file.name.lower().endswith(VOLUMES)]
        if len(volumes) > 1:
            raise PreprocessingError(f"{source}: holds {len(volumes)} volumes; unpack it and name one")
        yield volumes[0] if volumes else folder


class _Unpacking:
    """An archive and its nested archives, which share a limit on bytes and members."""

    def __init__(self, source: str, largest: int) -> None:
        self.source, self.largest = source, largest
        self.bytes, self.members = 0, 0

    def unpack(self, path: Path, folder: Path, depth: int) -> None:
        try:
            (self._zip if is_zip(path) else self._tar)(path, folder)
        except streams.DAMAGE as error:
            # Messages of libraries may quote member names, which may contain the patient's name.
            raise PreprocessingError(
                f"{self.source}: not a readable archive ({type(error).__name__}); copy it again"
            ) from error
        for inner in [file for file in sorted(folder.rglob("*")) if file.is_file()]:
            if inner.name.lower().endswith(".npz") or not (is_zip(inner) or is_tar(inner)):
                continue
            if depth == DEEPEST:
                raise PreprocessingError(f"{self.source}: archives nested {depth} deep; unpack it yourself")
            below = inner.with_name(f"{inner.name}.unpacked")
            below.mkdir()
            self.unpack(inner, below, depth + 1)
            inner.unlink()

    def _zip(self, path: Path, folder: Path) -> None:
        with streams.open_regular(path, self.source) as file, zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            self._claimed(sum(member.file_size for member in members), len(members), streams.size_of(file))
            for member in members:
                if member.flag_bits & 1:
                    raise PreprocessingError(f"{self.source}: is encrypted; unpack it with its password")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise PreprocessingError(
                        f"{self.source}: uses a compression that is not supported; unpack it yourself"
                    )
                if target := self._target(member.filename, folder):
                    with archive.open(member) as stream:
                        self._copy(stream, target)

    def _tar(self, path: Path, folder: Path) -> None:
        with streams.open_regular(path, self.source) as file, tempfile.TemporaryFile() as plain:
            kind = streams.compression(file.read(6))
            file.seek(0)
            if kind:
                # Decompress first, within the limit, because tarfile trusts the size that a header states for another
                # header.
                self._inflate(streams.inflated(file, kind), plain)
            with tarfile.open(fileobj=_Bounded(plain if kind else file), mode="r:") as archive:
                for number, member in enumerate(archive):
                    if number == MOST_MEMBERS:
                        raise PreprocessingError(f"{self.source}: holds more than {number} files; refused")
                    content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if content is not None and (target := self._target(member.name, folder)):
                        self._copy(content, target)

    def _inflate(self, stream: Any, plain: BinaryIO) -> None:
        length = 0
        with contextlib.suppress(StopIteration):
            for block in iter(lambda: stream.read(streams.CHUNK), b""):
                length += len(block)
                if length > self.largest:
                    raise self._too_large()
                plain.write(block)
        plain.seek(0)

    def _claimed(self, total: int, members: int, packed: int) -> None:
        if members > MOST_MEMBERS or total > self.largest or total > streams.LARGEST_EXPANSION * packed:
            raise PreprocessingError(f"{self.source}: would unpack to {total / 1e9:.1f} GB in {members} files; refused")

    def _target(self, name: str, folder: Path) -> Path | None:
        """The path for a member, or None if it is not part of a scan."""
        self.members += 1
        if self.members > MOST_MEMBERS:
            raise PreprocessingError(f"{self.source}: holds more than {MOST_MEMBERS} files; refused")
        name = name.replace("\\", "/")
        suffix = PurePosixPath(name).suffix.lower()
        if JUNK.search(name) or suffix in VIEWERS:
            return None
        parts = [part for part in PurePosixPath(name).parts if part != "."]
        if parts and all(PLAIN.fullmatch(part) for part in parts) and name.lower().endswith(VOLUMES + VOXELS):
            # A detached header refers to its voxel file by name.
            target = folder.joinpath(*parts)
        else:
            # Slices keep their folders and suffixes, which show what belongs together.
            below = [part if PLAIN.fullmatch(part) else "folder" for part in parts[:-1]]
            kept = suffix if re.fullmatch(r"\.\w{1,8}", suffix) else ""
            target = folder.joinpath(*below, f"{self.members:06d}{kept}")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _copy(self, stream: Any, target: Path) -> None:
        with target.open("xb") as written:
            for block in iter(lambda: stream.read(streams.CHUNK), b""):
                self.bytes += len(block)
                if self.bytes > self.largest:
                    raise self._too_large()
                written.write(block)

    def _too_large(self) -> PreprocessingError:
        return PreprocessingError(
            f"{self.source}: would unpack to more than {self.largest / 1e9:g} GB; --largest-gb raises the limit"
        )


class _Bounded(io.RawIOBase):
    """A file for tarfile that refuses large reads, because tarfile trusts the stated size of a long name."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= streams.CHUNK:
            raise ValueError("a member's header claims more than it can be")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()
