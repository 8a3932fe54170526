"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real checkpoints, tokenizers and expected values: $LLAMAKERN_TEST_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("LLAMAKERN_TEST_DATA", beside))
    if not path.is_dir():
        pytest.skip(f"no test data in {path}; set LLAMAKERN_TEST_DATA")
    return path


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
