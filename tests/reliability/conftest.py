"""What the tests of this folder share: tiny data and a trained step 0."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.reliability.harness import go, make_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def step0(toy, tmp_path_factory) -> Path:
    """A folder with step 0 trained, collecting importances for all regularisers."""
    folder = tmp_path_factory.mktemp("step0")
    flags = ["--batch_size", 4, "--epochs", 2, "--regularizer", "ewc,pi,rw"]
    done = go(folder, "--data_root", toy, *flags)
    assert done.status == [0], done.output
    return folder


@pytest.fixture
def fresh(step0, tmp_path):
    """Makes copies of that folder by name."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(step0, tmp_path / name))

    return make
