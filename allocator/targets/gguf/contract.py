"""Target `gguf`: stock llama.cpp.

Its contract (read in llama.cpp's loader, checked by running it): one expert count and one experts
used for the whole model; one ggml type per stacked expert tensor; routers, norms and biases in F32;
multi-head latent attention stores `k_b` (transposed: rows of `qk_nope_head_dim`) and `v_b` (rows of
`kv_lora_rank`) in place of `kv_b`; tensor data contiguous, each padded to 32 bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from allocator.checkpoint.inventory import Inventory, TensorInfo
from allocator.errors import CheckpointError, TargetError
from allocator.families import Config, Dimensions, Family, Half, Piece, Role
from allocator.formats.ggml import CODEC
from allocator.targets.base import Target
from allocator.targets.device_memory import DeviceMemory, RuntimeSettings, Workload
from allocator.targets.gguf.memory import (
    cache_rows,
    compute_bytes,
    kv_cache_bytes,
    kv_parts,
    kv_read_bytes,
    output_bytes,
    overhead_bytes,
)
from allocator.targets.gguf.metadata import (
    hyperparameters,
    metadata,
    metadata_bytes,
)
from allocator.targets.gguf.tokenizer import check_tokenizer
from allocator.targets.layout import (
    CacheRows,
    FullPrecision,
    Group,
    Layout,
    in_file_order,
    plain_groups,
    source_format,
    width_notes,
)

_MOST_AT_ONCE = 1 << 20  # tokens of a micro-batch: beyond any buffer
_HEADER = 4 + 4 + 8 + 8  # magic, version, number of tensors, number of metadata pairs


class GgufTarget(Target):
    """See the module."""

    name = "gguf"
    one_expert_count = True
    mixes_experts = False
    alignment = 32
    stores_tokenizer = True
    predicts_memory = True
    codecs = (CODEC,)

    def layout(self, inventory: Inventory) -> Layout:
        """Returns groups under llama.cpp's names, `kv_b` split.

        Raises:
            CheckpointError: if `config.json` lacks or contradicts what the file must say.
            TargetError: if stock llama.cpp would not load the model, or not compute it rightly.
        """
        _check(inventory)
        family, gguf = inventory.family, inventory.family.for_gguf()
        names = {
            t.name: family.gguf_name(t.role, t.layer)
            for t in inventory.tensors.values()
            if t.role.is_encoded
        }
        groups = plain_groups(
            inventory, names, skip={part.of for part in gguf.parts}, codecs=self.codecs
        )
        for half in gguf.halves:
            groups += _halves(inventory, half)
        for piece in gguf.pieces:
            groups += _pieces(inventory, piece)
        groups = [self.arranged(group, family, inventory.dimensions) for group in groups]
        groups = [
            g
            if g.columns is None
            else replace(g, source_format=source_format(inventory.tensors[g.sources[0]], g.columns))
            for g in groups
        ]
        full_precision = tuple(
            _full_precision(inventory, t)
            for t in inventory.tensors.values()
            if not t.role.is_encoded and t.role is not Role.NEXTN
        )
        notes = (
            *inventory.notes,
            *gguf.notes(family.text_config(inventory.config)),
            *width_notes(inventory, groups),
        )
        computed = self.computed(family, inventory.config)
        groups_in_order = in_file_order(groups)
        made = gguf.made(inventory.facts)
        return Layout(self.name, inventory, groups_in_order, full_precision, notes, computed, made)

    def computed(self, family: Family, config: Config) -> Config | None:
        """Returns a config by which transformers computes as llama.cpp does; None for its own."""
        own = family.text_config(config)
        computed = family.for_gguf().computed(own)
        return None if computed is own else computed

    def arranged(self, group: Group, family: Family, dimensions: Dimensions) -> Group:
        """Returns a group with the rows and columns of its source as llama.cpp has them."""
        gguf = family.for_gguf()
        rows = next((piece.rows for piece in gguf.pieces if piece.role is group.role), None)
        columns = gguf.column_orders.get(group.role)
        if rows is not None:
            group = replace(group, rows=rows(dimensions))
        order = None if columns is None else columns(dimensions)
        if order is None or order == tuple(range(len(order))):
            return group
        return replace(group, columns=order)

    def header_bytes(
        self,
        layout: Layout,
        *,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
    ) -> int:
        """Returns the bytes of header, metadata and tensor table, padded, and of made tensors.

        Formats do not matter.
        """
        n_experts = max(map(len, retained.values()))
        fields = metadata(layout.inventory, n_experts=n_experts, experts_used=experts_used)
        rows = [(g.stored_as, len(g.shape)) for g in layout.groups.values()]
        rows += [(k.stored_as, len(k.shape_in_file or k.shape)) for k in layout.full_precision]
        rows += [(made.name, 1) for made in layout.made]
        # a table row: name with its length, number of dimensions, dimensions, type, offset
        table = sum(8 + len(name.encode()) + 4 + 8 * n_dims + 4 + 8 for name, n_dims in rows)
        made = sum(self.padded(4 * len(tensor.values)) for tensor in layout.made)
        return self.padded(_HEADER + metadata_bytes(fields) + table) + made

    def check_tokenizer(self, inventory: Inventory) -> None:
        """Checks that llama.cpp can read text as the checkpoint's tokenizer does.

        Raises:
            CheckpointError: if the checkpoint has no tokenizer, or one that contradicts it.
            TargetError: if llama.cpp cannot express it.
        """
        check_tokenizer(inventory)

    def check_kv_format(self, inventory: Inventory, kv_format: str) -> None:
        """Checks how keys and values are stored.

        Raises:
            TargetError: if llama.cpp has no such format, or its blocks do not fit the rows.
        """
        if set(kv_parts(kv_format)) != {"f16"}:  # which fits any row
            kv_read_bytes(inventory, kv_format=kv_format, context=1)

    def cache_rows(self, kv_format: str, head_size: int) -> tuple[CacheRows, CacheRows]:
        """Returns how llama.cpp's cache stores keys, and how values."""
        keys, values = kv_parts(kv_format)
        return (
            cache_rows(keys, head_size, values=False),
            cache_rows(values, head_size, values=True),
        )

    def check_micro_batch(self, micro_batch: int) -> None:
        """Checks the tokens computed at once.

        Raises:
            TargetError: if it is no positive number.
        """
        if not 1 <= micro_batch <= _MOST_AT_ONCE:
            raise TargetError(f"gguf: micro_batch {micro_batch}, needed 1 to {_MOST_AT_ONCE}")

    def kv_bytes(self, inventory: Inventory, kv_format: str, context: int) -> int:
        """Returns the bytes of keys and values that decoding a token reads."""
        return kv_read_bytes(inventory, kv_format=kv_format, context=context)

    def device_memory(
        self,
        inventory: Inventory,
        workload: Workload,
        settings: RuntimeSettings,
        *,
        weights: int,
        n_experts: int,
    ) -> DeviceMemory:
        """Returns what llama.cpp occupies, as it reports when it loads the file."""
        tokens = {
            "context": workload.context,
            "sequences": workload.sequences,
            "micro_batch": settings.micro_batch,
        }
        experts = {"n_experts": n_experts, "experts_used": settings.experts_used}
        compute = compute_bytes(inventory, kv_format=settings.kv_format, **tokens, **experts)
        return DeviceMemory(
            weights=weights,
            kv_cache=kv_cache_bytes(inventory, kv_format=settings.kv_format, **tokens),
            compute=compute + output_bytes(inventory, outputs=workload.sequences),
            overhead=overhead_bytes(inventory, **tokens, **experts),
            reserve=workload.reserve,
        )


