import os
from pathlib import Path

import pytest
import torch

from llamakern import _C


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    """Each instruction set that this machine has."""
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir():
    """Real checkpoints and expected values: LLAMAKERN_TEST_DATA, or shared/data beside the checkout."""
    place = Path(os.environ.get("LLAMAKERN_TEST_DATA", Path(__file__).parents[2] / "shared/data"))
    if not place.is_dir():
        pytest.skip(f"no test data at {place}; set LLAMAKERN_TEST_DATA")
    return place
