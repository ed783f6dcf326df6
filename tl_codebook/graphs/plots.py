"""Pictures of what patching does, by matplotlib, which is loaded when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_codebook.errors import ConfigError, check_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_effects"]

_TITLES = {
    "recovered": "share of the difference that clean codes bring back",
    "lost": "share of the difference that corrupt codes destroy",
    "into_corrupt": "metric of the corrupt run with clean codes",
    "into_clean": "metric of the clean run with corrupt codes",
    "random": "control: codes of equal frequency instead of the clean ones",
    "wrong": "control: clean codes of other positions",
}


def plot_effects(effects: Any, what: str, ax: Axes | None, n: int) -> Axes:
    """Draw a `PatchEffects`: two axes as an image whose colours are symmetric about no effect, one as bars of the `n` largest."""
    check_whole("n", n, least=1)
    values = effects.values(what)
    nothing = {"into_corrupt": effects.corrupt, "into_clean": effects.clean}.get(what, 0.0)
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("a plot was asked for, but matplotlib is not installed. Install it: pip install matplotlib.") from None
    if values.ndim == 2:
        if ax is None:
            size = (max(4.0, 1.5 + 0.35 * values.shape[1]), max(2.0, 1.0 + 0.3 * values.shape[0]))
            _, ax = pyplot.subplots(figsize=size, layout="constrained")
        limit = float((values - nothing).abs().max()) or 1.0
        image = ax.imshow(values.numpy(), cmap="RdBu", vmin=nothing - limit, vmax=nothing + limit, aspect="auto")
        ax.figure.colorbar(image, ax=ax)
        names = [f"{pos} {word}" for pos, word in zip(effects.axes[1], effects.words or [""] * values.shape[1], strict=True)]
        ax.set_xticks(range(values.shape[1]), _plain(name.strip() for name in names), rotation=90 if effects.words else 0)
        ax.set_yticks(range(values.shape[0]), _plain(effects.axes[0]))
        ax.set_xlabel("position")
    else:
        order = (values - nothing).abs().argsort(descending=True, stable=True)[:n]
        if effects.by != "code":
            order = order.sort().values  # the sites in their own order
        if ax is None:
            _, ax = pyplot.subplots(figsize=(6.0, max(2.0, 1.0 + 0.25 * len(order))), layout="constrained")
        ax.barh(range(len(order)), values[order].numpy() - nothing, left=nothing)
        ax.set_yticks(range(len(order)), _plain(effects.axes[0][i] for i in order.tolist()))
        ax.invert_yaxis()
        ax.axvline(nothing, color="black", linewidth=0.8)
    ax.set_title(_TITLES[what], fontsize=9)
    return ax


def _plain(names: Any) -> list[str]:
    return [str(name).replace("$", r"\$") for name in names]  # a dollar would start a formula
