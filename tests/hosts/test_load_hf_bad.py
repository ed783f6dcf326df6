"""load_hf and bad input: an error that names file, key and remedy; nothing is executed, unpickled or made up."""

from __future__ import annotations

import inspect
import json
import pickle
import threading

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.tiny import HOSTS, make_hf, make_tokenizer, write_hf_folder
from tl_codebook.codebook import Codebook, CodebookConfig
from tl_codebook.convert.huggingface import load_hf
from tl_codebook.convert.inside import attach_hf
from tl_codebook.errors import CheckpointError, CodebookError, ConfigError

FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture
def folder(tmp_path):
    """A tiny GPT-2 with its tokenizer."""
    return write_hf_folder(tmp_path / "model", "gpt2")


def edit(folder, remove=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in remove} | changes
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_good_folder_loads(folder):
    assert load_hf(folder).tokenizer is not None
    assert load_hf(str(folder)).tokenizer is not None


class TestFolders:
    def test_without_config(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"holds no config\.json. Give a folder"):
            load_hf(folder)

    def test_that_are_not_there(self, tmp_path):
        for path in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "~/no/where"):
            with pytest.raises(CheckpointError, match="there is no such folder"):
                load_hf(path)

    def test_that_are_files(self, folder):
        with pytest.raises(CheckpointError, match=r"is a file\. Give the folder"):
            load_hf(folder / "model.safetensors")

    @pytest.mark.parametrize("text", ["{nope", "", "[" * 100_000])
    def test_config_that_is_no_json(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
            load_hf(folder)

    def test_config_that_is_no_object(self, folder):
        (folder / "config.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"config\.json holds a list"):
            load_hf(folder)

    def test_unknown_type(self, folder):
        edit(folder, model_type="gpt22")
        with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'gpt22'.*Did you mean 'gpt2'"):
            load_hf(folder)
        edit(folder, remove=["model_type"])
        with pytest.raises(CheckpointError, match="model_type is None"):
            load_hf(folder)

    def test_fields_of_a_wrong_type(self, folder):
        edit(folder, n_embd="wide")
        with pytest.raises(CheckpointError, match=r"config\.json.*n_embd"):
            load_hf(folder)

    def test_adapters(self, folder):
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json.*merge_and_unload"):
            load_hf(folder)

    @pytest.mark.parametrize("kind", ["gpt2", "custom"])
    def test_code_is_never_run(self, folder, kind, tmp_path):
        canary = tmp_path / "canary"
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: ...\n")
        edit(folder, model_type=kind, auto_map={"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)
        with pytest.raises(CheckpointError, match=r"config\.json: auto_map asks for the code evil\.Model.*trust_remote_code=True"):
            load_hf(folder)
        assert not canary.exists()


class Evil:
    """A pickle that leaves a trace where it is opened."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


class TestWeights:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin"])
    def test_pickled_ones_are_never_opened(self, folder, name, tmp_path):
        canary = tmp_path / "canary"
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Evil(canary)))
        with pytest.raises(CheckpointError, match=rf"only in {name}.*safe_serialization"):
            load_hf(folder)
        assert not canary.exists()

    def test_a_pickle_beside_good_weights_is_never_opened(self, folder, tmp_path):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
        load_hf(folder)
        assert not (tmp_path / "canary").exists()

    def test_a_pickle_under_the_name_of_safetensors_is_never_opened(self, folder, tmp_path):
        (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
        with pytest.raises(CheckpointError, match="damaged"):
            load_hf(folder)
        assert not (tmp_path / "canary").exists()

    def test_none(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
            load_hf(folder)

    @pytest.mark.parametrize("kept", [0, 5, 300, -100])
    def test_truncated(self, folder, kept):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match="incomplete or damaged"):
            load_hf(folder)

    def test_missing(self, folder):
        rewrite(folder, lambda tensors: tensors.pop(FC))
        with pytest.raises(CheckpointError, match=f"1 missing: {FC}"):
            load_hf(folder)

    def test_unknown(self, folder):
        rewrite(folder, lambda tensors: tensors.update({"transformer.h.0.adapter.weight": torch.zeros(3)}))
        with pytest.raises(CheckpointError, match=r"1 unknown: transformer\.h\.0\.adapter\.weight"):
            load_hf(folder)

    def test_of_another_shape(self, folder):
        rewrite(folder, lambda tensors: tensors.update({FC: torch.zeros(3, 3)}))
        with pytest.raises(CheckpointError, match=rf"1 of another shape: {FC} \(3, 3\), not \(32, 48\)"):
            load_hf(folder)

    def test_all_faults_at_once(self, folder):
        edit(folder, n_layer=3, n_inner=64)
        with pytest.raises(CheckpointError, match=r"12 missing: .* and 6 more; 6 of another shape: "):
            load_hf(folder)

    def test_of_a_head_that_is_not_tied(self, folder):
        edit(folder, tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
            load_hf(folder)

    @pytest.mark.parametrize("host", HOSTS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, folder, host, value):
        rewrite(folder, lambda tensors: tensors[FC].fill_(value))
        with pytest.raises(CheckpointError, match=f"not finite; NaN or Inf is in {FC}"):
            load_hf(folder, host=host)

    def test_shards(self, folder, tmp_path):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        index = folder / "model.safetensors.index.json"
        save_file(tensors, folder / "one.safetensors", metadata={"format": "pt"})
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "one.safetensors")}))
        load_hf(folder)
        for shard, said in {"two.safetensors": "not there", "../one.safetensors": "no safetensors file of this folder"}.items():
            index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
            with pytest.raises(CheckpointError, match=f"index.json: weight_map names .*{said}"):
                load_hf(folder)
        (folder / "one.bin").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "one.bin")}))
        with pytest.raises(CheckpointError, match="no safetensors file"):
            load_hf(folder)
        index.write_text("{}")
        with pytest.raises(CheckpointError, match="weight_map cannot be read"):
            load_hf(folder)
        assert not (tmp_path / "canary").exists()


SIZES = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "pad_token_id": 0}
BERT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
NOT_CAUSAL = {
    "encoder-decoder": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
    "GPT2ForSequenceClassification": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**SIZES)),
    "GPT2DoubleHeadsModel": lambda: hf.GPT2DoubleHeadsModel(hf.GPT2Config(**SIZES)),
    "GPT2Model": lambda: hf.GPT2Model(hf.GPT2Config(**SIZES)),
    "BertForMaskedLM": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_what_is_no_causal_language_model_is_refused(kind, host, tmp_path):
    model = NOT_CAUSAL[kind]()
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        with pytest.raises(CheckpointError, match=f"is an? {kind}.*causal language model"):
            load_hf(given, host=host)


class MyGPT2(hf.GPT2LMHeadModel):
    """A user's own class around a known one."""


def test_a_class_of_the_users_own_loads(tmp_path):
    model = MyGPT2(hf.GPT2Config(**SIZES))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MyGPT2"]
    load_hf(tmp_path)


@pytest.mark.parametrize("thing", [3, None, {}, torch.nn.Linear(2, 2), hf.GPT2Config()], ids=lambda thing: type(thing).__name__)
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(ConfigError, match=f"model={type(thing).__name__} was given.*Give a folder"):
        load_hf(thing)


def test_a_host_is_no_model_to_load():
    with pytest.raises(ConfigError, match="which is no Hugging Face model"):
        load_hf(load_hf(make_hf("gpt2")))


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_with_codebooks_at_work_is_refused(host):
    model = make_hf("gpt2")
    inside = attach_hf(model, {"blocks.1.hook_mlp_out": Codebook(32, CodebookConfig(8, 2))})
    with pytest.raises(CheckpointError, match=r"holds codebooks from attach_hf.*remove\(\).*attach\(\)"):
        load_hf(model, host=host)
    inside.remove()
    load_hf(model, host=host)


def test_weights_that_are_elsewhere_are_refused():
    with pytest.raises(CheckpointError, match=r"transformer\.wte\.weight is on the meta device"):
        load_hf(make_hf("gpt2").to("meta"))


def test_unknown_hosts_are_refused():
    with pytest.raises(ConfigError, match="Choose 'hooked' or 'bridge'"):
        inspect.unwrap(load_hf)(make_hf("gpt2"), host="hf")  # past the type checker of the tests
    if "hooked" not in HOSTS:
        with pytest.raises(ConfigError, match=r"has no HookedTransformer\. Use host='bridge'"):
            load_hf(make_hf("gpt2"), host="hooked")


class TestTokenizers:
    def test_what_is_none_is_refused(self):
        for thing in (3, object(), threading.Lock()):
            with pytest.raises(ConfigError, match=f"tokenizer={type(thing).__name__} was given"):
                load_hf(make_hf("gpt2"), thing)

    def test_a_raw_one_needs_its_wrapper(self):
        with pytest.raises(ConfigError, match="PreTrainedTokenizerFast"):
            load_hf(make_hf("gpt2"), make_tokenizer().backend_tokenizer)

    def test_a_folder_without_one_is_refused(self, tmp_path):
        make_hf("gpt2").save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"holds no tokenizer \(tokenizer\.json"):
            load_hf(make_hf("gpt2"), tmp_path)

    def test_a_damaged_one_beside_the_model_is_not_passed_over(self, folder):
        (folder / "tokenizer.json").write_text('{"truncated')
        with pytest.raises(CheckpointError, match="its tokenizer could not be loaded"):
            load_hf(folder)

    def test_code_is_never_run(self, folder, tmp_path):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Tokenizer: ...\n")
        path = folder / "tokenizer_config.json"
        about = json.loads(path.read_text()) | {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
        path.write_text(json.dumps(about))
        try:
            load_hf(folder)
        except CodebookError as error:
            assert "its tokenizer could not be loaded" in str(error)  # noqa: PT017 - either is right, as long as nothing runs
        assert not (tmp_path / "canary").exists()
