"""What the tests of distributed loads share."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@pytest.fixture
def alone(tmp_path):
    """The mesh of a world of one process, this one: all is as among several, without their time."""
    method, timeout = f"file://{tmp_path}/store", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1, timeout=timeout)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
