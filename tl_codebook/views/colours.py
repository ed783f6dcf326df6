"""The colours of the views, for light and dark surroundings, each with the text colour that is easiest to read on it."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence

__all__ = ["N_HUES", "N_LEVELS", "colour_rules", "contrast", "hue_of", "level_of", "text_on"]

N_LEVELS = 10
"""Steps of the one-hue scale, 1 (faint) to 10 (full); 0 is no colour."""
N_HUES = 12
"""Hues that tell codes apart."""

Rgb = tuple[int, int, int]

_LIGHT: tuple[Rgb, ...] = ((255, 247, 236), (253, 199, 132), (226, 108, 26))
_DARK: tuple[Rgb, ...] = ((52, 38, 24), (140, 72, 16), (250, 160, 72))
_INK: dict[str, Rgb] = {"dark": (0, 0, 0), "light": (255, 255, 255)}


def _luminance(colour: Rgb) -> float:
    parts = [value / 255 for value in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Rgb, other: Rgb) -> float:
    """Return the contrast of two colours, 1 (none) to 21.

    Source: WCAG 2.1, contrast ratio.

    >>> round(contrast((0, 0, 0), (255, 255, 255)), 3)
    21.0
    """
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def text_on(background: Rgb) -> Rgb:
    """Return black or white, whichever is easier to read: at least 4.5 to 1 on every background.

    >>> text_on((255, 240, 220)), text_on((20, 20, 60))
    ((0, 0, 0), (255, 255, 255))
    """
    return max(_INK.values(), key=lambda ink: contrast(ink, background))


def level_of(share: int | float) -> int:
    """Return the step of the scale for a share of the largest value: 0 at or below zero, else 1 to 10.

    >>> level_of(-0.2), level_of(0.0), level_of(0.01), level_of(0.5), level_of(1.0)
    (0, 0, 1, 5, 10)
    """
    return 0 if not share > 0 else max(1, min(N_LEVELS, round(share * N_LEVELS)))


def hue_of(name: object) -> int:
    """Return which hue a code has, 0 to 11: the same in every process.

    >>> hue_of("L0.mlp_out:3") == hue_of("L0.mlp_out:3")
    True
    """
    return zlib.crc32(str(name).encode("utf-8", "backslashreplace")) % N_HUES


def _between(stops: Sequence[Rgb], share: float) -> Rgb:
    place = share * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    one, other = stops[index], stops[index + 1]
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _of_hue(hue: int, *, dark: bool) -> Rgb:
    lightness, saturation = (0.3, 0.5) if dark else (0.84, 0.72)
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb((hue * 5 % N_HUES) / N_HUES, lightness, saturation))
    return red, green, blue


def _hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def colour_rules(scope: str, *, dark: bool) -> str:
    """Return the style rules of all colours under a selector: ``.a1`` to ``.a10`` of the scale, ``.h0`` to ``.h11`` for codes.

    >>> colour_rules(".x", dark=False).splitlines()[9]
    '.x .a10{background:#e26c1a;color:#000000;fill:#e26c1a}'
    """
    stops = _DARK if dark else _LIGHT
    rules = {f"a{level}": _between(stops, (level - 1) / (N_LEVELS - 1)) for level in range(1, N_LEVELS + 1)}
    rules |= {f"h{hue}": _of_hue(hue, dark=dark) for hue in range(N_HUES)}
    return "\n".join(
        f"{scope} .{name}{{background:{_hex(colour)};color:{_hex(text_on(colour))};fill:{_hex(colour)}}}" for name, colour in rules.items()
    )
