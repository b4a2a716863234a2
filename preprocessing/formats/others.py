"""Files that are not scans in a supported format, recognised by their first bytes, and what to do about each."""

from __future__ import annotations

DECOMPRESS = "which is not supported; decompress it first"
CONVERT = "which is not supported; save the scan as NIfTI, NRRD or MetaImage"
BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the scan itself; fetch it with `git lfs pull`"),
    (b"/annex/objects/", "is a pointer of git-annex, not the scan itself; fetch it with `git annex get`"),
    (b"<!doctype html", "is a web page, perhaps of a login or an error; download the scan again"),
    (b"<html", "is a web page, perhaps of a login or an error; download the scan again"),
    (b"\xfd7zxz\0", f"is compressed (xz), {DECOMPRESS}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed (Zstandard), {DECOMPRESS}"),
    (b"\x04\x22\x4d\x18", f"is compressed (LZ4), {DECOMPRESS}"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive, which is not supported; unpack it first"),
    (b"rar!\x1a\x07", "is a RAR archive, which is not supported; unpack it first"),
    (b"\x89hdf\r\n", f"is an HDF5 file, {CONVERT}"),
    (b"\x93numpy", f"is an array of numpy without a geometry, {CONVERT}"),
    (b"matlab 5.0", f"is a MATLAB file, {CONVERT}"),
    (b"\x89png", "is an image file, not a volume"),
    (b"\xff\xd8\xff", "is an image file, not a volume"),
    (b"%pdf", "is a PDF, not a volume"),
)
VOXELS = (".raw", ".zraw", ".raw.gz")


def other_kind(head: bytes, name: str) -> str | None:
    """The unsupported format of a file that begins with ``head``, and what to do about it; or None."""
    start = head[:16].lower() if not head.startswith(b"version") else head
    reason = next((words for beginning, words in BEGINNINGS if start.startswith(beginning)), None)
    if reason is None and name.endswith(VOXELS):
        return "holds only voxels; give its header (.mhd, .nhdr)"
    return reason
