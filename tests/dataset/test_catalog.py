"""The names of the data sets are known without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("module", ["catalog", "splits", "check"])
def test_no_torch_is_imported(module):
    code = f"import sys, dataset.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
