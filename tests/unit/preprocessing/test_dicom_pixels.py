"""Bits and bytes of pixels, and the padding of scanners outside the measured region."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import dcmread

from tests.unit.preprocessing.dicom_builder import change, deflated, reencoded, series, store, write
from tests.unit.preprocessing.dicom_situations import ALL, HU, SIGNED, UNSIGNED, Row, check, each, edited, rle

ROUND = np.hypot(*(np.mgrid[:40, :36] - np.array([19.5, 17.5])[:, None, None])) > 17
OUTSIDE = np.where(ROUND, -1024, HU)


def filled(value: int, where: np.ndarray = ROUND, *, intercept: int = -1024, **tags: Any) -> Callable[[int, Any], None]:
    """Put a stored value at the pixels of ``where``."""

    def edit(index: int, data: Any) -> None:
        for keyword, wanted in tags.items():
            change(data, keyword, wanted)
        data.RescaleIntercept = intercept
        store(data, np.where(where, value, HU[index].astype(int) - intercept))

    return edit


def with_vr(edit: Callable[[int, Any], None], keyword: str, vr: str, value: int) -> Callable[[int, Any], None]:
    def also(index: int, data: Any) -> None:
        edit(index, data)
        data.add_new(pydicom.datadict.tag_for_keyword(keyword), vr, value)

    return also


INSIDE = np.zeros((40, 36), bool)
INSIDE[18:21, 15:18] = True


def one_filled(value: int) -> Callable[[int, Any], None]:
    """A different padding value in every slice."""
    return lambda index, data: filled(value + index, **UNSIGNED, PixelPaddingValue=value + index)(index, data)


def cleared_and_filled(index: int, data: Any) -> None:
    """63536 although the header states 12 bits: with the upper bits cleared it would be bone."""
    stored = np.where(ROUND, 63536, HU[index].astype(int) + 1024)
    data.PixelPaddingValue = 63536
    data.PixelData = stored.astype("<u2").tobytes()


PADDING = [
    Row("63536, unsigned", edited(filled(63536, **UNSIGNED, PixelPaddingValue=63536)), hu=OUTSIDE,
        differ={"sitk": "takes padding for bone of 62512 HU", "pydicom": "rescales padding as all else"}),
    Row("63536 in pixels, -2000 in the header",
        edited(with_vr(filled(63536, **UNSIGNED), "PixelPaddingValue", "SS", -2000)), hu=OUTSIDE),
    Row("-2000 in pixels, 63536 in the header",
        edited(with_vr(filled(-2000, **SIGNED, intercept=0), "PixelPaddingValue", "US", 63536)), hu=OUTSIDE),
    Row("-2000, signed", edited(filled(-2000, **SIGNED, intercept=0, PixelPaddingValue=-2000)), hu=OUTSIDE,
        differ={"sitk": "leaves -2000 HU"}),
    Row("4095", edited(filled(4095, PixelPaddingValue=4095)), hu=OUTSIDE),
    Row("0 at an intercept of 0: water inside stays",
        edited(filled(0, **SIGNED, intercept=0, PixelPaddingValue=0)), hu=OUTSIDE),
    Row("0 at -1024", edited(filled(0, PixelPaddingValue=0)), hu=OUTSIDE, same=("sitk", "pydicom")),
    Row("a range", edited(lambda i, d: filled(4000 + 4 * i, PixelPaddingValue=4095, PixelPaddingRangeLimit=4000)(i, d)),
        hu=OUTSIDE),
    Row("a range, signed, upside down",
        edited(lambda i, d: filled(-1900 - i, **SIGNED, intercept=0, PixelPaddingValue=-2000,
                                   PixelPaddingRangeLimit=-1500)(i, d)), hu=OUTSIDE),
    Row("another value in each slice", edited(one_filled(5000)), hu=OUTSIDE,
        says=("slices differ in PixelPaddingValue",)),
    Row("above the bits that are stored", edited(cleared_and_filled), hu=OUTSIDE),
    Row("metal of the padding value stays", edited(filled(4095, INSIDE, PixelPaddingValue=4095)),
        hu=np.where(INSIDE, 3071, HU), same=("sitk", "pydicom")),
    Row("what no CT measures is padding inside as well", edited(filled(63536, INSIDE, **UNSIGNED, PixelPaddingValue=63536)),
        hu=np.where(INSIDE, -1024, HU)),
    Row("what no tissue measures is padding inside as well",
        edited(filled(-2000, INSIDE, **SIGNED, intercept=0, PixelPaddingValue=-2000)), hu=np.where(INSIDE, -1024, HU)),
    Row("implicit syntax, which states no type of the padding value",
        lambda f: [reencoded(path, "1.2.840.10008.1.2") for path in
                   write(f, series(HU, filled(-2000, **SIGNED, intercept=0, PixelPaddingValue=-2000))).iterdir()],
        hu=OUTSIDE),
]  # fmt: skip


def shifted(index: int, data: Any) -> None:
    """12 bits at the upper end of 16."""
    store(data, (HU[index].astype(int) + 1024) << 4, HighBit=15)


def overlaid(index: int, data: Any) -> None:
    """An overlay in the bits above those stored, as in older files."""
    stored = HU[index].astype(int) + 1024
    data.PixelData = (stored | (np.indices(stored.shape).sum(axis=0) % 2 << 15)).astype("<u2").tobytes()


def signed_12(index: int, data: Any) -> None:
    """12 signed bits; the unused bits do not repeat the sign."""
    data.PixelRepresentation, data.RescaleIntercept = 1, 0
    data.PixelData = (np.clip(HU[index], -1000, 2047).astype("<i2") & 0x0FFF).tobytes()


def compressed_wrongly(index: int, data: Any) -> None:
    """Encapsulated pixels in a syntax without compression."""
    data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
    data["PixelData"].VR = "OB"


def of_no_stated_length(path: Path) -> None:
    content = path.read_bytes()
    at = content.rindex(b"\xe0\x7f\x10\x00OB") + 8
    path.write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])


def under_rle(path: Path) -> None:
    content = path.read_bytes()
    native, claimed = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"
    path.write_bytes(content.replace(native, claimed))


def run_lengthened(data: Any) -> Any:
    """The first run of an RLE stream is one longer, so all following pixels have moved by one (PS3.5, G.3.1)."""
    pixels = bytearray(rle(data).PixelData)
    # After an empty offset table, the item's tag and length, and the header of 64 bytes.
    at = 8 + 8 + 64
    while pixels[at] <= 128:
        at += 2 + pixels[at]
    pixels[at] -= 1
    data.PixelData = bytes(pixels)
    return data


def bytes_lost(path: Path) -> None:
    """Eight bytes of the stream are missing: the fragment then extends beyond the delimiter that follows it."""
    content = path.read_bytes()
    path.write_bytes(content[:-100] + content[-92:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shoved(path: Path) -> None:
    """Two bytes inserted into the pixels: all following pixels have moved by one."""
    content = path.read_bytes()
    path.write_bytes(content[:-600] + b"\1\0" + content[-600:])


def behind(content: bytes) -> Callable[[Path], object]:
    return each(lambda path: path.write_bytes(path.read_bytes() + content))


def nested(depth: int, folder: Path) -> None:
    """In each slice a private sequence nested so deeply that recursive parsers fail."""
    for path in write(folder, series(HU[:4])).iterdir():
        content = path.read_bytes()
        pixels = content.index(b"\xe0\x7f\x10\x00OW")
        opening = b"\x0b\x00\x01\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
        closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
        path.write_bytes(content[:pixels] + opening * depth + closing * depth + content[pixels:])


def bomb(folder: Path) -> None:
    """A deflated slice followed by 256 MB of zeros."""
    paths = [max(write(folder, series(HU)).iterdir(), key=lambda path: int(dcmread(path).InstanceNumber))]
    content = paths[0].read_bytes()
    start = content.index(b"\x08\x00\x05\x00" if b"\x08\x00\x05\x00" in content else b"\x08\x00\x08\x00")
    deflated(paths[0], content[start:] + bytes(2**28))


BITS = [
    Row("implicit", each(lambda path: reencoded(path, "1.2.840.10008.1.2")), same=ALL),
    Row("big endian", each(lambda path: reencoded(path, "1.2.840.10008.1.2.2")), same=ALL),
    Row("deflated", each(lambda path: reencoded(path, "1.2.840.10008.1.2.1.99")), same=("sitk", "pydicom")),
    Row("8 bits", edited(lambda i, d: store(d, (HU[i] + 1000) // 16, BitsAllocated=8, BitsStored=8, HighBit=7,
                                            RescaleSlope=16, RescaleIntercept=-1000)),
        hu=(HU + 1000) // 16 * 16 - 1000, same=ALL),
    Row("32 bits, signed", edited(lambda i, d: store(d, HU[i], BitsAllocated=32, BitsStored=32, HighBit=31,
                                                     PixelRepresentation=1, RescaleIntercept=0)), same=ALL),
    Row("16 bits, signed", edited(lambda i, d: store(d, HU[i], **SIGNED, RescaleIntercept=0)), same=ALL),
    Row("16 bits, unsigned, at an intercept of -32768",
        edited(lambda i, d: store(d, HU[i].astype(int) + 32768, **UNSIGNED, RescaleIntercept=-32768)), same=ALL),
    Row("12 signed bits without their sign above", edited(signed_12), hu=np.clip(HU, -1000, 2047), same=("sitk", "pydicom")),
    Row("12 bits at the top", edited(shifted),
        differ=dict.fromkeys(ALL, "does not shift by HighBit: PS3.5, 8.1.1")),
    Row("12 bits at the bottom, whatever HighBit says", edited(HighBit=15), same=ALL),
    Row("neither at the top nor at the bottom", edited(lambda i, d: store(d, (HU[i].astype(int) + 1024) << 2, HighBit=15)),
        refused="12 bits stored below high bit 15, and others used"),
    Row("an overlay above the stored bits", edited(overlaid), same=ALL),
    Row("RLE of MONOCHROME1 with a slope", lambda f: write(f, [rle(d) for d in series(
        HU, lambda i, d: store(d, (HU[i].astype(int) + 1024) * 2, BitsStored=13, HighBit=12, RescaleSlope="0.5",
                               PhotometricInterpretation="MONOCHROME1"))]), same=("pydicom",)),
    Row("RLE, one run too long", lambda f: write(f, [run_lengthened(d) for d in series(HU)]),
        refused="its RLE stream is damaged"),
    Row("RLE, bytes lost within", lambda f: [bytes_lost(path) for path in write(f, [rle(d) for d in series(HU)]).iterdir()],
        refused="its fragments do not end where they should"),
    Row("an odd number of bytes", edited(lambda i, d: store(d, (HU[i][:39, :35] + 1000) // 16, Rows=39, Columns=35,
                                                            BitsAllocated=8, BitsStored=8, HighBit=7)),
        hu=((HU[:, :39, :35] + 1000) // 16 - 1024).astype(np.int16), same=("sitk", "pydicom")),
    Row("compressed pixels under a syntax without compression",
        lambda f: [of_no_stated_length(path) for path in write(f, series(HU, compressed_wrongly)).iterdir()],
        refused="its pixels are compressed, but its transfer syntax is uncompressed"),
    Row("pixels without compression under a syntax of one", each(under_rle),
        refused="its pixels are not compressed, but its transfer syntax is compressed"),
    Row("more bytes than rows and columns say", edited(lambda i, d: setattr(d, "PixelData", d.PixelData + b"\0\0")),
        refused="2882 bytes of pixels, but its header states 2880"),
    Row("fewer bytes than rows and columns say", edited(lambda i, d: setattr(d, "PixelData", d.PixelData[:-2])),
        refused="2878 bytes of pixels, but its header states 2880"),
    Row("bytes put in among the pixels", lambda f: shoved(min(write(f, series(HU)).iterdir())),
        hu=np.concatenate([np.r_[HU[0].ravel()[:-300], -1023, HU[0].ravel()[-300:-1]].reshape(1, *HU[0].shape), HU[1:]]),
        says=("bytes follow the pixels of 1 slice: if bytes were inserted before them, values are wrong",)),
    Row("zeros behind the pixels", behind(bytes(512)), same=("dcm2niix", "pydicom")),
    Row("padding behind the pixels (PS3.10, 7.2)", behind(b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0abcd"), same=ALL),
    Row("files cut in their pixels", each(cut), refused=r"\(cut short\); it is damaged: copy or export the series again$"),
    Row("12 bits allocated", edited(BitsAllocated=12), refused="12 bits allocated, 12 stored, high bit 11"),
    Row("more bits stored than allocated", edited(BitsStored=17, HighBit=16), refused="16 bits allocated, 17 stored"),
    Row("nested 40 deep", lambda f: nested(40, f), hu=HU[:4]),
    Row("nested 20,000 deep", lambda f: nested(20000, f), refused="4 DICOM files, none of which can be read"),
    Row("a bomb among slices", bomb, hu=HU[:23], says=("1 of 24 slices cannot be decoded",)),
]  # fmt: skip


@pytest.mark.parametrize("row", PADDING + BITS, ids=lambda row: row.name)
def test_what_is_right(tmp_path: Path, row: Row) -> None:
    check(row, tmp_path)
