"""A model whose codes are known, so that what causes what can be said beforehand."""

import torch

import tl_codebook as tlc
from tests.tiny import HOSTS, make_hf

OUT, POST, Z = "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.0.attn.hook_z"
N_TOKENS = 12


def chain(host=HOSTS[0]):
    """Return a model of one parallel block: token t has the code t at mlp_out, which makes the code t at resid_post, which alone says what
    comes next, a logit of 1 for t and 0 for the rest. Other positions, and the codes at z, change nothing.
    """
    hf = make_hf("neox", num_hidden_layers=1, vocab_size=N_TOKENS)
    block, tokens = hf.gpt_neox.layers[0], torch.arange(N_TOKENS)
    with torch.no_grad():
        out = block.mlp(block.post_attention_layernorm(hf.gpt_neox.embed_in(tokens)))
        codes = 1e6 * torch.nn.functional.normalize(out, dim=-1)  # all else in the residual stream vanishes beside them
        normed = hf.gpt_neox.final_layer_norm(codes).double()
        hf.get_output_embeddings().weight.copy_(torch.linalg.lstsq(normed, torch.eye(N_TOKENS, dtype=torch.float64)).solution.T)
    model = tlc.load_hf(hf, host=host)
    like = tlc.CodebookConfig(n_codes=N_TOKENS, k=1, similarity="inner_product", selection="nearest", input_norm="none")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        books = tlc.attach(model, {"mlp_out": like, "resid_post": like, "z": tlc.CodebookConfig(n_codes=6, k=2)})
    with torch.no_grad():
        for name in (OUT, POST):
            books[name].codes[0] = codes
    return model
