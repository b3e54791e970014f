"""Every codec by name, and which one encodes a format.

In: a format. Out: its codec. Invariant: a codec's formats are registered with it, so that whatever
can be named can be encoded. ggml's library is loaded when it encodes for the first time.

A codec of one's own is one file that ends in `register_codec(MyCodec())`; whoever searches, writes
or loads with its formats imports that file first.
"""

from collections.abc import Iterable

from allocator.codecs.base import Codec
from allocator.codecs.ggml import GGML
from allocator.errors import FormatError
from allocator.formats import Format, Offer, register_formats

CODECS: dict[str, Codec] = {GGML.name: GGML}
"""By name; see `register_codec`."""


def register_codec(codec: Codec, *, offered: Offer | None = None) -> None:
    """Adds a codec and its formats.

    Args:
        codec: the codec.
        offered: the formats that a search considers for a shape; all of them by default.

    Raises:
        FormatError: if its name, or that of one of its formats, is taken.
    """
    known = CODECS.get(codec.name, codec)
    if known.identity != codec.identity:
        raise FormatError(
            f"codec {codec.name!r} is {known.identity} already; give {codec.identity} another name"
        )
    register_formats(codec.name, codec.formats, offered=offered)
    CODECS[codec.name] = codec


def codec_of(fmt: Format) -> Codec:
    """Returns the codec that encodes a format.

    Raises:
        FormatError: if it is not registered.
    """
    if fmt.codec not in CODECS:
        raise FormatError(
            f"{fmt.name}: no codec {fmt.codec!r}, known: {', '.join(CODECS)}; import the module "
            "that registers it"
        )
    return CODECS[fmt.codec]


def identity_of(formats: Iterable[Format]) -> str:
    """Names what writes the bytes of these formats, for records: `xllamacpp 0.2.13`."""
    return ", ".join(codec.identity for codec in _codecs_of(formats)) or GGML.identity


def versions_of(formats: Iterable[Format]) -> dict[str, str]:
    """Returns what a digest of inputs says of the codecs behind these formats.

    `codec` is ggml's version, as in digests made before there were others; `codec <name>` is the
    identity of each other.
    """
    others = {f"codec {c.name}": c.identity for c in _codecs_of(formats) if c is not GGML}
    return {"codec": GGML.version, **others}


def _codecs_of(formats: Iterable[Format]) -> list[Codec]:
    return [CODECS[name] for name in sorted({fmt.codec for fmt in formats})]
