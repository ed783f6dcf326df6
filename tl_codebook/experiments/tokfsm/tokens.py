"""States as tokens and as text, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_codebook.errors import DataError
from tl_codebook.experiments.tokfsm.machine import DIGITS, TokFSM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["BOS_TEXT", "NO_STATE", "make_rows", "make_tokenizer", "read_states", "read_text", "write_text", "write_tokens"]

BOS_TEXT = "<|endoftext|>"
"""The text of BOS."""
NO_STATE = -1
"""What stands for digits that are no state."""


def _digits(machine: TokFSM, states: Tensor) -> Tensor:
    """Return the digits [..., digit] of states, most significant first."""
    places = machine.base ** torch.arange(machine.n_digits - 1, -1, -1)
    return states.cpu().long()[..., None] // places % machine.base


def write_tokens(machine: TokFSM, states: Int[Tensor, "sequence state"], *, keep_last: bool = False) -> Int[Tensor, "sequence pos"]:
    """Write rollouts as rows of tokens: BOS, then the digits of each state, most significant first, without the very last digit.

    Args:
        machine: The machine.
        states: At least one state a row.
        keep_last: Keep the last digit; a row is then one token longer.

    Returns:
        Token ids, 0 to `base` (BOS): ``n_states * n_digits`` of them a row, one more with `keep_last`.

    Raises:
        DataError: a number that is no state.

    Source: Tamkin et al. 2023, section 3 (rollouts of 64 states are 128 tokens with BOS).

    >>> write_tokens(TokFSM.paper(), torch.tensor([[4, 13]])).tolist()  # 10 is BOS
    [[10, 0, 4, 1]]
    """
    machine.check_states(states)
    digits = _digits(machine, states).flatten(1)
    tokens = torch.cat([torch.full((len(digits), 1), machine.bos), digits], dim=1)
    return tokens if keep_last else tokens[:, :-1]


def read_states(machine: TokFSM, tokens: Int[Tensor, "sequence pos"]) -> Int[Tensor, "sequence state"]:
    """Read the complete states of rows of tokens that begin with BOS; digits left over at the end are no state yet.

    Where the digits are those of no state, or BOS is among them, the state is -1. (The original library leaves such a BOS out, which
    shifts every digit after it.)

    Raises:
        DataError: a row that does not begin with BOS, or a token outside the vocabulary.

    Source: codebook-features 0.1.2, ``FSM.seq_to_traj``.

    >>> read_states(TokFSM.paper(), torch.tensor([[10, 0, 4, 1, 3, 9], [10, 0, 10, 1, 3, 9]])).tolist()
    [[4, 13], [-1, 13]]
    """
    check_tokens(machine, tokens)
    tokens = tokens.cpu().long()
    n_states = (tokens.shape[1] - 1) // machine.n_digits
    digits = tokens[:, 1 : 1 + n_states * machine.n_digits].unflatten(1, (n_states, machine.n_digits))
    states = (digits * machine.base ** torch.arange(machine.n_digits - 1, -1, -1)).sum(-1)
    return states.masked_fill((digits == machine.bos).any(-1) | (states >= machine.n_states), NO_STATE)


def check_tokens(machine: TokFSM, tokens: Int[Tensor, "sequence pos"]) -> None:
    """Raise unless the rows begin with BOS and hold nothing outside the vocabulary.

    Raises:
        DataError: they do not.

    >>> check_tokens(TokFSM.paper(), torch.tensor([[10, 0, 4]]))
    """
    wrong = tokens[(tokens < 0) | (tokens > machine.bos)]
    if wrong.numel():
        raise DataError(f"token {int(wrong[0])} was given, but the vocabulary is 0 to {machine.bos} (BOS). Give tokens of this machine.")
    if tokens.shape[1] < 1 or bool((tokens[:, 0] != machine.bos).any()):
        raise DataError(f"a row does not begin with BOS, and the place of a digit is counted from there. Put token {machine.bos} first.")


def write_text(machine: TokFSM, states: Int[Tensor, " state"]) -> str:
    """Write a rollout as text, digit by digit, without BOS.

    Raises:
        DataError: a number that is no state.

    Source: codebook-features 0.1.2, ``FSM.traj_to_str``.

    >>> write_text(TokFSM.paper(), torch.tensor([4, 13]))
    '0413'
    """
    machine.check_states(states)
    return "".join(DIGITS[digit] for digit in _digits(machine, states).flatten().tolist())


def read_text(machine: TokFSM, text: str) -> Int[Tensor, " state"]:
    """Read the complete states of a text; BOS is left out wherever it stands, and digits of no state give -1.

    Raises:
        DataError: a character that is no digit of the machine.

    Source: codebook-features 0.1.2, ``FSM.seq_to_traj``.

    >>> read_text(TokFSM.paper(), "<|endoftext|>04139").tolist()
    [4, 13]
    """
    digits = [DIGITS.find(character) for character in text.replace(BOS_TEXT, "")]
    wrong = [place for place, digit in enumerate(digits) if not 0 <= digit < machine.base]
    if wrong:
        raise DataError(
            f"{text.replace(BOS_TEXT, '')[wrong[0]]!r} stands in a text of states, but the digits of base {machine.base} are "
            f"{DIGITS[: machine.base]}. Give text of this machine."
        )
    return read_states(machine, torch.tensor([[machine.bos, *digits]]))[0]


def make_tokenizer(machine: TokFSM) -> PreTrainedTokenizerFast:
    """Build, in memory, the tokenizer of a machine: each digit is a token, BOS (also EOS and padding) is ``<|endoftext|>``.

    It adds no BOS of its own; ids are those of the original library's.

    Source: codebook-features 0.1.2, ``create_tokenizer``.

    >>> tokenizer = make_tokenizer(TokFSM.paper())
    >>> tokenizer("<|endoftext|>0413")["input_ids"]
    [10, 0, 4, 1, 3]
    >>> tokenizer.decode([0, 4, 1, 3])
    '0413'
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {digit: token for token, digit in enumerate(DIGITS[: machine.base])} | {BOS_TEXT: machine.bos}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(BOS_TEXT, normalized=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        name_or_path="",
        bos_token=BOS_TEXT,
        eos_token=BOS_TEXT,
        pad_token=BOS_TEXT,
        unk_token=BOS_TEXT,
        clean_up_tokenization_spaces=False,
    )
    # TransformerLens loads a tokenizer again by its name unless it is told that BOS is taken care of; this one has no name.
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return tokenizer


def make_rows(machine: TokFSM, n_rows: int, n_tokens: int = 128, generator: torch.Generator | np.random.Generator | None = None) -> Any:
    """Sample a data set of rows of tokens, as `CodebookTrainer` takes them.

    Args:
        machine: The machine.
        n_rows: Rows, >= 1.
        n_tokens: Tokens of each, BOS counted: a multiple of the digits of a state, >= 2.
        generator: Of torch (on the CPU) or numpy; by default torch's global one.

    Returns:
        A `datasets.Dataset` with the column ``input_ids`` (int32).

    Raises:
        ConfigError: fewer than one row, or rows that are no multiple of the digits.

    Source: Tamkin et al. 2023, section 3.

    >>> rows = make_rows(TokFSM.random(4, 1, seed=42, base=2), 3, n_tokens=8)
    >>> len(rows), rows[0]["input_ids"][0], len(rows[0]["input_ids"])
    (3, 2, 8)
    """
    import datasets

    tokens = write_tokens(machine, machine.sample(n_rows, machine.states_in_row(n_tokens), generator))
    return datasets.Dataset.from_dict({"input_ids": tokens.int().numpy()})
