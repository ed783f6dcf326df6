"""Fixtures of all tests: shape checking, tiny hosts built without any network, and the shared data where it is present."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("tl_codebook", "beartype.beartype")  # every shape in an annotation is checked while the tests run

import pytest  # noqa: E402
import torch  # noqa: E402

warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")

SHARED = Path(os.environ.get("TL_CODEBOOK_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_path(relative: str) -> Path:
    """Return a path under the shared data, or skip the test with the reason."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"the shared data ({relative}) is not on this machine")
    return path


@pytest.fixture(scope="session")
def shared():
    return shared_path


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture
def tokens():
    return torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(7))
