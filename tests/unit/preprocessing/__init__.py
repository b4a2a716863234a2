"""Tests of preprocessing."""

import pytest

# These modules contain assertions that tests call.
pytest.register_assert_rewrite(f"{__name__}.dicom_situations", f"{__name__}.file_situations")
