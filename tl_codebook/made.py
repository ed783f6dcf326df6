"""Hook points that TransformerLens does not have, made out of those that it has: `resid_delta` and `qkv`.

`qkv`: GPT-NeoX computes q, k and v by one projection, [head, (q k v), d_head] flattened. A codebook whose groups do not end where a head
ends needs all three before any of them can go on, but they pass their hook points one after the other. So at `hook_q` k and v are computed
ahead, from the input that the attention was given; at `hook_k` and `hook_v` what comes in is replaced by what was decided then.
"""

from __future__ import annotations

from typing import Any

from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_codebook.errors import AttachError, ConfigError
from tl_codebook.hosts import joined_heads
from tl_codebook.names import MADE_OF, split_hook_name
from tl_codebook.points import CodebookPoint, RelayPoint

__all__ = ["JointPoint", "check_made", "drop", "make"]


class JointPoint(CodebookPoint):
    """The hook point of `qkv`: q, k and v of a layer, [batch pos (head qkv d_head)], snapped together."""

    def listen(self, attention: nn.Module, n_heads: int) -> None:
        """Note the input of the attention at every pass: k and v are computed ahead from it."""
        projection = getattr(attention, "q", None)  # of a Bridge
        heard = projection if isinstance(projection, nn.Module) else attention
        # Past Module.__setattr__: they belong to the model, and this hook point to them.
        self.__dict__.update(attention=attention, heard=heard, n_heads=n_heads, inputs=None, decided=None)
        heard.register_forward_pre_hook(self._hear, with_kwargs=True)

    def stop_listening(self) -> None:
        """Take the hook off again."""
        heard = self.__dict__.pop("heard")
        for key in [key for key, hook in heard._forward_pre_hooks.items() if getattr(hook, "__self__", None) is self]:
            del heard._forward_pre_hooks[key]
            heard._forward_pre_hooks_with_kwargs.pop(key, None)
        for name in ("attention", "n_heads", "inputs", "decided"):
            self.__dict__.pop(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inputs": None, "decided": None}  # they hang on a graph: no copy of them

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.enabled:
            self.__dict__["inputs"] = (args[0], args[0]) if args else (kwargs["key_input"], kwargs["value_input"])

    def _ahead(self, letter: str, x: Tensor) -> Tensor:
        attention = self.__dict__["attention"]
        projection = getattr(attention, letter, None)
        if isinstance(projection, nn.Module):
            return projection.original_component(x)  # type: ignore[operator]
        if x.ndim != 3:
            raise self._no_common_input()
        weight, bias = getattr(attention, f"W_{letter.upper()}"), getattr(attention, f"b_{letter.upper()}")
        return einsum(x, weight, "batch pos d_model, head d_model d_head -> batch pos head d_head") + bias

    def _no_common_input(self) -> AttachError:
        return AttachError(
            f"{self.site}: q, k and v have no input in common here (set_use_split_qkv_input or set_use_attn_in gives each its own), and a "
            "codebook over all three needs one. Switch that off, or detach the codebook."
        )

    def part(self, index: int, x: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        """Return what goes on at `hook_q`, `hook_k` or `hook_v` (`index` 0, 1, 2) in place of `x`."""
        kept, n_heads = self.__dict__, self.__dict__["n_heads"]
        if index == 0:
            if kept["inputs"] is None:
                raise self._no_common_input()
            of_k, of_v = kept["inputs"]
            joined = self(joined_heads([x, self._ahead("k", of_k), self._ahead("v", of_v)], n_heads))
            parts = rearrange(joined, "batch pos (head qkv d_head) -> qkv batch pos head d_head", head=n_heads, qkv=3)
            kept["inputs"], kept["decided"] = None, parts
        parts = kept["decided"]
        if parts is None or parts.shape[1:3] != x.shape[:2]:
            raise AttachError(
                f"{self.site}: hook_k or hook_v fired without hook_q before it. Run whole blocks, or use bypassed(model, 'qkv')."
            )
        if index == 2:
            kept["decided"] = None
        return parts[index].reshape(x.shape)


def check_made(model: Any, name: str) -> None:
    """Raise `ConfigError` where a made site cannot be: `qkv` with grouped-query attention."""
    if split_hook_name(name)[1] == "qkv":
        n_heads = int(model.cfg.n_heads)
        n_kv = int(getattr(model.cfg, "n_key_value_heads", None) or n_heads)
        if n_kv != n_heads:
            raise ConfigError(f"{name!r} was asked for, but k and v have {n_kv} heads and q {n_heads}. Use the sites 'q', 'k' and 'v'.")


def _parts(model: Any, name: str) -> tuple[nn.Module, str, list[HookPoint]]:
    """Return the module that is to hold a made hook point, its name there, and the hook points that it is made of."""
    layer, site = split_hook_name(name)
    block, hooks = model.blocks[layer], model.hook_dict
    holder = block.attn if site == "qkv" else block
    return holder, name.rpartition(".")[2], [hooks[f"blocks.{layer}.{part}"] for part in MADE_OF[site]]


def make(model: Any, name: str) -> CodebookPoint:
    """Make the hook point `name`, and let those that it is made of serve it."""
    holder, child, parts = _parts(model, name)
    joint = split_hook_name(name)[1] == "qkv"
    point = JointPoint() if joint else CodebookPoint()
    for index, part in enumerate(parts):
        if type(part) is HookPoint:
            part.__class__ = RelayPoint
        # Past Module.__setattr__: the holder owns it, under one name.
        part.__dict__["joint" if joint else ("feeds", "delta")[index]] = (point, index) if joint else point
    holder.add_module(child, point)
    if isinstance(point, JointPoint):
        point.listen(holder, int(model.cfg.n_heads))
    return point


def drop(model: Any, name: str) -> None:
    """Undo `make`."""
    holder, child, parts = _parts(model, name)
    point = holder._modules.pop(child, None)
    if isinstance(point, JointPoint):
        point.stop_listening()
    for part in parts:
        if isinstance(part, RelayPoint):
            part.stop_serving(point)
