"""Different inputs of a codebook, and dead codes against them."""

import pytest
import torch

import tl_codebook as tlc
from tests.experiments.neox import random_model
from tests.tiny import HOSTS
from tl_codebook.errors import ConfigError, DataError, UnknownHookError
from tl_codebook.experiments.tokfsm import TokFSM, write_tokens
from tl_codebook.experiments.tokfsm.inputs import _Distinct, attainable_inputs, dead_of_attainable
from tl_codebook.usage import Usage

MACHINE = TokFSM.random(30, 5, seed=0)
FIRST, LAST = "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"


@pytest.fixture(params=HOSTS)
def model(request):
    return random_model(MACHINE, request.param)


def text(n_rows, n_states=8):
    return write_tokens(MACHINE, MACHINE.sample(n_rows, n_states, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("batch_size", [100, 7, 1])
def test_the_first_mlp_of_a_parallel_block_sees_a_token(model, batch_size):
    tokens = text(40)
    counts = attainable_inputs(model, tokens, "mlp_out", limit=1000, batch_size=batch_size)
    assert list(counts) == [FIRST, LAST]
    assert counts[FIRST].tolist() == [MACHINE.base + 1] == [len(tokens.unique())]
    assert counts[LAST][0] > MACHINE.base + 1


def test_what_a_codebook_snaps_is_few_inputs(model):
    """The second block reads the first one's codes: at the first position, BOS, that is one input whatever follows."""
    counts = attainable_inputs(model, text(40)[:, :1])
    assert {name: count.tolist() for name, count in counts.items()} == {
        "blocks.0.attn.hook_z": [1, 1],
        FIRST: [1],
        "blocks.1.attn.hook_z": [1, 1],
        LAST: [1],
    }


def test_counting_stops_at_the_number_of_codes(model):
    passes = []
    handle = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    counts = attainable_inputs(model, text(40), "L1.mlp_out", batch_size=2)
    handle.remove()
    assert counts[LAST].tolist() == [12]
    assert len(passes) == 1
    assert attainable_inputs(model, text(40), "z", limit=3)["blocks.1.attn.hook_z"].tolist() == [3, 3]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_what_counts_as_one_input_is_relative_to_their_size(model, size):
    vectors = torch.zeros(1, 4, 32)
    vectors[0, :, 0] = 1
    vectors[0, 1, 1], vectors[0, 2, 1], vectors[0, 3, 1] = 1e-6, 1e-2, 1  # from the first; root mean square norm 1.12
    tokens = torch.tensor([[10, 1, 2, 3]])
    with tlc.steer(model, [(FIRST + ".hook_x", lambda x, hook: size * vectors.expand_as(x))]):
        counts = [int(attainable_inputs(model, tokens.expand(2, 4), FIRST, tolerance=t)[FIRST]) for t in (1e-4, 0.1, 0.95)]
    assert counts == [3, 2, 1]


def test_many_inputs_are_counted_exactly():
    generator = torch.Generator().manual_seed(0)
    different = torch.randn(700, 16, generator=generator)
    again = different[torch.randint(700, (5000,), generator=generator)]
    noisy = again * (1 + 1e-6 * torch.randn(again.shape, generator=generator))
    distinct = _Distinct(10_000, 1e-4)
    for rows in torch.cat([different, noisy]).double().split(900):
        distinct.add(rows)
    assert len(distinct) == 700


def test_dead_codes_by_hand():
    z, mlp = Usage(2, 4, 8), Usage(1, 100, 8)
    z.counts[0, :2], z.counts[1, :4] = 3, 1
    mlp.counts[0, 5], mlp.counts[0, 6] = 9, 1
    dead = dead_of_attainable({"z": z, "mlp": mlp}, {"z": torch.tensor([9, 3]), "mlp": torch.tensor([11]), "other": torch.tensor([1])})
    assert list(dead) == ["z", "mlp"]
    assert dead["z"].used.tolist() == [2, 4]
    assert dead["z"].attainable.tolist() == [4, 3]  # no more than there are codes
    assert dead["z"].dead.tolist() == [0.5, 0]  # more in use than inputs: k > 1
    assert dead["z"].perplexity.tolist() == pytest.approx([2, 4])
    assert dead["mlp"].dead.tolist() == pytest.approx([1 - 2 / 11])
    assert dead["mlp"].perplexity.tolist() == pytest.approx([0.9**-0.9 * 0.1**-0.1])


def test_dead_codes_of_a_model(model):
    tokens = text(40)
    with tlc.count_usage(model) as usages:
        model(tokens)
    dead = dead_of_attainable(usages, attainable_inputs(model, tokens))
    assert list(dead) == list(usages)
    assert dead[FIRST].attainable.tolist() == [11]
    assert dead[FIRST].used[0] <= 11
    for name, figures in dead.items():
        assert figures.used.tolist() == (usages[name].counts > 0).sum(1).tolist()


def test_bad_input(model):
    tokens = text(2)
    for arguments, message in [
        ({"limit": 0}, "limit=0 was asked for"),
        ({"tolerance": 0.0}, r"tolerance=0\.0 was asked for"),
        ({"tolerance": 1.0}, r"tolerance=1\.0 was asked for"),
        ({"batch_size": 0}, "batch_size=0 was asked for"),
    ]:
        with pytest.raises(ConfigError, match=message):
            attainable_inputs(model, tokens, **arguments)
    with pytest.raises(DataError, match="no tokens were given"):
        attainable_inputs(model, tokens[:0])
    with pytest.raises(UnknownHookError, match=r"no codebook sits at 'L2\.mlp_out'"):
        attainable_inputs(model, tokens, "L2.mlp_out")
    usage = {FIRST: Usage(1, 4, 8)}
    with pytest.raises(DataError, match=r"without its inputs, which were counted at no site\. Count them with attainable_inputs"):
        dead_of_attainable(usage, {})
    for inputs in ([0], [1, 1]):
        with pytest.raises(DataError, match=r"were given for the 1 groups of"):
            dead_of_attainable(usage, {FIRST: torch.tensor(inputs)})
