"""The errors that a user can act on."""

from __future__ import annotations

import pytest

from ctclip.errors import CheckpointError, CtclipError
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.serve.uploads import BadUpload


@pytest.mark.parametrize("kind", [CtclipError, CheckpointError, PreprocessingError, BadUpload])
def test_a_message_that_quotes_a_file_is_one_printable_line(kind: type[Exception]) -> None:
    # The last character of the first is an undecodable byte of a file name, of the second half of a surrogate pair.
    assert str(kind("scan\n.nii: \x1b[31mred\x1b[0m, \udcff")) == "scan\\n.nii: \\x1b[31mred\\x1b[0m, \\xff"
    assert str(kind("é\n\ud800")) == "é\\n\\ud800"