def _check(inventory: Inventory) -> None:
    gguf = inventory.family.for_gguf()
    if gguf.hyperparameters is None:  # planned: no file is written
        return
    gguf.check(inventory.facts)
    hyperparameters(inventory, n_experts=inventory.n_experts, experts_used=inventory.experts_used)


def _halves(inventory: Inventory, half: Half) -> Iterator[Group]:
    """Groups of one half of latent attention's `kv_b`, layer by layer."""
    dimensions = inventory.dimensions
    latent, heads = dimensions.latent, dimensions.heads
    assert latent is not None
    shapes = {Role.K_B: (latent.rank, latent.nope), Role.V_B: (latent.value, latent.rank)}
    for layer in range(inventory.n_layers):
        for kv_b in inventory.of_role(half.of, layer):
            if kv_b.shape != (heads * (latent.nope + latent.value), latent.rank):
                raise CheckpointError(
                    f"{inventory.path}: {kv_b.name} has shape {kv_b.shape}, config.json says "
                    f"{heads} heads x ({latent.nope} + {latent.value}) by {latent.rank}; fetch "
                    "the checkpoint again"
                )
            yield Group(
                name=f"layers.{layer}.{half.role}",
                role=half.role,
                layer=layer,
                shape=(heads, *shapes[half.role]),
                sources=(kv_b.name,),
                stored_as=half.name.format(layer=layer),
                codecs=(CODEC,),
            )


def _pieces(inventory: Inventory, piece: Piece) -> Iterator[Group]:
    """Groups of some rows of a matrix, layer by layer."""
    n_rows = len(piece.rows(inventory.dimensions))
    for layer in range(inventory.n_layers):
        for whole in inventory.of_role(piece.of, layer):
            yield Group(
                name=f"layers.{layer}.{piece.role}",
                role=piece.role,
                layer=layer,
                shape=(n_rows, whole.shape[-1]),
                sources=(whole.name,),
                stored_as=piece.name.format(layer=layer),
                codecs=(CODEC,),
            )


def _full_precision(inventory: Inventory, tensor: TensorInfo) -> FullPrecision:
    match = inventory.family.match(tensor.name)
    assert match is not None
    rule = match[0]
    assert rule.gguf is not None
    return FullPrecision(
        tensor.name, rule.gguf.format(layer=tensor.layer), tensor.role, tensor.layer,
        tensor.shape, "F32", rule.in_gguf, inventory.family.gguf_shape(inventory.config, rule),
    )  # fmt: skip


GGUF = GgufTarget()
