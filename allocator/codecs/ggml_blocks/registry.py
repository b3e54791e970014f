"""Which class knows what the blocks of a ggml format are made of."""

from functools import cache

from allocator.codecs.blocks import BlockFormat
from allocator.codecs.ggml_blocks.grid import GRIDS
from allocator.codecs.ggml_blocks.scalar import SCALARS
from allocator.formats import Format


@cache
def block_format(fmt: Format) -> BlockFormat | None:
    """Returns what a format's bytes are made of; None if nothing here knows the format."""
    make = (GRIDS | SCALARS).get(fmt.name)
    return make(fmt) if make else None
