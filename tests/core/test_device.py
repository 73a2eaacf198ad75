from __future__ import annotations

import pytest
import torch

from partialfc.core.device import DTYPES, choose_device, dtype_name
from partialfc.core.errors import InputError


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sentence = r"4 processes were started on a host where PyTorch sees 2 GPUs: start at most 2, .* or use --device cpu"
    with pytest.raises(InputError, match=sentence):
        choose_device("auto", local_rank=0, local_world_size=4)
    assert choose_device("cpu", local_world_size=4).type == "cpu"


def test_names_of_dtypes() -> None:
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())
