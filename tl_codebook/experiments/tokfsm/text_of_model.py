"""What a model writes, what its predictions cost, and which next state it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_codebook.errors import ConfigError, DataError, ShapeError
from tl_codebook.experiments.tokfsm.bayes import bayes_predictions
from tl_codebook.experiments.tokfsm.machine import TokFSM, check_range
from tl_codebook.experiments.tokfsm.tokens import NO_STATE, check_tokens, read_states, write_tokens
from tl_codebook.hosts import as_host, evaluating, home_device, is_bridge
from tl_codebook.steering import steer

__all__ = ["ModelFigures", "collect_at", "first_transitions", "loss_over_bayes", "next_state_probabilities", "sample_text"]

Hook = tuple[str, Callable[..., Any]]
HooksOfRows = Callable[[Int[Tensor, " row"]], Sequence[Hook]]
"""From the indices of the rows that one pass runs to the hooks of that pass, where these differ from row to row."""
HooksAfterRows = Callable[[Int[Tensor, " row"], Int[Tensor, "row digit"]], Sequence[Hook]]
"""From the indices of the rows that one pass runs, and the digits written after them, to the hooks of that pass."""


class ModelFigures(NamedTuple):
    """What predicting some rows costs a model, and what it costs the best predictor on the same rows.

    Nats per predicted token (all but the first of a row), and shares, 0 to 1; where several tokens are the most probable, each counts
    for its share of them.
    """

    loss: float
    accuracy: float
    bayes_loss: float
    bayes_accuracy: float
    excess: float
    """`loss` less `bayes_loss`; paired, so what the rows happen to be, which moves both alike, cancels."""


def check_fits(model: Any, machine: TokFSM, n_tokens: int) -> None:
    """Raise unless a host has the vocabulary of the machine and takes rows of `n_tokens` tokens.

    Raises:
        ConfigError: it has another vocabulary, or a shorter context.
    """
    vocabulary, context = int(as_host(model).cfg.d_vocab), int(model.cfg.n_ctx)
    if vocabulary != machine.n_vocabulary:
        raise ConfigError(
            f"a model of {vocabulary} tokens was given, but the machine writes {machine.n_vocabulary} (its digits and BOS). Give a model "
            f"of this machine."
        )
    if n_tokens > context:
        raise ConfigError(f"rows of {n_tokens} tokens were asked for, but the model takes {context}. Give shorter rows.")


def check_prefixes(machine: TokFSM, prefixes: Int[Tensor, "row pos"]) -> None:
    """Raise unless rows begin with BOS and end in a complete state, and nothing of the next one.

    Raises:
        DataError: they do not.

    >>> check_prefixes(TokFSM.paper(), torch.tensor([[10, 0, 4, 1, 3]]))
    """
    check_tokens(machine, prefixes)
    n_after = prefixes.shape[1] - 1
    if not len(prefixes) or n_after < machine.n_digits or n_after % machine.n_digits:
        raise DataError(
            f"{len(prefixes)} rows of {n_after} tokens after BOS were given, but a state is {machine.n_digits} digits and what is asked "
            f"about comes after one. Give one row or more that ends in a complete state (write_tokens(..., keep_last=True))."
        )
    wrong = (read_states(machine, prefixes)[:, -1] == NO_STATE).nonzero().flatten().tolist()
    if wrong:
        raise DataError(f"row {wrong[0]} ends in digits of no state of the machine ({machine.n_states} states). End it in a state.")


def run_batches(
    model: Any,
    tokens: Int[Tensor, "row pos"],
    batch_size: int,
    hooks: Sequence[Hook] | HooksOfRows = (),
) -> Iterator[tuple[slice, Any]]:
    """Run rows a batch at a time, under hooks if there are any, and give where in `tokens` they stand and what the model said.

    Raises:
        ConfigError: a batch of no row.
    """
    check_range("batch_size", batch_size, 1, None, "a batch holds a row")
    parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    if hasattr(model, "blocks"):
        device = home_device(as_host(model), "hook_embed")
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, min(start + batch_size, len(tokens)))
        here = hooks(torch.arange(rows.start, rows.stop)) if callable(hooks) else hooks
        with evaluating(model), torch.no_grad():
            if here:
                with steer(model, here):  # unlike run_with_hooks, it raises where a hook does nothing
                    said = model(tokens[rows].to(device))
            else:
                said = model(tokens[rows].to(device))
        yield rows, said


def collect_at(model: Any, tokens: Int[Tensor, "sequence pos"], hooks: Mapping[str, str], batch_size: int = 100) -> dict[str, Tensor]:
    """Run rows and return what passes hook points, on the CPU, under the keys that they are asked for by.

    >>> collect_at(model, torch.tensor([[1, 2, 3]]), {"middle": "blocks.1.hook_resid_pre"})["middle"].shape
    torch.Size([1, 3, 32])
    """
    found: dict[str, list[Tensor]] = {key: [] for key in hooks}

    def keep(key: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            found[key].append(value.detach().cpu())

        return hook

    for _ in run_batches(model, tokens, batch_size, [(name, keep(key)) for key, name in hooks.items()]):
        pass
    return {key: torch.cat(parts) for key, parts in found.items()}


def last_probabilities(
    model: Any,
    machine: TokFSM,
    tokens: Int[Tensor, "row pos"],
    batch_size: int,
    hooks: Sequence[Hook] | HooksOfRows = (),
) -> Float[Tensor, "row vocabulary"]:
    """Return the probability (float64, on the CPU) that a model gives each token after each row."""
    check_fits(model, machine, tokens.shape[1])
    return torch.cat([logits[:, -1].float().cpu().double().softmax(-1) for _, logits in run_batches(model, tokens, batch_size, hooks)])


def _write(model: Any, prompt: Int[Tensor, "row pos"], n_new: int) -> Int[Tensor, "row pos_and_new"]:
    """Sample tokens after a prompt at temperature 1; a Bridge by its own `generate`.

    That of a HookedTransformer takes the BOS of the prompt for padding where the tokenizer pads with BOS, as that of a TokFSM does, and
    attends to everything but BOS; without a tokenizer it gives learned positions that run ahead by two. Either way the model would write
    something else than its predictions say. Its forward pass with a cache and a mask of its own does neither.
    """
    if is_bridge(model):
        text: Tensor = model.generate(prompt, max_new_tokens=n_new, do_sample=True, temperature=1.0, stop_at_eos=False, verbose=False)
        return text
    from transformer_lens import TransformerLensKeyValueCache
    from transformer_lens.utils import sample_logits

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, prompt.device, len(prompt))
    text = new = prompt
    for _ in range(n_new):
        logits = model(new, attention_mask=torch.ones_like(new), past_kv_cache=cache)
        new = sample_logits(logits[:, -1])[:, None]
        text = torch.cat([text, new], dim=1)
    return text


def sample_text(
    model: Any, machine: TokFSM, n_sequences: int, n_tokens: int = 128, *, batch_size: int = 100, seed: int
) -> Int[Tensor, "sequence pos"]:
    """Sample text from a model: BOS, and after it what the model writes at temperature 1, as many complete states as fit into a row.

    A BOS that the model writes ends nothing; it makes the digits around it no state (`read_states`). The text depends on `batch_size` as
    it does on the seed. The global random generators are left as they were.

    Args:
        model: A host, with codebooks or without.
        machine: The machine whose text it writes.
        n_sequences: Rows, >= 1.
        n_tokens: What a row of the training text has: a multiple of the digits of a state. The row that comes out is cut after its last
            complete state: 127 of 128 tokens (BOS and 63 states) where a state is two digits.
        batch_size: Rows sampled at a time, >= 1.
        seed: Of the samples.

    Raises:
        ConfigError: fewer than one row, rows without room for a state, or a model of another vocabulary or a shorter context.

    Source: Tamkin et al. 2023, section 3 (transition accuracy is measured in sampled text).

    >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    >>> from tl_codebook import load_hf
    >>> config = GPTNeoXConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    >>> sample_text(load_hf(GPTNeoXForCausalLM(config)), TokFSM.paper(), 3, n_tokens=8, seed=0).shape  # BOS and three states
    torch.Size([3, 7])
    """
    check_range("n_sequences", n_sequences, 1, None, "nothing would be sampled")
    check_range("batch_size", batch_size, 1, None, "a batch holds a row")
    n_states = machine.states_in_row(n_tokens) - 1  # BOS takes the place of the last digit, so the last state is not complete
    if n_states < 1:
        raise ConfigError(
            f"rows of {n_tokens} tokens were asked for, which have no room for BOS and the {machine.n_digits} digits of a state. "
            f"Give {2 * machine.n_digits} or more."
        )
    n_new = n_states * machine.n_digits
    model = as_host(model)
    check_fits(model, machine, n_new + 1)
    device = home_device(model, "hook_embed")
    rows = []
    with (
        evaluating(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":  # only the generators that are put back afterwards
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        for start in range(0, n_sequences, batch_size):
            prompt = torch.full((min(batch_size, n_sequences - start), 1), machine.bos, device=device)
            rows.append(_write(model, prompt, n_new).cpu())
    return torch.cat(rows)


def _credit(probabilities: Float[Tensor, "*lead vocabulary"], tokens: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
    """Return 1 where a token is the most probable one, 1/n where it is one of n, and otherwise 0.

    Equals are the rule here (all successors are equally probable), and which of them `argmax` takes would be noise.
    """
    best = probabilities >= probabilities.amax(-1, keepdim=True) * (1 - 1e-9)
    return best.gather(-1, tokens[..., None])[..., 0].double() / best.sum(-1)


def loss_over_bayes(model: Any, machine: TokFSM, tokens: Int[Tensor, "sequence pos"], *, batch_size: int = 100) -> ModelFigures:
    """Return the loss and accuracy of a model on rows of text, and the exact ones of the best predictor on the same rows.

    Args:
        model: A host, or anything that gives logits [sequence pos vocabulary] for tokens.
        machine: The machine that wrote the text.
        tokens: Rows that begin with BOS, each of two tokens or more.
        batch_size: Rows run at a time, >= 1.

    Raises:
        ConfigError: a batch of no row.
        DataError: no rows, rows in which nothing is predicted, or text that the machine cannot write.
        ShapeError: a model that says something else than logits over the vocabulary.

    >>> machine = TokFSM(torch.tensor([[True, True], [True, False]]), base=2)
    >>> loss_over_bayes(lambda tokens: torch.zeros(*tokens.shape, 3), machine, torch.tensor([[2, 0, 1, 0]]))  # any of three tokens
    ModelFigures(loss=1.098..., accuracy=0.333..., bayes_loss=0.462..., bayes_accuracy=0.666..., excess=0.636...)
    """
    if not len(tokens) or tokens.shape[1] < 2:
        raise DataError(f"{list(tokens.shape)} tokens were given, of which none is predicted. Give one row or more, of two or more tokens.")
    tokens = tokens.cpu().long()
    sums = torch.zeros(4, dtype=torch.float64)
    for rows, logits in run_batches(model, tokens, batch_size):
        seen = tokens[rows]
        wanted = (*seen.shape, machine.n_vocabulary)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(f"the model gave {what} for {list(seen.shape)} tokens. Give one that says logits {list(wanted)}.")
        after = seen[:, 1:]
        bayes = bayes_predictions(machine, seen)[:, :-1]
        possible = bayes.gather(-1, after[..., None])[..., 0]
        if bool((possible == 0).any()):
            row, pos = (possible == 0).nonzero()[0].tolist()
            raise DataError(
                f"token {int(after[row, pos])} at position {pos + 1} of row {rows.start + row} cannot come there, which costs the best "
                f"predictor infinitely much. Give text that this machine wrote."
            )
        said = logits[:, :-1].float().cpu().double().log_softmax(-1)
        sums += torch.stack(
            [
                -said.gather(-1, after[..., None]).sum(),
                _credit(said.exp(), after).sum(),
                -possible.log().sum(),
                _credit(bayes, after).sum(),
            ]
        )
    loss, accuracy, bayes_loss, bayes_accuracy = (sums / tokens[:, 1:].numel()).tolist()
    return ModelFigures(loss, accuracy, bayes_loss, bayes_accuracy, loss - bayes_loss)


def next_state_probabilities(
    model: Any,
    machine: TokFSM,
    prefixes: Int[Tensor, "row pos"],
    *,
    fwd_hooks: Sequence[Hook] | HooksOfRows = (),
    hooks_after: HooksAfterRows | None = None,
    batch_size: int = 100,
) -> Float[Tensor, "row state"]:
    """Return the probability that a model writes each state next, after rows that end in a complete state.

    It is the product of those of its digits, for which every beginning of a state is read: up to ``base ** (n_digits - 1)`` rows a row.
    What the model gives to BOS and to numbers that are no state is left out, so that rows need not sum to 1.

    Args:
        model: A host.
        machine: The machine.
        prefixes: Rows of BOS and the digits of complete states.
        fwd_hooks: Pairs of hook name and function to run under; where they differ from row to row, a function from the indices of the
            rows of a pass to these pairs (a row comes again for each beginning). The digits come after the prefix, so positions in a
            prefix stay what they are: name them from its start.
        hooks_after: More hooks for the digits after the first: a function from the indices of the rows of a pass, and the digits of the
            beginning after each, to pairs of hook name and function.
        batch_size: Rows run at a time, >= 1.

    Returns:
        Float64 probabilities.

    Raises:
        ConfigError: a batch of no row, or a model of another vocabulary or a shorter context.
        DataError: rows that do not end in a complete state.

    Source: codebook-features 0.1.2, ``correct_next_state_probs``.

    >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    >>> from tl_codebook import load_hf
    >>> config = GPTNeoXConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    >>> next_state_probabilities(load_hf(GPTNeoXForCausalLM(config)), TokFSM.paper(), torch.tensor([[10, 0, 4]])).shape
    torch.Size([1, 100])
    """
    check_prefixes(machine, prefixes)
    n_rows, length = prefixes.shape
    check_fits(model, machine, length + machine.n_digits - 1)
    prefixes = prefixes.cpu().long()
    base, n_digits = machine.base, machine.n_digits
    probabilities = torch.ones(n_rows, 1, dtype=torch.float64)
    for digit in range(n_digits):
        numbers = torch.arange(probabilities.shape[1])  # what the digits before this one write
        places = base ** torch.arange(digit - 1, -1, -1)
        written = (numbers[:, None] // places % base).repeat(n_rows, 1)
        row_of = torch.arange(n_rows).repeat_interleave(len(numbers))
        text = torch.cat([prefixes[row_of], written], dim=1)

        def hooks_here(rows: Tensor, row_of: Tensor = row_of, written: Tensor = written) -> Sequence[Hook]:
            hooks = list(fwd_hooks(row_of[rows]) if callable(fwd_hooks) else fwd_hooks)
            return hooks + list(hooks_after(row_of[rows], written[rows])) if hooks_after and written.shape[1] else hooks

        said = last_probabilities(model, machine, text, batch_size, hooks_here)[:, :base].unflatten(0, (n_rows, len(numbers)))
        n_begun = -(-machine.n_states // base ** (n_digits - digit - 1))  # greater numbers begin no state
        probabilities = (probabilities[:, :, None] * said).flatten(1)[:, :n_begun]
    return probabilities


def first_transitions(model: Any, machine: TokFSM, *, batch_size: int = 100) -> Float[Tensor, "state next"]:
    """Return the probability that a model writes each state after each first state, for `successor_match`.

    Raises:
        ConfigError: a batch of no row, or a model of another vocabulary or a shorter context.

    Source: codebook-features 0.1.2, ``correct_next_state_probs`` (the first transition).
    """
    rows = write_tokens(machine, torch.arange(machine.n_states)[:, None], keep_last=True)
    return next_state_probabilities(model, machine, rows, batch_size=batch_size)
