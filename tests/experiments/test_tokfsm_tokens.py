"""States as tokens, as text and as rows to train on."""

import pytest
import torch

from tests.tiny import HOSTS, make_native_bridge
from tl_codebook.errors import ConfigError, DataError
from tl_codebook.experiments.tokfsm import TokFSM, make_rows, make_tokenizer, read_states, read_text, write_text, write_tokens
from tl_codebook.training import collate, tokenize_dataset

PAPER = TokFSM.paper()
BASE_16 = TokFSM.random(300, 4, 0, base=16)


def test_the_rows_of_the_paper():
    states = PAPER.sample(3, 64, torch.Generator().manual_seed(0))
    tokens = write_tokens(PAPER, states)
    assert tokens.shape == (3, 128)
    assert tokens.dtype == torch.long
    assert tokens[:, 0].eq(10).all()
    assert tokens[0, 1:5].tolist() == [int(digit) for digit in f"{int(states[0, 0]):02}{int(states[0, 1]):02}"]
    assert read_states(PAPER, tokens).equal(states[:, :63])
    whole = write_tokens(PAPER, states, keep_last=True)
    assert whole.shape == (3, 129)
    assert whole[:, :-1].equal(tokens)
    assert read_states(PAPER, whole).equal(states)


@pytest.mark.parametrize(
    "machine",
    [BASE_16, TokFSM.random(7, 2, 0), TokFSM.random(5, 2, 0, base=2), TokFSM.random(3, 2, 0, n_digits=4), TokFSM.random(36, 1, 0, base=36)],
)
def test_every_state_there_and_back(machine):
    states = torch.arange(machine.n_states)
    tokens = write_tokens(machine, states[None], keep_last=True)
    assert tokens.max() == machine.bos
    assert read_states(machine, tokens)[0].equal(states)
    text = write_text(machine, states)
    assert read_text(machine, text).equal(states)
    assert [int(text[i : i + machine.n_digits], machine.base) for i in range(0, len(text), machine.n_digits)] == states.tolist()
    tokenizer = make_tokenizer(machine)
    assert tokenizer(text)["input_ids"] == tokens[0, 1:].tolist()
    assert tokenizer.decode(tokens[0, 1:]) == text
    assert len(tokenizer) == machine.n_vocabulary


def test_what_is_no_state():
    machine = TokFSM.random(42, 2, 0)
    rows = torch.tensor([[10, 4, 1, 4, 2, 9, 9, 0], [10, 0, 10, 10, 0, 10, 10, 1]])
    assert read_states(machine, rows).tolist() == [[41, -1, -1], [-1, -1, -1]]
    assert read_text(machine, "4142<|endoftext|>00").tolist() == [41, -1, 0]
    assert read_states(machine, torch.tensor([[10], [10]])).shape == (2, 0)
    assert read_text(machine, "").tolist() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: read_states(PAPER, torch.tensor([[10, 1], [1, 1]])), "does not begin with BOS.* Put token 10 first"),
        (lambda: read_states(PAPER, torch.tensor([[10, 11]])), "token 11 was given, but the vocabulary is 0 to 10"),
        (lambda: read_states(PAPER, torch.tensor([[10, -1]])), "token -1"),
        (lambda: read_states(PAPER, torch.zeros(1, 0, dtype=torch.long)), "does not begin with BOS"),
        (lambda: write_tokens(PAPER, torch.tensor([[100]])), "state 100 was given"),
        (lambda: write_text(PAPER, torch.tensor([-1])), "state -1 was given"),
        (lambda: read_text(PAPER, "04A"), "'A' stands in a text of states, but the digits of base 10 are 0123456789"),
        (lambda: read_text(BASE_16, "0x4"), "'x' stands"),
    ],
)
def test_what_cannot_be_read_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_the_tokenizer_serves_both_hosts():
    """TransformerLens loads a tokenizer again by its name, unless it need not; ours has none, and no network."""
    tokenizer = make_tokenizer(PAPER)
    assert tokenizer("0413", return_tensors="pt")["input_ids"].tolist() == [[0, 4, 1, 3]]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (10, 10, 10)
    sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_mlp": 8, "d_vocab": 11, "act_fn": "gelu"}
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    hosts = [TransformerBridge.boot_native(TransformerBridgeConfig(**sizes), make_tokenizer(PAPER))]
    if "hooked" in HOSTS:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        hosts.append(HookedTransformer(HookedTransformerConfig(**sizes, device="cpu"), make_tokenizer(PAPER)))
    for host in hosts:
        assert host.to_tokens("0413").tolist() == [[10, 0, 4, 1, 3]]
        assert host.to_tokens("0413", prepend_bos=False).tolist() == [[0, 4, 1, 3]]


def test_rows_for_the_trainer():
    rows = make_rows(PAPER, 20, generator=torch.Generator().manual_seed(1))
    assert rows.column_names == ["input_ids"]
    assert len(rows) == 20
    assert rows["input_ids"][:] == write_tokens(PAPER, PAPER.sample(20, 64, torch.Generator().manual_seed(1))).tolist()
    short = make_rows(PAPER, 4, n_tokens=16)
    taken = tokenize_dataset(short, make_native_bridge(d_vocab=11))
    batch = collate([taken[i] for i in range(4)])
    assert batch["input_ids"].tolist() == short["input_ids"][:]
    assert batch["labels"][:, 0].eq(-100).all()


@pytest.mark.parametrize(("n_rows", "n_tokens"), [(0, 128), (4, 127), (4, 0)])
def test_rows_that_cannot_be(n_rows, n_tokens):
    with pytest.raises(ConfigError, match="asked for"):
        make_rows(PAPER, n_rows, n_tokens)
