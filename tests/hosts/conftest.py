"""The host fixtures: the same tests on HookedTransformer and TransformerBridge, for every architecture."""

import pytest
import torch

from tests.hosts.prepared import MODELS, PAIRS, prepared
from tests.tiny import ARCHITECTURES, KINDS, make_host


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


@pytest.fixture(params=MODELS)
def model(request):
    """A tiny host: both kinds, GPT-2 (sequential, biases) and Llama (grouped-query attention)."""
    return make_host(request.param)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(params=KINDS)
def any_host(request):
    """A prepared model (tests.hosts.prepared): both kinds, four architectures. Leave it as it is."""
    return prepared(request.param)


@pytest.fixture(params=[MODELS[0], MODELS[-1]])
def host(request):
    """A prepared model: a HookedTransformer of GPT-2 where there is one, and a Bridge of Llama. Leave it as it is."""
    return prepared(request.param)


@pytest.fixture(params=PAIRS, ids="-".join)
def each_config(request):
    """A prepared model with each kind of codebook. Leave it as it is."""
    return prepared(*request.param)
