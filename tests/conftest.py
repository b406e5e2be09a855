"""One thread, and the files that only some machines have."""

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from compactcli import architectures

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start: the bits depend on it

# The same examples at every run: a failure in continuous integration is one that can be had again.
hypothesis.settings.register_profile("compactcli", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("compactcli")


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder of real checkpoints; skips where it is not."""
    folder = Path(__file__).parents[2] / "shared" / "checkpoints"
    if not folder.is_dir():
        pytest.skip("there are no real checkpoints beside this clone")
    return folder


@pytest.fixture
def timm() -> Any:
    """timm, beside a torchvision that may have been built for another torch; skips where it is not installed."""
    if not architectures.has_timm():
        pytest.skip("timm is not installed")
    return architectures.timm()
