"""Saving and loading on every host: the same logits and ids, bit for bit, from nothing but the folder."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.hosts.state import TOKENS, assert_same_state, state_of
from tests.hosts.training import MLP, assert_equal, codes, host_of, weights
from tests.tiny import HOSTS, KINDS, make_hf, make_host, make_tokenizer
from tl_codebook import CodebookConfig, Codebooks
from tl_codebook.checkpoint import restore_
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.errors import AttachError, BasisWarning, CheckpointError, CheckpointExistsError, ShapeError

ALL_KINDS = [*KINDS, "native", *["native-bridge"] * ("hooked" in HOSTS)]
FIRST = KINDS[0]
REPOSITORY = Path(__file__).resolve().parents[2]


def trained(kind, seed=4):
    """A host with codebooks of two kinds, its weights and codes moved away from how they were made."""
    model = host_of(kind)
    torch.manual_seed(seed)
    tlc.attach(model, {"z": CodebookConfig(12, 3), "mlp_out": CodebookConfig.paper(10, 2)})
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    return model


@torch.no_grad()
def run(model):
    logits, cache = model.run_with_cache(TOKENS)
    return {"logits": logits} | {name: cache[f"{name}.hook_codes"] for name in tlc.sites(model)}


@pytest.fixture(params=ALL_KINDS)
def kind(request):
    return request.param


# --- whole models ---


def test_a_loaded_model_is_the_saved_one(kind, tmp_path):
    model = trained(kind)
    before = state_of(model)
    tlc.save(model, tmp_path / "model")
    assert_same_state(state_of(model), before)
    model.train()
    again = tlc.load(tmp_path / "model")
    model.eval()
    assert type(again) is type(model)
    assert_equal(run(again), run(model))
    assert_equal(codes(again), codes(model))
    assert not any(module.training for module in again.modules())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert {name: point.codebook.config for name, point in tlc.sites(again).items()} == {
        name: point.codebook.config for name, point in tlc.sites(model).items()
    }
    assert not any(point.codebook.fresh for point in tlc.sites(again).values())
    assert next(again.parameters()).device.type == "cpu"
    assert again.to_tokens("w5 w6 w7").tolist() == model.to_tokens("w5 w6 w7").tolist()
    assert again.to_string(TOKENS[0]) == model.to_string(TOKENS[0])


def test_a_loaded_model_trains_on_and_takes_hooks(kind, tmp_path):
    model = trained(kind)
    tlc.save(model, tmp_path / "model")
    again = tlc.load(tmp_path / "model").train()
    again(TOKENS, return_type="loss").backward()
    assert all(point.codebook.codes.grad.abs().sum() > 0 for point in tlc.sites(again).values())
    again.eval()
    hook = tlc.force_code("L1.mlp_out:3", slot=0)
    with torch.no_grad():
        assert torch.equal(again.run_with_hooks(TOKENS, fwd_hooks=[hook]), model.run_with_hooks(TOKENS, fwd_hooks=[hook]))
        tlc.detach(model), tlc.detach(again)
        assert torch.equal(again(TOKENS), model(TOKENS))


def test_loading_draws_no_random_numbers(tmp_path, kind):
    tlc.save(trained(kind), tmp_path / "model")
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    tlc.load(tmp_path / "model")
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_without_a_tokenizer(host, tmp_path):
    model = load_hf(make_hf("gpt2"), host=host)
    tlc.attach(model, "mlp_out", n_codes=8)
    tlc.save(model, tmp_path / "model")
    again = tlc.load(tmp_path / "model")
    assert again.tokenizer is None
    assert_equal(run(again), run(model))


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_in_bfloat16(host, tmp_path):
    model = trained(f"{host}-gpt2").to(torch.bfloat16)
    tlc.save(model, tmp_path / "model")
    again = tlc.load(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {p.dtype for p in model.parameters()}
    assert_equal(run(again), run(model))


def test_a_fresh_process_without_a_network_loads_it(tmp_path):
    model = trained(FIRST)
    tlc.save(model, tmp_path / "model")
    program = (
        "import sys, torch, tl_codebook as tlc\n"
        "model = tlc.load(sys.argv[1])\n"
        "tokens = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad(): logits = model(tokens)\n"
        "from safetensors.torch import save_file\n"
        "save_file({'logits': logits.contiguous(), 'text': model.to_tokens('w5 w6')}, sys.argv[3])\n"
    )
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "PYTHONPATH": paths}
    call = [sys.executable, "-c", program, str(tmp_path / "model"), str(TOKENS.tolist()), str(tmp_path / "out.safetensors")]
    subprocess.run(call, check=True, env=environment, cwd=tmp_path, capture_output=True)
    from safetensors.torch import load_file

    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["logits"], run(model)["logits"])
    assert out["text"].tolist() == model.to_tokens("w5 w6").tolist()


def test_what_is_in_the_folder(tmp_path):
    model = trained(FIRST)
    tlc.save(model, tmp_path / "model")
    names = sorted(path.name.split(".")[0] for path in (tmp_path / "model").iterdir())
    assert names == ["codes", "model", "tl_codebook", "tokenizer"]
    manifest = json.loads((tmp_path / "model/tl_codebook.json").read_text())
    assert manifest["format_version"] == 1
    assert list(manifest["sites"]) == list(tlc.sites(model))
    assert manifest["sites"][MLP]["config"] == CodebookConfig.paper(10, 2, 1).to_dict()
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".npy")]


def test_a_fresh_model_and_its_checkpoint_in_another(kind, tmp_path):
    """The `state_dict` of a Bridge drops codebooks; that of a HookedTransformer with codebooks fails a strict load. `save` does neither."""
    tlc.save(trained(kind), tmp_path / "a")
    tlc.save(trained(kind, seed=5), tmp_path / "b")
    first, second = run(tlc.load(tmp_path / "a")), run(tlc.load(tmp_path / "b"))
    assert not torch.equal(first["logits"], second["logits"])
    assert_equal(first, run(trained(kind)))
    assert_equal(second, run(trained(kind, seed=5)))


def test_load_puts_the_model_where_it_is_told_to(tmp_path):
    tlc.save(trained(FIRST), tmp_path / "model")
    again = tlc.load(tmp_path / "model", device="cpu")
    assert_equal(run(again), run(trained(FIRST)))


def test_a_model_without_codebooks_is_not_saved(tmp_path):
    with pytest.raises(AttachError, match="no codebooks to take"):
        tlc.save(make_host(FIRST), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- restoring ---


def test_restore_brings_back_weights_and_codes(kind, tmp_path):
    model = trained(kind)
    before = run(model)
    tlc.save(model, tmp_path / "model")
    identities = [id(parameter) for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(run(model)["logits"], before["logits"])
    restore_(model, tmp_path / "model")
    assert_equal(run(model), before)
    assert [id(parameter) for parameter in model.parameters()] == identities


def test_restore_refuses_other_codebooks_and_codes_alone(tmp_path):
    model, other = trained(FIRST), make_host(FIRST)
    tlc.attach(other, "mlp_out", n_codes=7)
    tlc.save(model, tmp_path / "model")
    Codebooks.of(other).save_pretrained(tmp_path / "codes")
    before = weights(other)
    with pytest.raises(CheckpointError, match="of another configuration"):
        restore_(other, tmp_path / "model")
    with pytest.raises(CheckpointError, match="codebooks and no model"):
        restore_(other, tmp_path / "codes")
    assert_equal(weights(other), before)


# --- codebooks alone ---


def test_codes_attach_to_a_plain_base(kind, tmp_path):
    model, plain = trained(kind), trained(kind)
    before = run(model)
    Codebooks.of(model).save_pretrained(tmp_path / "codes")
    tlc.detach(plain)
    base = state_of(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasisWarning)
        tlc.attach(plain, Codebooks.from_pretrained(tmp_path / "codes"))
    assert_equal(run(plain), before)
    tlc.detach(plain)
    assert_same_state(state_of(plain), base)


@pytest.mark.skipif("hooked" not in HOSTS, reason="TransformerLens 4 has one host")
@pytest.mark.parametrize("architecture", ["gpt2", "neox", "neo", "llama"])
def test_codes_go_from_one_host_to_the_other_and_back(architecture, tmp_path):
    hf, tokenizer = make_hf(architecture), make_tokenizer()
    hosts = {host: load_hf(copy.deepcopy(hf), tokenizer, host=host) for host in HOSTS}
    tlc.attach(hosts["hooked"], ["z", "mlp_out", "k"], n_codes=12, k=3)
    Codebooks.of(hosts["hooked"]).save_pretrained(tmp_path / "there")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasisWarning)
        tlc.attach(hosts["bridge"], Codebooks.from_pretrained(tmp_path / "there"))
        Codebooks.of(hosts["bridge"]).save_pretrained(tmp_path / "back")
        back = load_hf(copy.deepcopy(hf), tokenizer, host="hooked")
        tlc.attach(back, Codebooks.from_pretrained(tmp_path / "back"))
    first, second, third = run(hosts["hooked"]), run(hosts["bridge"]), run(back)
    for name in tlc.sites(hosts["hooked"]):
        assert first[name].tolist() == second[name].tolist() == third[name].tolist()
    torch.testing.assert_close(second["logits"], first["logits"], rtol=0, atol=1e-4)
    assert torch.equal(third["logits"], first["logits"])
    assert_equal(codes(back), codes(hosts["hooked"]))


def test_codebooks_as_a_mapping(tmp_path):
    model = trained(FIRST)
    books = Codebooks.of(model)
    assert list(books) == list(tlc.sites(model))
    assert books[MLP] is tlc.sites(model)[MLP].codebook
    some = Codebooks({MLP: books[MLP]}, books.basis)
    some.save_pretrained(tmp_path / "some")
    assert list(Codebooks.from_pretrained(tmp_path / "some")) == [MLP]
    assert list(Codebooks.from_pretrained(str(tmp_path / "some"))) == [MLP]
    with pytest.raises(CheckpointError, match="codebooks and no model"):
        tlc.load(tmp_path / "some")


def test_codes_for_another_width(tmp_path):
    Codebooks.of(trained(FIRST)).save_pretrained(tmp_path / "codes")
    wider = load_hf(make_hf("gpt2", n_embd=64), make_tokenizer())
    before = state_of(wider)
    with pytest.raises((ShapeError, ValueError), match="32 values a position, this model has 64"):
        tlc.attach(wider, Codebooks.from_pretrained(tmp_path / "codes"))
    assert_same_state(state_of(wider), before)


def test_saving_over_codes_needs_overwrite(tmp_path):
    books = Codebooks.of(trained(FIRST))
    books.save_pretrained(tmp_path / "codes")
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        books.save_pretrained(tmp_path / "codes")
    books.save_pretrained(tmp_path / "codes", overwrite=True)
    assert list(Codebooks.from_pretrained(tmp_path / "codes")) == list(books)


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    """Nothing goes out: the hub's client is replaced."""
    from huggingface_hub import HfApi

    sent = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        sent[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = trained(FIRST)
    before = run(model)
    Codebooks.of(model).push_to_hub("someone/codes")
    Codebooks.of(model).save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="someone/more")
    assert set(sent) == {"someone/codes", "someone/more"}
    for name, uploaded in sent.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        for file, content in uploaded.items():
            (folder / file).write_bytes(content)
        assert "tl_codebook.json" in uploaded
        assert not [file for file in uploaded if file.startswith("model.")]  # the codes alone
        tlc.detach(model)
        tlc.attach(model, Codebooks.from_pretrained(folder))
        assert_equal(run(model), before)


