"""Models and codes that were loaded under `torch.inference_mode()` attach and train outside of it."""

import copy

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS
from tests.tiny import HOSTS, make_hf, make_host, write_hf_folder
from tl_codebook import Codebook, CodebookConfig, Codebooks
from tl_codebook.convert.huggingface import load_hf

MLP = "blocks.1.hook_mlp_out"


def assert_trains(model):
    """Take one step; model and codes move."""
    codes = [point.codebook.codes for point in tlc.sites(model).values()]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = copy.deepcopy([value.detach() for value in (*codes, *weights)])
    model.train()
    optimiser = torch.optim.SGD(weights, lr=1e-1)
    model(TOKENS, return_type="loss").backward()
    assert all(code.grad.abs().sum() > 0 for code in codes)
    optimiser.step()
    assert not any(value.is_inference() for value in (*model.parameters(), *model.buffers()))
    moved = [not torch.equal(now, then) for now, then in zip((*codes, *weights), before, strict=True)]
    assert all(moved[: len(codes)])
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("made", ["folder", "object", "object made in inference mode"])
def test_a_hugging_face_model(host, architecture, made, tmp_path):
    source = write_hf_folder(tmp_path, architecture) if made == "folder" else make_hf(architecture)
    with torch.inference_mode():
        if made.endswith("mode"):
            source = type(source)(source.config)
        model = load_hf(source, host=host)
    tlc.attach(model, {MLP: CodebookConfig(8, 2)})
    assert_trains(model)


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_a_saved_model(kind, tmp_path):
    model = make_host(kind)
    tlc.attach(model, "mlp_out", n_codes=8, k=2)
    tlc.save(model, tmp_path / "model")
    with torch.inference_mode():
        model = tlc.load(tmp_path / "model")
    assert_trains(model)


@pytest.mark.parametrize("kind", [f"{host}-gpt2" for host in HOSTS])
def test_saved_codes(kind, tmp_path):
    model = make_host(kind)
    tlc.attach(model, "mlp_out", n_codes=8, k=2)
    Codebooks.of(model).save_pretrained(tmp_path / "codes")
    with torch.inference_mode():
        books = Codebooks.from_pretrained(tmp_path / "codes")
    model = make_host(kind)
    tlc.attach(model, books)
    assert_trains(model)


def test_codes_that_were_made_in_inference_mode_attach():
    model = make_host(f"{HOSTS[0]}-gpt2")
    with torch.inference_mode():
        book = Codebook(32, CodebookConfig(8, 2))
    tlc.attach(model, {MLP: book})
    with torch.no_grad():
        assert model(TOKENS).isfinite().all()
