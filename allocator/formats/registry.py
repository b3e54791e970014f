"""All formats by name, whichever codec encodes them, and what a search is offered.

In: a name, or a shape. Out: formats. Invariant: a name means one format over all codecs, because
allocations say formats by name.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import chain

from allocator.errors import FormatError
from allocator.formats import ggml
from allocator.formats.base import Format

Offer = Callable[[tuple[int, ...]], Iterable[Format]]
"""Formats of one codec that a search considers for rows of a shape `(..., in_features)`."""

FORMATS: dict[str, Format] = dict(ggml.FORMATS)
"""Every format by name."""
OFFERS: dict[str, Offer] = {ggml.CODEC: ggml.offered}
"""What a search considers, by codec; see `register_formats`."""


def register_formats(
    codec: str, formats: Collection[Format], *, offered: Offer | None = None
) -> None:
    """Adds the formats of a codec; registering equal ones again changes nothing.

    Args:
        codec: its name.
        formats: all that it encodes.
        offered: those that a search considers for a shape; all of them by default.

    Raises:
        FormatError: if a format names another codec, or its name means another format already.
    """
    for fmt in formats:
        if fmt.codec != codec:
            raise FormatError(f"format {fmt.name} names codec {fmt.codec!r}, registered by {codec}")
        if FORMATS.get(fmt.name, fmt) != fmt:
            raise FormatError(
                f"format {fmt.name!r} of codec {codec} exists already in codec "
                f"{FORMATS[fmt.name].codec}; give it another name"
            )
    FORMATS.update({fmt.name: fmt for fmt in formats})
    OFFERS[codec] = offered or (lambda shape: formats)


def format_named(name: str) -> Format:
    """Returns the format of that name.

    Raises:
        FormatError: if there is none.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(
            f"unknown format {name!r}; known: {', '.join(FORMATS)}; a format of your own codec is "
            "known once the codec's module is imported"
        ) from None


def offered(
    shape: tuple[int, ...],
    *,
    importance: bool,
    source: Format | None = None,
    codecs: Collection[str] | None = None,
) -> tuple[Format, ...]:
    """Returns the formats that a search considers for a weight of `shape`, largest first.

    All of them store the weight as named.

    Args:
        shape: `(..., out_features, in_features)`.
        importance: whether the weight's input channels have an importance vector.
        source: the format that the checkpoint holds the weight in, if it is one of these. That
            format is exact, so no larger one is of use.
        codecs: names of those whose formats are considered; all by default.
    """
    considered = chain.from_iterable(
        offer(shape) for codec, offer in OFFERS.items() if codecs is None or codec in codecs
    )
    formats = sorted((f for f in considered if f.stores(shape)), key=lambda f: -f.bits)
    if source is not None:
        formats = [source, *(f for f in formats if f.bits < source.bits)]
    return tuple(f for f in formats if importance or not f.needs_importance)


def fallback(name: str, shape: tuple[int, ...]) -> Format:
    """Returns what llama-quantize stores when asked for `name` on a weight of `shape`.

    For uniform baselines and role mixes only: a search space never offers a format that it
    cannot store as named.

    Raises:
        FormatError: if there is no format of that name.
    """
    wanted = format_named(name)
    return wanted if wanted.stores(shape) else ggml.replacement(wanted, shape)