def test_from_pretrained_downloads_from_the_hub_by_name(tmp_path, monkeypatch):
    """The cache of the hub holds links to files beside the folder."""
    model = trained(FIRST)
    Codebooks.of(model).save_pretrained(tmp_path / "codes")
    blobs, snapshot = tmp_path / "models--someone--codes/blobs", tmp_path / "models--someone--codes/snapshots/0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "codes").iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, **kwargs):
        asked.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    books = Codebooks.from_pretrained("someone/codes", revision="v1")
    assert asked == [("someone/codes", "v1", ["tl_codebook.json", "codes.*.safetensors"])]
    assert_equal({name: book.codes.detach() for name, book in books.items()}, codes(model))


def test_a_hub_name_without_a_network(monkeypatch):
    with pytest.raises(CheckpointError, match=r"'someone/not-here' is no folder here, and the hub did not give it"):
        Codebooks.from_pretrained("someone/not-here", local_files_only=True)


def test_what_load_hf_froze_stays_frozen(kind, tmp_path):
    if kind.startswith("native"):
        pytest.skip("not made from a Hugging Face model")
    model = host_of(kind)
    tlc.attach(model, "mlp_out", n_codes=8)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tlc.save(model, tmp_path / "model")
    again = tlc.load(tmp_path / "model")
    assert {name for name, parameter in again.named_parameters() if not parameter.requires_grad} == frozen
    if kind == "hooked-gpt2":
        assert frozen == {"unembed.b_U"}


def test_a_frozen_parameter_that_is_not_there(tmp_path):
    model = host_of(FIRST)
    tlc.attach(model, "mlp_out", n_codes=8)
    tlc.save(model, tmp_path / "model")
    path = tmp_path / "model" / "tl_codebook.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["frozen"] = ["blocks.9.nothing"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"frozen parameters are \['blocks.9.nothing'\]"):
        tlc.load(tmp_path / "model")
