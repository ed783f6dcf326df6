import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config

# The same examples every time, and no time limits: a slow machine is no failure.
settings.register_profile("unit", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")


@pytest.fixture
def unchecked():
    """Switch the shape checks of the tests off: what the package itself says to a wrong argument is what users see."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def threads():
    """Set how many threads torch computes with, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
