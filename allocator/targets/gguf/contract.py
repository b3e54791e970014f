"""Target `gguf`: stock llama.cpp.

Its contract (read in llama.cpp's loader, checked by running it): one expert count and one experts
used for the whole model; one ggml type per stacked expert tensor; routers, norms and biases in F32;
multi-head latent attention stores `k_b` (transposed: rows of `qk_nope_head_dim`) and `v_b` (rows of
`kv_lora_rank`) in place of `kv_b`; tensor data contiguous, each padded to 32 bytes.
"""

from collections.abc import Mapping

from allocator.checkpoint.inventory import Inventory, TensorInfo
from allocator.errors import CheckpointError, TargetError
from allocator.families import FAMILIES, Role
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
    yarn_betas,
)
from allocator.targets.gguf.tokenizer import check_tokenizer
from allocator.targets.layout import (
    CacheRows,
    FullPrecision,
    Group,
    Layout,
    in_file_order,
    plain_groups,
)

_MOST_AT_ONCE = 1 << 20  # tokens of a micro-batch: beyond any buffer
_HEADER = 4 + 4 + 8 + 8  # magic, version, number of tensors, number of metadata pairs
_WITHOUT_Q_LORA = {26: None, 27: None, 48: 128_256}
"""Layers, and rows of the embedding, by which llama.cpp tells deepseek2 models without q_lora_rank
apart from the others; None: any."""


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
        family = inventory.family
        names = {
            t.name: family.gguf_name(t.role, t.layer)
            for t in inventory.tensors.values()
            if t.role.is_encoded
        }
        groups = plain_groups(inventory, names, skip=(Role.KV_B,), codecs=self.codecs)
        for layer in range(inventory.n_layers):
            for tensor in inventory.of_role(Role.KV_B, layer):
                groups += _halves(inventory, tensor, layer)
        kept = tuple(
            FullPrecision(t.name, _kept_name(inventory, t), t.role, t.layer, t.shape, "F32")
            for t in inventory.tensors.values()
            if not t.role.is_encoded and t.role is not Role.NEXTN
        )
        notes = (*inventory.notes, *_told(inventory))
        return Layout(self.name, inventory, in_file_order(groups), kept, notes)

    def header_bytes(
        self,
        layout: Layout,
        *,
        retained: Mapping[int, tuple[int, ...]],
        formats: Mapping[str, str],
        experts_used: int,
    ) -> int:
        """Returns the bytes of header, metadata and tensor table, padded; formats do not matter."""
        n_experts = max(map(len, retained.values()))
        fields = metadata(layout.inventory, n_experts=n_experts, experts_used=experts_used)
        rows = [(g.stored_as, len(g.shape)) for g in layout.groups.values()]
        rows += [(k.stored_as, len(k.shape)) for k in layout.full_precision]
        # a table row: name with its length, number of dimensions, dimensions, type, offset
        table = sum(8 + len(name.encode()) + 4 + 8 * n_dims + 4 + 8 for name, n_dims in rows)
        return self.padded(_HEADER + metadata_bytes(fields) + table)

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
        held = {
            "context": workload.context,
            "sequences": workload.sequences,
            "micro_batch": settings.micro_batch,
        }
        told = {"n_experts": n_experts, "experts_used": settings.experts_used}
        compute = compute_bytes(inventory, kv_format=settings.kv_format, **held, **told)
        return DeviceMemory(
            weights=weights,
            kv_cache=kv_cache_bytes(inventory, kv_format=settings.kv_format, **held),
            compute=compute + output_bytes(inventory, outputs=workload.sequences),
            overhead=overhead_bytes(inventory, **held, **told),
            reserve=workload.reserve,
        )


def _check(inventory: Inventory) -> None:
    if inventory.family.model_type not in FAMILIES:  # planned: no file is written
        return
    config, vocab = inventory.config, inventory.of_role(Role.EMBEDDING)[0].shape[0]
    if (
        inventory.family.model_type == "deepseek_v3"
        and config.get("q_lora_rank") is None
        and _WITHOUT_Q_LORA.get(inventory.n_layers, 0) not in (None, vocab)
    ):
        raise TargetError(
            "gguf: llama.cpp loads a deepseek2 model without q_lora_rank only with 26 or 27 "
            f"layers, or with 48 and 128,256 tokens; got {inventory.n_layers} layers and "
            f"{vocab:,} tokens; use target safetensors"
        )
    if inventory.family.model_type == "deepseek_v3" and not config.get("rope_interleave", True):
        raise TargetError(
            "gguf: llama.cpp rotates interleaved pairs in deepseek2, config.json says "
            "rope_interleave = false; use target safetensors"
        )
    hyperparameters(inventory, n_experts=inventory.n_experts, experts_used=inventory.experts_used)


def _told(inventory: Inventory) -> tuple[str, ...]:
    """A line on what no file can tell llama.cpp."""
    if inventory.family.model_type not in FAMILIES or (betas := yarn_betas(inventory)) is None:
        return ()
    return (
        f"llama.cpp must be told {yarn_options(betas)}: its loader of "
        f"{inventory.family.gguf_architecture} does not read YaRN's betas from the file, and would "
        "compute with 32 and 1",
    )


def yarn_options(betas: tuple[float, float]) -> str:
    """Writes the options that tell llama.cpp's programs of YaRN's `(fast, slow)` betas."""
    fast, slow = betas
    return f"--yarn-beta-fast {fast:g} --yarn-beta-slow {slow:g}"


def _halves(inventory: Inventory, kv_b: TensorInfo, layer: int) -> list[Group]:
    config = inventory.config
    heads, rank = int(config["num_attention_heads"]), int(config["kv_lora_rank"])
    nope, value = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
    if kv_b.shape != (heads * (nope + value), rank):
        raise CheckpointError(
            f"{inventory.path}: {kv_b.name} has shape {kv_b.shape}, config.json says "
            f"{heads} heads x ({nope} + {value}) by {rank}; fetch the checkpoint again"
        )
    return [
        Group(
            name=f"layers.{layer}.{role}",
            role=role,
            layer=layer,
            shape=shape,
            sources=(kv_b.name,),
            stored_as=inventory.family.gguf_name(role, layer),
            codecs=(CODEC,),
        )
        for role, shape in ((Role.K_B, (heads, rank, nope)), (Role.V_B, (heads, value, rank)))
    ]


def _kept_name(inventory: Inventory, tensor: TensorInfo) -> str:
    found = inventory.family.match(tensor.name)
    assert found is not None
    return found[0].gguf.format(layer=tensor.layer)


GGUF = GgufTarget()
