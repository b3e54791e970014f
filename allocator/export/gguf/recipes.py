"""Texts for llama.cpp's programs: llama-quantize's own recipe, and options of whatever runs a file.

In: an allocation of target gguf, or a `--tensor-type-file`. Out: the text, or formats by group.
Invariant: a recipe that was written here reads back as the same formats.
"""

import re
from collections.abc import Mapping

from allocator.decision.allocation import DEFAULT_KV_FORMAT, Allocation
from allocator.errors import FormatError
from allocator.families.gguf import yarn_options
from allocator.formats.ggml import FORMATS
from allocator.targets import Layout
from allocator.targets.gguf.memory import kv_parts
from allocator.targets.gguf.metadata import yarn_betas


def llama_cpp_options(layout: Layout, allocation: Allocation, workload: Mapping[str, int]) -> str:
    """Returns what llama.cpp's programs must be told, the file not saying it; empty for defaults.

    Args:
        layout: of the checkpoint, some of which llama.cpp does not read from the file.
        allocation: what the file holds.
        workload: `context` and `sequences`, where a whole device was budgeted; then without second
            copies of weights, which a CPU keeps otherwise.
    """
    keys, values = kv_parts(allocation.kv_format)
    betas = yarn_betas(layout.inventory)
    options = [] if betas is None else [yarn_options(betas)]
    if (keys, values) != (DEFAULT_KV_FORMAT, DEFAULT_KV_FORMAT):
        options.append(f"--cache-type-k {keys} --cache-type-v {values} --flash-attn on")
    if workload or allocation.micro_batch is not None:
        options.append(f"--ubatch-size {allocation.runtime_settings.micro_batch}")
    if workload:
        n = workload["sequences"]
        options.append(f"--ctx-size {workload['context'] * n} --parallel {n} --no-repack")
    return " ".join(options)


def tensor_type_file(layout: Layout, allocation: Allocation) -> str:
    """Writes lines `regex=type` that make llama-quantize choose the same format for every tensor.

    Full-precision matrices beside routers are among them: some, such as those of linear attention,
    it would take for any other.
    """
    types = {g.stored_as: allocation.format_of[name] for name, g in layout.groups.items()}
    types |= {
        t.stored_as: t.dtype
        for t in layout.full_precision
        if len(t.shape) > 1 and not t.role.has_row_per_expert
    }
    return "".join(f"^{re.escape(name)}$={fmt.lower()}\n" for name, fmt in types.items())


def parse_tensor_type_file(text: str, layout: Layout) -> dict[str, str]:
    """Reads formats by group, as llama-quantize reads the file; groups without a match are absent.

    Its rules (tools/quantize/quantize.cpp, src/llama-quant.cpp): entries are separated by white
    space and split at the first `=`; the pattern is lowered in case, then searched anywhere in the
    tensor's name; the first entry that matches decides. Older builds went on past a match that
    named the type that the tensor would have had anyway.

    Raises:
        FormatError: if an entry is malformed or its type unknown, naming the line.
    """
    entries = [
        _entry(number, word)
        for number, line in enumerate(text.splitlines(), 1)
        for word in line.split()
    ]
    formats: dict[str, str] = {}
    for name, group in layout.groups.items():
        for pattern, chosen in entries:
            if pattern.search(group.stored_as):
                formats[name] = chosen
                break
    return formats


def _entry(number: int, word: str) -> tuple[re.Pattern[str], str]:
    pattern, equals, kind = word.partition("=")
    if not pattern or not equals or kind.upper() not in FORMATS:
        raise FormatError(
            f"line {number}: {word[:80]!r}, needed regex=type, a type of "
            f"{', '.join(FORMATS).lower()}"
        )
    try:
        return re.compile(pattern.lower()), kind.upper()
    except re.error as error:
        raise FormatError(
            f"line {number}: {pattern!r} is no regular expression ({error})"
        ) from None
