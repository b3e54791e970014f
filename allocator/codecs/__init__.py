"""Encoding and decoding of formats, and the cache of encoded weights.

`base` is what a codec offers, `registry` names all codecs, `ggml` is one, `encodings` the cache.
"""

from allocator.codecs.base import Bytes, Codec, Floats, Halves
from allocator.codecs.registry import codec_of, identity_of, register_codec, versions_of

__all__ = [
    "Bytes",
    "Codec",
    "Floats",
    "Halves",
    "codec_of",
    "identity_of",
    "register_codec",
    "versions_of",
]
