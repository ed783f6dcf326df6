"""Which of two sites a forward pass comes to first: an edge goes from the earlier one to the later."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tl_codebook.errors import ConfigError
from tl_codebook.names import SITES

__all__ = ["fires_before", "in_order"]

_STAGES: tuple[tuple[str, ...], ...] = (
    (SITES["resid_pre"],),
    ("ln1.hook_normalized",),
    ("hook_q_input", "hook_k_input", "hook_v_input"),
    (SITES["q"], SITES["k"], SITES["v"], SITES["qkv"]),
    (SITES["z"],),
    ("attn.hook_result",),
    (SITES["attn_out"],),
    (SITES["resid_mid"],),
    ("hook_mlp_in",),
    ("ln2.hook_normalized",),
    ("mlp.hook_pre",),
    (SITES["post"],),
    (SITES["mlp_out"],),
    (SITES["resid_delta"],),
    (SITES["resid_post"],),
)
"""What follows ``blocks.<layer>.`` in the order of a pass. Those of one stage do not feed each other. In a parallel block (GPT-NeoX)
neither do the attention and the MLP of one layer, which this order does not know."""

_STAGE_OF = {tail: number for number, tails in enumerate(_STAGES) for tail in tails}
_BEFORE = ("hook_embed", "hook_pos_embed")
_AFTER = ("ln_final.hook_normalized",)
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def _place(name: str) -> tuple[float, int]:
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _STAGE_OF:
        return float(match[1]), _STAGE_OF[match[2]]
    if name in _BEFORE or name in _AFTER:
        return (-1.0, 0) if name in _BEFORE else (float("inf"), 0)
    raise ConfigError(f"nobody knows when {name!r} runs among the other sites, so that no edge could be directed. Leave it out of sites=.")


def fires_before(earlier: str, later: str) -> bool:
    """Tell whether a forward pass comes to one hook point before another, so that it may feed it; False for q, k and v of one layer.

    Raises:
        ConfigError: a hook point whose place in the pass is not known.

    >>> fires_before("blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"), fires_before("blocks.0.attn.hook_q", "blocks.0.attn.hook_k")
    (True, False)
    """
    return _place(earlier) < _place(later)


def in_order(names: Iterable[str]) -> list[str]:
    """Return hook names in the order of a forward pass, those that do not follow each other by name.

    Raises:
        ConfigError: a hook point whose place in the pass is not known.

    >>> in_order(["blocks.1.attn.hook_q", "blocks.0.hook_resid_post", "blocks.0.attn.hook_z"])
    ['blocks.0.attn.hook_z', 'blocks.0.hook_resid_post', 'blocks.1.attn.hook_q']
    """
    return sorted(names, key=lambda name: (_place(name), name))
