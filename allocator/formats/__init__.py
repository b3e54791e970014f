"""Every way to store a tensor, with its exact bytes. The only place that knows a block's size.

`base` says what a format is, `ggml` is the table of one codec's formats, `registry` names all
formats, and `parts` reads groups of experts that are stored in several.
"""

from allocator.formats.base import Format, Importance
from allocator.formats.ggml import OFFERED
from allocator.formats.parts import Parts, formats_in, in_parts, parts, parts_text
from allocator.formats.registry import (
    FORMATS,
    Offer,
    fallback,
    format_named,
    offered,
    register_formats,
)

__all__ = [
    "FORMATS",
    "OFFERED",
    "Format",
    "Importance",
    "Offer",
    "Parts",
    "fallback",
    "format_named",
    "formats_in",
    "in_parts",
    "offered",
    "parts",
    "parts_text",
    "register_formats",
]
