"""Tests of preprocessing."""

import pytest

# Their assertions are those of the tests that call them.
pytest.register_assert_rewrite(f"{__name__}.dicom_situations", f"{__name__}.file_situations")
