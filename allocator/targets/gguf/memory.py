"""Memory that stock llama.cpp allocates: KV cache, compute buffer, logits, the process.

In: an inventory (its `config.json`; no weights) and how a context is opened. Out: bytes. Invariant:
these are the bytes that llama.cpp itself reports for the same file and context, to the byte
(tests/targets/test_gguf_memory.py); the sources are named where the formulas are.

A context for `sequences` sequences of `context` tokens is opened with n_ctx = context x sequences,
n_seq_max = sequences, kv_unified = false (the library's default) and flash attention (its default;
required for quantized values). Each sequence then has a stream of its own in the cache, `context`
rounded up to 256 cells (llama-context.cpp: `n_ctx_seq = GGML_PAD(n_ctx / n_seq_max, 256)`).

gpt-oss has a second cache, for the layers that look back no further than a sliding window. It is
taken as with swa_full = false, the default of llama-server and llama-cli and what `LlamaCpp` asks
for; the library's own default, true, would give it as many cells as the first.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from allocator.checkpoint.inventory import Inventory
from allocator.errors import TargetError
from allocator.families import ComputeGraph, LinearAttention, Role, Scoring, StateSpace
from allocator.formats import FORMATS
from allocator.targets.gguf.graph import Graph, Tensor, padded
from allocator.targets.layout import CacheRows

KV_FORMATS = {name: FORMATS[name.upper()] for name in ("f16", "q8_0", "q4_0")}
"""Formats of keys and values, by llama.cpp's name."""

PROCESS_BYTES = 24 << 20
"""The library itself: 17 MiB of code and tables, half a MiB for each of 14 threads."""

TOKEN_BYTES = 512
"""One token of a tokenizer: its text, its merge, its places in tables (470 measured)."""

_CELLS = 256  # a stream of the cache is a multiple of it
_LEAST_ROTATION = 64


# -- the cache


def kv_parts(kv_format: str) -> tuple[str, str]:
    """Returns the formats of keys and values: of `q8_0/q4_0`, these two; of `q8_0`, it twice.

    Raises:
        TargetError: if llama.cpp has no such format, or we do not offer it.
    """
    k, slash, v = kv_format.partition("/")
    parts = (k, v if slash else k)
    if not set(parts) <= set(KV_FORMATS):
        raise TargetError(
            f"gguf: kv_format {kv_format!r}, needed one of {', '.join(KV_FORMATS)}, or two such as "
            "q8_0/q4_0 for keys and values"
        )
    return parts


def kv_cache_bytes(
    inventory: Inventory, *, kv_format: str, context: int, sequences: int, micro_batch: int
) -> int:
    """Returns the bytes of the KV cache.

    Per layer and cell, keys and values of `heads x head_dim` each; under multi-head latent
    attention one row of `kv_lora_rank + qk_rope_head_dim` alone, whose first part is read again as
    the values (llama-kv-cache.cpp: `has_v = !is_mla`). There keys and values share their format.

    Args:
        inventory: the checkpoint.
        kv_format: as in `kv_parts`.
        context: tokens of one sequence.
        sequences: held at once.
        micro_batch: tokens computed at once; a sliding window has room for them beside it.

    Raises:
        TargetError: if the format is unknown, or its blocks do not fit the rows or heads.
    """
    dims = _dims(inventory)
    whole = padded_context(context)
    slid = _sliding_cells(dims, context, _n_tokens(micro_batch, context, sequences))
    return sum(
        padded((slid if dims.slides(layer) else whole) * sequences * nbytes)
        for layer in range(dims.n_layers)
        for nbytes in _kv_bytes(dims, kv_format)
    )


