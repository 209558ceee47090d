"""A folder with a small model, in which commands run."""

import pytest
import torch
from models import llama


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    llama(False, eos_token_id=None).save_pretrained("model")
    return tmp_path
