"""What every test starts from."""

import pytest
import torch

# The order of a sum, and so its last bits, depends on the number of threads.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Deselects the tests marked ``gpu`` where there is no GPU."""
    if torch.cuda.is_available():
        return
    deselected = [item for item in items if item.get_closest_marker("gpu")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, alone and among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vgg_teacher(tmp_path_factory):
    """A teacher on disk whose one map is conv5 of a VGG, stride 8."""
    from helpers import write_teacher

    return write_teacher(tmp_path_factory.mktemp("vgg"))


@pytest.fixture(scope="module")
def fpn_teacher(tmp_path_factory):
    """A teacher on disk with an FPN of 12 channels."""
    from helpers import RESNET_FPN, write_teacher

    return write_teacher(tmp_path_factory.mktemp("fpn"), *RESNET_FPN, "MODEL.FPN.OUT_CHANNELS", 12)