def kv_read_bytes(inventory: Inventory, *, kv_format: str, context: int) -> int:
    """Returns the bytes of keys and values that decoding a token reads of a full context.

    Cells outside a sliding window are masked, and not read (ggml-cpu/ops.cpp, flash attention).
    Layers with linear attention, a state space model or a short convolution have a state in their
    place, float32 whatever the format; others nothing.

    Raises:
        TargetError: as `kv_cache_bytes`.
    """
    dims = _dims(inventory)
    whole = padded_context(context)
    attended, linear, spaces, short = (
        [x for x in range(dims.n_layers) if inventory.of_role(role, x)]
        for role in (Role.O, Role.LINEAR_OUT, Role.SSM_OUT, Role.CONV_OUT)
    )
    read = sum(
        (min(whole, dims.window) if dims.slides(x) else whole)
        * sum(_kv_bytes(_of_layer(inventory, dims, x), kv_format))
        for x in attended
    )
    states = len(linear) * _state_bytes(inventory.dimensions.linear)
    states += len(spaces) * _space_bytes(inventory.dimensions.state_space)
    states += len(short) * 4 * ((inventory.dimensions.conv_kernel or 1) - 1) * dims.hidden
    return read + states


def _of_layer(inventory: Inventory, dims: "_Dims", layer: int) -> "_Dims":
    """With the heads of keys of one layer, where layers differ in them."""
    family = inventory.family
    sizes = family.layer_sizes(family.text_config(inventory.config), layer)
    if not {"head", "keys"} <= set(sizes):
        return dims
    return replace(dims, head=sizes["head"], kv_heads=sizes["keys"] // sizes["head"])


def _state_bytes(linear: LinearAttention | None) -> int:
    """Bytes that a layer with linear attention remembers of a sequence: matrices, and tokens."""
    if linear is None:
        return 0
    channels = 2 * linear.keys + linear.values
    return 4 * (linear.values * linear.key_head + (linear.kernel - 1) * channels)


def _space_bytes(space: StateSpace | None) -> int:
    """Bytes that a state space model remembers of a sequence: its state, and tokens."""
    if space is None:
        return 0
    return 4 * (space.values * space.state + (space.kernel - 1) * space.channels)


def padded_context(context: int) -> int:
    """Returns the cells that a sequence of `context` tokens is given."""
    return -(-context // _CELLS) * _CELLS


def _sliding_cells(d: "_Dims", context: int, tokens: int) -> int:
    """Cells of a sequence in layers with a window (llama-kv-cache-iswa.cpp: `size_swa`)."""
    return padded_context(min(padded_context(context), d.window + tokens))


def _n_tokens(micro_batch: int, context: int, sequences: int) -> int:
    """Of a micro-batch, at most all there are."""
    return min(micro_batch, context * sequences)


def _kv_bytes(d: "_Dims", kv_format: str) -> tuple[int, ...]:
    """Bytes of a cell in a layer, keys and values."""
    rows = zip(kv_parts(kv_format), _cell_rows(d, kv_format), strict=True)
    return tuple(_row_bytes(fmt, heads, width) for fmt, (heads, width) in rows)


def _cell_rows(dims: "_Dims", kv_format: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and their width in a row of keys and in one of values."""
    if not dims.rank:
        return (dims.kv_heads, dims.head), (dims.kv_heads, dims.head)
    k, v = kv_parts(kv_format)
    if k != v:
        raise TargetError(
            f"gguf: kv_format {kv_format!r}: under multi-head latent attention keys and values are "
            f"one row, needed one format; choose {k} or {v}"
        )
    return (1, dims.rank + dims.rope), (0, dims.rank)


def _row_bytes(fmt: str, heads: int, width: int) -> int:
    stored = KV_FORMATS[fmt]
    if not stored.stores((width,)):
        raise TargetError(
            f"gguf: kv_format {fmt} stores {stored.block} values together, the heads of this "
            f"model have {width}; choose f16"
        )
    return stored.nbytes((heads, width))


# -- what is computed


def output_bytes(inventory: Inventory, *, outputs: int) -> int:
    """Returns the bytes of the logits that the host reads: vocabulary x `outputs` in F32.

    llama.cpp reserves one row per sequence, and more once a batch asks for more
    (`llama_context::output_reserve`): generating text needs one per sequence.
    """
    return 4 * _dims(inventory).vocab * outputs


def compute_bytes(
    inventory: Inventory,
    *,
    kv_format: str,
    context: int,
    sequences: int,
    micro_batch: int,
    n_experts: int,
    experts_used: int,
    outputs: int | None = None,
) -> int:
    """Returns the bytes of the compute buffer: activations, masks, logits of a micro-batch.

    The graph of a prompt's micro-batch at full context (`llama_context::sched_reserve`, which also
    reserves a token of every sequence), built in shapes, and allocated as ggml does.

    Args:
        inventory: the checkpoint.
        kv_format: as in `kv_parts`.
        context: tokens of one sequence.
        sequences: held at once.
        micro_batch: tokens computed at once (n_ubatch), of all sequences together.
        n_experts: that a layer retains.
        experts_used: routed experts per token.
        outputs: tokens of a micro-batch that may ask for logits (n_outputs_max); all by default,
            as in llama.cpp, while llama-server sets it to its number of sequences.

    Raises:
        TargetError: if the cache cannot have this format, or the graph is not known.
    """
    graph, dims = inventory.family.for_gguf().known_graph(), _dims(inventory)
    _kv_bytes(dims, kv_format)
    tokens = _n_tokens(micro_batch, context, sequences)
    return _compute_bytes(
        graph,
        dims,
        kv_parts(kv_format),
        (padded_context(context), _sliding_cells(dims, context, tokens)),
        sequences,
        -(-tokens // sequences) * sequences,  # as many of each sequence
        max(sequences, min(tokens, outputs or tokens)),
        n_experts,
        experts_used,
    )


def work_bytes(
    inventory: Inventory,
    *,
    context: int,
    sequences: int,
    micro_batch: int,
    n_experts: int,
    experts_used: int,
) -> int:
    """Returns the bytes that ggml's multiplications need on a CPU, apart from the compute buffer.

    The largest operand, encoded for the product (`ggml_graph_plan`): 292 bytes per 256 values for
    the K and IQ formats, fewer for the others but BF16 and F16 (2 per value, not counted); and for
    routed experts a table of experts x experts used x tokens rows.
    """
    d = _dims(inventory)
    tokens = _n_tokens(micro_batch, context, sequences)
    if d.rank:
        attention = max(d.heads * max(d.nope, d.rank, d.value), d.q_rank)
    else:
        attention = d.heads * d.head
    widest = max(attention, d.hidden, d.shared, d.dense if d.first_moe else 0)
    routed = _product_bytes(d.expert * experts_used * tokens)
    routed += n_experts * (8 * experts_used * tokens + 8 + 64)  # rows, their count, a cache line
    return max(_product_bytes(widest * tokens), routed)


def _product_bytes(values: int) -> int:
    return -(-values // 256) * (256 + 256 // 16 * 2 + 4)  # bytes, sums of 16 and a scale: Q8_K


def overhead_bytes(
    inventory: Inventory,
    *,
    context: int,
    sequences: int,
    micro_batch: int,
    n_experts: int,
    experts_used: int,
) -> int:
    """Returns what a process on a CPU needs beyond weights, cache, compute buffer and logits.

    Measured: 17 MiB for code and tables and half a MiB per thread; up to 470 bytes per token of a
    tokenizer; and `work_bytes`. Not counted: second copies of weights (`LlamaCpp(repack=False)`
    makes none) and 43 bytes per cell of the cache.
    """
    work = work_bytes(
        inventory,
        context=context,
        sequences=sequences,
        micro_batch=micro_batch,
        n_experts=n_experts,
        experts_used=experts_used,
    )
    return PROCESS_BYTES + TOKEN_BYTES * _dims(inventory).vocab + work


def rotation(fmt: str, width: int, *, values: bool) -> int:
    """Returns the size of the Hadamard matrix by which heads are rotated for the cache; 0 for none.

    In llama-kv-cache.cpp: keys and queries after RoPE by the largest power of two that divides the
    head, values by 64 (and the attention's result back), if the format is quantized and the head a
    multiple of 64. Never under multi-head latent attention: its graph has no rotation.
    """
    if KV_FORMATS[fmt].block == 1 or width % _LEAST_ROTATION:
        return 0
    return _LEAST_ROTATION if values else width & -width


def cache_rows(fmt: str, width: int, *, values: bool) -> CacheRows:
    """Returns how the cache stores heads of this width in a format of llama.cpp's name."""
    if fmt == "f16":
        return CacheRows()
    return CacheRows(KV_FORMATS[fmt], rotation(fmt, width, values=values))


@dataclass(frozen=True, slots=True)
class _Dims:
    """The widths that the graph depends on; `rank` and `window` are 0 where there is none."""

    n_layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head: int
    window: int
    sliding: frozenset[int]
    q_rank: int
    rank: int
    nope: int
    rope: int
    value: int
    first_moe: int
    dense: int
    expert: int
    shared: int
    groups: int
    groups_used: int
    has_bias: bool
    has_norm: bool
    has_late_softmax: bool
    has_scale: bool

    def slides(self, layer: int) -> bool:
        """Returns whether a layer has the sliding window."""
        return layer in self.sliding


def _dims(inventory: Inventory) -> _Dims:
    dimensions, router, family = inventory.dimensions, inventory.router, inventory.family
    latent, first = dimensions.latent, inventory.moe_layers[0]
    window = family.for_gguf().window(family.text_config(inventory.config), inventory.n_layers)
    return _Dims(
        n_layers=inventory.n_layers,
        hidden=dimensions.hidden,
        vocab=inventory.facts.vocabulary,
        heads=dimensions.heads,
        kv_heads=dimensions.kv_heads,
        head=dimensions.head,
        window=window.tokens,
        sliding=window.layers,
        q_rank=0 if latent is None else latent.q_rank or 0,
        rank=0 if latent is None else latent.rank,
        nope=0 if latent is None else latent.nope,
        rope=0 if latent is None else latent.rope,
        value=dimensions.head if latent is None else latent.value,
        first_moe=first,
        dense=_rows(inventory, Role.MLP_UP, 0),
        expert=_rows(inventory, Role.EXPERT_UP, first),
        shared=_rows(inventory, Role.SHARED_UP, first),
        groups=router.groups,
        groups_used=router.groups_used,
        has_bias=router.selection_bias,
        has_norm=router.normalizes,
        has_late_softmax=router.scoring == Scoring.SOFTMAX_OF_CHOSEN,
        has_scale=router.scale not in (0, 1),
    )


def _rows(inventory: Inventory, role: Role, layer: int) -> int:
    """Rows of the matrices of a role in a layer; 0 if it has none."""
    matrices = inventory.of_role(role, layer)
    return matrices[0].shape[0] if matrices else 0


# -- the graph, line by line: llama-graph.cpp and, in models/, deepseek2.cpp, qwen3moe.cpp,
# llama.cpp and openai-moe.cpp; without what always takes the memory of its operand (biases), or
# hands on to the next what it takes (norms of heads)


@dataclass(frozen=True, slots=True)
class _Inputs:
    mask: Tensor
    positions: Tensor
    cells: tuple[Tensor, ...]
    k_rotation: Tensor | None
    v_rotation: Tensor | None


@lru_cache(maxsize=256)
def _compute_bytes(
    kind: ComputeGraph,
    d: _Dims,
    kv: tuple[str, str],
    cells: tuple[int, int],
    sequences: int,
    tokens: int,
    outputs: int,
    n_experts: int,
    used: int,
) -> int:
    graph, attend = Graph(), _ATTENTION[kind]
    x = _embedding(graph, d.hidden, tokens)
    whole, slid = (_inputs(graph, d, kv, n, sequences, tokens) for n in cells)
    slid = replace(slid, positions=whole.positions)
    chosen = graph.input(outputs)
    for layer in range(d.n_layers):
        before = x
        inputs = slid if d.slides(layer) else whole
        x = attend(graph, graph.norm(x), d, inputs, tokens, sequences)
        if layer == d.n_layers - 1:  # only what is asked for goes on
            x, before = (graph.op((d.hidden, outputs), t, chosen) for t in (x, before))
        residual = graph.add(x, before)
        x = graph.norm(residual)
        if layer < d.first_moe:
            x = _mlp(graph, x, d.hidden, d.dense)
        else:
            x = _experts(graph, x, d, n_experts, used)
        x = graph.add(x, residual)
    graph.expand(graph.op((d.vocab, outputs), graph.norm(x)))
    return graph.nbytes()


def _embedding(graph: Graph, hidden: int, tokens: int) -> Tensor:
    """Rows of the embedding; the other two ways in (vectors, and a mix) are reserved beside it."""
    shape = (hidden, tokens)
    embedded = graph.op(shape, graph.input(tokens))
    rows = graph.op(shape, graph.input(tokens))
    mixed = graph.op(shape, graph.input(*shape))
    slots = graph.input(tokens, width=8)
    graph.expand(embedded, rows.sources[0], graph.input(*shape))
    graph.expand(graph.store(rows, slots, into=mixed))
    return embedded


def _inputs(
    graph: Graph, d: _Dims, kv: tuple[str, str], cells: int, sequences: int, tokens: int
) -> _Inputs:
    def square(size: int) -> Tensor | None:
        return graph.input(size, size) if size and not d.rank else None

    return _Inputs(
        mask=graph.input(cells, tokens // sequences, 1, sequences, width=2),
        positions=graph.input(tokens),
        cells=tuple(graph.input(tokens, width=8) for _ in ("k",) + ("v",) * (not d.rank)),
        k_rotation=square(rotation(kv[0], d.head, values=False)),
        v_rotation=square(rotation(kv[1], d.head, values=True)),
    )


def _grouped_attention(
    graph: Graph, x: Tensor, d: _Dims, inputs: _Inputs, tokens: int, sequences: int
) -> Tensor:
    def project(heads: int) -> Tensor:
        flat = graph.op((heads * d.head, tokens), x)
        return graph.view(flat, d.head, heads, tokens)

    def rotated(by: Tensor | None, x: Tensor, *shape: int) -> Tensor:
        if by is None:
            return x
        size = by.shape[0]
        rows = graph.view(x, size, d.head // size * heads_of(shape) * tokens)
        return graph.view(graph.op(rows.shape, by, rows), *shape)

    def heads_of(shape: tuple[int, ...]) -> int:
        return shape[1] if len(shape) == 3 else shape[0] // d.head

    def placed(x: Tensor) -> Tensor:
        return graph.op(x.shape, x, inputs.positions, in_place=True)

    q_shape, kv_shape = (d.head, d.heads, tokens), (d.head, d.kv_heads, tokens)
    q = rotated(inputs.k_rotation, placed(project(d.heads)), *q_shape)
    k = rotated(inputs.k_rotation, placed(project(d.kv_heads)), *kv_shape)
    v = rotated(inputs.v_rotation, project(d.kv_heads), *kv_shape)
    graph.expand(*((q, k, v) if d.window else (q, v, k)))
    for tensor, at in zip((k, v), inputs.cells, strict=True):
        graph.expand(graph.store(graph.view(tensor, d.head * d.kv_heads, tokens), at))
    attended = _attend(graph, q, d.head, d, inputs, tokens, sequences)
    flat = graph.view(attended, d.head * d.heads, tokens)
    graph.expand(flat)
    flat = rotated(inputs.v_rotation, flat, *flat.shape)
    return graph.op((d.hidden, tokens), flat)


def _latent_attention(
    graph: Graph, x: Tensor, d: _Dims, inputs: _Inputs, tokens: int, sequences: int
) -> Tensor:
    wide = d.nope + d.rope
    q = graph.norm(graph.op((d.q_rank, tokens), x)) if d.q_rank else x
    q = graph.view(graph.op((d.heads * wide, tokens), q), wide, d.heads, tokens)
    both = graph.op((d.rank + d.rope, tokens), x)
    k_rope = graph.view(both, d.rope, 1, tokens)
    k_rope = graph.op(k_rope.shape, k_rope, inputs.positions, in_place=True)
    latent = graph.norm(graph.view(both, d.rank, tokens))
    q_rope = graph.view(q, d.rope, d.heads, tokens)
    q_rope = graph.op(q_rope.shape, q_rope, inputs.positions, in_place=True)
    q_nope = graph.view(graph.view(q, d.nope, d.heads, tokens), d.nope, tokens, d.heads)
    absorbed = graph.op((d.rank, tokens, d.heads), q_nope)
    absorbed = graph.view(absorbed, d.rank, d.heads, tokens)
    q = graph.op((d.rank + d.rope, d.heads, tokens), absorbed, q_rope)
    latent = graph.view(latent, d.rank, 1, tokens)
    k = graph.op((d.rank + d.rope, 1, tokens), latent, k_rope)
    graph.expand(q, latent, k)
    graph.expand(graph.store(graph.view(k, d.rank + d.rope, tokens), inputs.cells[0]))
    attended = _attend(graph, q, d.rank, d, inputs, tokens, sequences)
    wide_again = graph.op((d.value, tokens, d.heads), graph.view(attended, d.rank, tokens, d.heads))
    turned = graph.view(wide_again, d.value, d.heads, tokens)
    flat = graph.view(graph.op(turned.shape, turned), d.value * d.heads, tokens)
    graph.expand(flat)
    return graph.op((d.hidden, tokens), flat)


_ATTENTION = {
    ComputeGraph.GROUPED: _grouped_attention,
    ComputeGraph.LATENT: _latent_attention,
}


def _attend(
    graph: Graph, q: Tensor, width: int, d: _Dims, inputs: _Inputs, tokens: int, sequences: int
) -> Tensor:
    """Flash attention; keys and values are views of the cache."""
    split = graph.view(q, q.shape[0], d.heads, tokens // sequences, sequences)
    turned = graph.view(split, q.shape[0], tokens // sequences, d.heads, sequences)
    shape = (width, d.heads, tokens // sequences, sequences)
    return graph.op(shape, turned, inputs.mask)


def _mlp(graph: Graph, x: Tensor, hidden: int, inner: int) -> Tensor:
    up, gate = (graph.op((inner, x.shape[1]), x) for _ in range(2))
    return graph.op((hidden, x.shape[1]), graph.op(gate.shape, gate, up))


def _experts(graph: Graph, x: Tensor, d: _Dims, n_experts: int, used: int) -> Tensor:
    tokens = x.shape[1]
    probs = graph.add(graph.op((n_experts, tokens), x))
    selection = graph.add(probs) if d.has_bias else probs
    if d.groups > 1:
        selection = _best_groups(graph, selection, d, n_experts)
    chosen = graph.view(graph.op((n_experts, tokens), selection), used, tokens)
    weights = _gates(graph, graph.view(probs, 1, n_experts, tokens), chosen, d)
    graph.expand(weights)
    each = graph.view(x, d.hidden, 1, tokens)
    up, gate = (graph.op((d.expert, used, tokens), each, chosen) for _ in range(2))
    inner = graph.op(gate.shape, gate, up)
    out = graph.add(graph.op((d.hidden, used, tokens), inner, chosen), weights)
    graph.expand(out)
    parts = [graph.view(out, d.hidden, tokens) for _ in range(used)]
    graph.expand(*parts)
    total = parts[0]
    for part in parts[1:]:
        total = graph.add(total, part)
        graph.expand(total)
    if used == 1:
        total = graph.op(total.shape, total)
    return graph.add(total, _mlp(graph, x, d.hidden, d.shared)) if d.shared else total


def _gates(graph: Graph, probs: Tensor, chosen: Tensor, d: _Dims) -> Tensor:
    """What the outputs of the chosen experts are multiplied by."""
    used, tokens = chosen.shape
    weights = graph.op((1, used, tokens), probs, chosen)
    if d.has_late_softmax:
        weights = graph.view(graph.add(graph.view(weights, used, tokens)), 1, used, tokens)
    elif d.has_norm:
        weights = graph.view(weights, used, tokens)
        total = graph.add(graph.op((1, tokens), weights))
        weights = graph.view(graph.add(weights, total), 1, used, tokens)
    return graph.add(weights) if d.has_scale else weights


def _best_groups(graph: Graph, selection: Tensor, d: _Dims, n_experts: int) -> Tensor:
    """Selection probabilities, those of all but the best groups masked."""
    tokens, size = selection.shape[1], n_experts // d.groups
    grouped = graph.view(selection, size, d.groups, tokens)
    best = graph.view(graph.op(grouped.shape, grouped), 2, d.groups, tokens)
    rows = graph.view(grouped, 1, size, d.groups, tokens)
    scores = graph.op((1, 2, d.groups, tokens), rows, best)
    scores = graph.op((1, d.groups, tokens), graph.view(scores, 2, d.groups, tokens))
    scores = graph.view(scores, d.groups, tokens)
    groups = graph.view(graph.op(scores.shape, scores), d.groups_used, tokens)
    kept = graph.op((size, d.groups_used, tokens), grouped, groups)
    masked = graph.op(grouped.shape, grouped, in_place=True)
    masked = graph.store(kept, groups, into=masked)
    return graph.view(masked, n_experts, tokens)
