"""Fixtures of the parity tests."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Compute in one thread: the tensors are tiny, and threads that wait for each other made these tests ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
