"""Texts of several lengths, and a tiny model with codebooks at z and mlp_out."""

import torch

import tl_codebook as tlc
from tests.tiny import make_host

N_CODES, K = 12, 3
TEXTS = [" ".join(f"w{3 + (5 * i + j * j) % 57}" for j in range(4 + 11 * (i % 5))) for i in range(40)]


def coded_model(n_codes=N_CODES, k=K, seed=3):
    host = make_host("native")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tlc.attach(host, ["z", "mlp_out"], n_codes=n_codes, k=k)
    return host
