"""What all test files use: one thread per test process, and where reference data lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
GOLDEN = Path(__file__).resolve().parent / "golden"
GOLDEN2 = Path(__file__).resolve().parent / "golden2"  # of PLOP, EWF and LGKD

torch.set_num_threads(1)


@pytest.fixture
def shared() -> Path:
    """Reference data beside the checkout, too large for it; tests of them are skipped without."""
    if not SHARED.is_dir():
        pytest.skip("no reference data beside this checkout")
    return SHARED


@pytest.fixture
def photographs(shared: Path) -> Path:
    """A data root of real photographs in the VOC layout."""
    return shared / "data" / "ccp"
