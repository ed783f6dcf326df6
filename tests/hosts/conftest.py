"""The host fixtures: the same tests on HookedTransformer and TransformerBridge, for every architecture."""

import pytest
import torch

from tests.tiny import ARCHITECTURES, HOSTS, KINDS, make_host


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Threads cost more than they bring where a layer takes microseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KINDS)
def any_model(request):
    """A tiny host: both kinds, four architectures."""
    return make_host(request.param)


@pytest.fixture(params=[f"{host}-gpt2" for host in HOSTS] + [f"{host}-llama" for host in HOSTS])
def model(request):
    """A tiny host: both kinds, GPT-2 (sequential, biases) and Llama (grouped-query attention)."""
    return make_host(request.param)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param
