"""One thread, and the files that only some machines have."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

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
