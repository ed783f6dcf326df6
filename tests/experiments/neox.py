"""Tiny GPT-NeoX language models of TokFSM text: random ones, and one that is the machine, by hand."""

import torch

import tl_codebook as tlc

FLOOR = 1e-12
"""Probability of what cannot follow, in the model by hand."""


def hf_model(machine, n_layers=2, n_ctx=64):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=machine.n_vocabulary,
        hidden_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=n_ctx,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPTNeoXForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def random_model(machine, host, *, attached=True, tokenizer=None, **sizes):
    """Load a model of random weights, by default with random codes at z (one group a head) and mlp_out."""
    model = tlc.load_hf(hf_model(machine, **sizes), tokenizer, host=host)
    if attached:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            tlc.attach(model, ["z", "mlp_out"], n_codes=12, k=1)
    return model


def model_by_hand(machine, host):
    """Load a model of one block that is a machine of one-digit states, and decides the next token by the code of its MLP alone.

    The block is parallel, so its MLP reads the token and nothing else. Its codes are as many directions as there are tokens, each that of
    what the MLP gives for its token, so long that all else in the residual stream vanishes beside them: token t has the code t. The
    unembedding gives, for each, the logarithm of the distribution that the machine has after it.
    """
    assert machine.n_digits == 1
    hf = hf_model(machine, n_layers=1)
    block, tokens = hf.gpt_neox.layers[0], torch.arange(machine.n_vocabulary)
    with torch.no_grad():
        out = block.mlp(block.post_attention_layernorm(hf.gpt_neox.embed_in(tokens)))
        codes = 1e6 * torch.nn.functional.normalize(out, dim=-1)
        normed = hf.gpt_neox.final_layer_norm(codes).double()
        after = torch.zeros(machine.n_vocabulary, machine.n_vocabulary, dtype=torch.float64)
        after[: machine.n_states, : machine.n_states] = machine.transition
        after[machine.n_states :, : machine.n_states] = 1 / machine.n_states  # after BOS, and digits that are no state
        logits = after.clamp(min=FLOOR).log()
        hf.get_output_embeddings().weight.copy_(torch.linalg.lstsq(normed, logits).solution.T)
    model = tlc.load_hf(hf, host=host)
    like = {"similarity": "inner_product", "selection": "nearest", "input_norm": "none"}
    books = tlc.attach(
        model, {"mlp_out": tlc.CodebookConfig(n_codes=machine.n_vocabulary, k=1, **like), "z": tlc.CodebookConfig(n_codes=6, k=1)}
    )
    with torch.no_grad():
        books["blocks.0.hook_mlp_out"].codes[0] = codes
    return model
