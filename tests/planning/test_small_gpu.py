"""A model that needs all of a small GPU is loaded onto it: the plan's bytes are enforced."""

import gc

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT

from bigload import load_and_quantize_model, plan_device_map, release_buffers


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_what_the_plan_says_is_enough(tmp_path, mode):

    def build():
        return GPT(vocab=8192, width=1024, layers=12)

    folder = save_checkpoint(build().bfloat16(), tmp_path)
    needed = plan_device_map(empty(build), mode, folder, device_map=0).accounts[0].needed
    release_buffers()
    # Models of earlier tests, whose layers refer to themselves, may still be there. The gaps between what they hold are
    # counted as memory that can be used, which is true of them together, but not of the last one.
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_reserved(0), torch.cuda.mem_get_info(0)[1]
    # The allocator takes its memory in pieces of 2 MiB.
    torch.cuda.set_per_process_memory_fraction((held + needed + 2**21) / total, 0)
    try:
        model = load_and_quantize_model(empty(build), mode, folder, max_memory={0: needed}, device_map="auto").eval()
        assert model.hf_device_map == {"": 0}
        with torch.no_grad():
            assert model(torch.arange(8, device="cuda").view(1, 8)).isfinite().all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
