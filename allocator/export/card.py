"""`README.md` of a written directory: a model card as the Hugging Face hub reads it.

In: the record of an allocation, and where its weights came from. Out: Markdown with a YAML head.
Invariant: every figure is the record's or a count of bytes; a name from elsewhere is escaped;
nothing tells where on this machine a file lay.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from msgspec import UnsetType

from allocator.checkpoint.inventory import Inventory
from allocator.decision.allocation import Allocation
from allocator.decision.allocation_record import AllocationRecord
from allocator.export.base import Runtime
from allocator.export.manifest import Manifest
from allocator.families.config import hub_id
from allocator.targets import Group, Layout
from allocator.targets.gguf.general import general_name
from allocator.units import show_bytes

CARD = "README.md"
"""Its owner may edit it, so `manifest.json` has no digest of it."""
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_LONGEST = 200  # characters of a name
_SPLITS = {
    "search": "documents that the search compared trials on",
    "selection": "documents that picked one trial of the front",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells beside its record.

    Attributes:
        runtime: that opens the directory.
        options: of the runtime's program.
        manifest: of the directory.
        unfinished: whether the record names finished weights, and these are not.
    """

    runtime: Runtime
    options: str
    manifest: Manifest
    unfinished: bool

    @property
    def shard_bytes(self) -> int | None:
        """The most bytes of tensors in a shard; None where the weights are in one file."""
        said = self.manifest.shard_bytes
        return None if isinstance(said, UnsetType) else said


def licence_files(inventory: Inventory) -> list[Path]:
    """Lists the files of a checkpoint's licence, which have to go wherever its weights go."""
    if inventory.gguf is not None or not inventory.path.is_dir():
        return []
    return sorted(
        path for pattern in _LICENCES for path in inventory.path.glob(pattern) if path.is_file()
    )


def model_card(layout: Layout, record: AllocationRecord, facts: CardFacts) -> str:
    """Writes the card.

    Args:
        layout: of the record's target.
        record: of the weights that were written.
        facts: of the written directory.
    """
    head = "".join(f"{line}\n" for line in _yaml(_head(layout.inventory, facts)))
    parts = (
        _summary(layout, record, facts),
        _measured(record),
        _use(layout.inventory, facts),
        _allocation(layout, record.decision),
        _rebuilt(record, facts),
    )
    return f"---\n{head}---\n\n" + "\n\n".join("\n".join(part) for part in parts) + "\n"


# -- the head


def _head(inventory: Inventory, facts: CardFacts) -> dict[str, str | list[str]]:
    base, library = base_model(inventory), facts.runtime.library
    return {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        **({"library_name": library} if library else {}),
        **licence(inventory),
        "pipeline_tag": "text-generation",
        "tags": ["moe-allocator", "mixture-of-experts", "quantized"],
    }


def base_model(inventory: Inventory) -> str | None:
    """Returns the hub id of a checkpoint; None where nothing says one.

    The folder of the hub's own cache says it, or `config.json`.
    """
    for name in inventory.path.parts:
        owner, _, rest = name.removeprefix("models--").partition("--")
        if name.startswith("models--") and _ID.fullmatch(f"{owner}/{rest}"):
            return f"{owner}/{rest}"
    known = hub_id(inventory.config)
    return known if known is not None and _ID.fullmatch(known) else None


def licence(inventory: Inventory) -> dict[str, str]:
    """Returns what a checkpoint says of its licence, by the keys of a card; empty if nothing.

    A directory says it in the head of its README.md, a GGUF model in its pairs.
    """
    if inventory.gguf is not None:
        pairs = inventory.gguf.values
        said: Mapping[str, Any] = {
            "license": pairs.get("general.license"),
            "license_name": pairs.get("general.license.name"),
            "license_link": pairs.get("general.license.link"),
        }
    else:
        said = _card_head(inventory.path / CARD)
    known = {key: said.get(key) for key in ("license", "license_name", "license_link")}
    return {key: _plain(value) for key, value in known.items() if isinstance(value, str) and value}


def _card_head(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}

    from huggingface_hub.repocard import metadata_load

    try:
        head = metadata_load(path)
    except Exception:  # whatever YAML, or the file's encoding, raises: then it says nothing
        return {}
    return head if isinstance(head, dict) else {}


def _yaml(head: Mapping[str, str | list[str]]) -> Iterable[str]:
    for key, value in head.items():
        if isinstance(value, str):
            yield f"{key}: {json.dumps(value, ensure_ascii=False)}"
        else:
            yield f"{key}:"
            yield from (f"- {item}" for item in value)


# -- the text


def _plain(text: str) -> str:
    """One line of what can be printed."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())[:_LONGEST]


def _escaped(text: str) -> str:
    """The same without a meaning in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", _plain(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _summary(layout: Layout, record: AllocationRecord, facts: CardFacts) -> list[str]:
    name, counts = _escaped(general_name(layout.inventory)), record.decision.counts.values()
    n = layout.inventory.n_experts
    kept = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{min(counts)}"
    limits = [
        (f"limit ({_escaped(key.replace('_', ' '))})", show_bytes(value))
        for key, value in record.bytes.items()
        if key == "budget" or key.startswith(("budget_", "device_"))
    ]
    workload = [(_escaped(key), f"{value:,}") for key, value in record.workload.items()]
    finished = (
        ""
        if record.finished is None
        else " The weights are finished: codes were chosen anew against second moments of their "
        "inputs."
    )
    size = show_bytes(facts.manifest.file_bytes).rpartition("(")[2].rstrip(")")
    return [
        f"# {name}, {size}",
        "",
        f"{name} in fewer bytes: {kept} of {n} experts per layer are retained, and every matrix "
        f"has a format of its own. Written by moe-allocator.{finished}",
        "",
        *_table(
            ("", ""),
            [
                (
                    f"`{facts.runtime.file_name}`"
                    + (" and its files" if facts.shard_bytes else ""),
                    show_bytes(facts.manifest.file_bytes),
                ),
                ("bits per weight of the original's matrices", f"{record.effective_bits:.3f}"),
                ("experts used per token", f"{record.decision.experts_used}"),
                ("keys and values", _escaped(record.decision.kv_format)),
                *limits,
                *workload,
            ],
        ),
    ]


def _measured(record: AllocationRecord) -> list[str]:
    if not record.losses:
        return ["## Measured", "", "Nothing was measured."]
    before = {} if record.finished is None else record.finished.before
    rows = [
        (
            _escaped(split),
            *((f"{before[split]:.5f}" if split in before else "",) if before else ()),
            f"{loss:.5f}",
            _SPLITS.get(split, ""),
        )
        for split, loss in record.losses.items()
    ]
    head = ("split", *(("before finishing",) if before else ()), "nats per token", "what it is")
    return [
        "## Measured",
        "",
        "KL(original || this model) on calibration text, the lower the better. No held-out text "
        "is among it: `allocator evaluate` measures that.",
        "",
        *_table(head, rows),
    ]


def _use(inventory: Inventory, facts: CardFacts) -> list[str]:
    return ["## Use", "", *facts.runtime.usage(inventory, facts.options)]


def _allocation(layout: Layout, allocation: Allocation) -> list[str]:
    by_role: dict[str, list[_Stored]] = {}
    by_layer: dict[int | None, list[_Stored]] = {}
    for name, group in layout.groups.items():
        stored = _stored(layout, allocation, name, group)
        by_role.setdefault(str(group.role), []).extend(stored)
        by_layer.setdefault(group.layer, []).extend(stored)
    return [
        "## Allocation",
        "",
        "Routers, norms and biases are in full precision. Shares are of weights.",
        "",
        *_table(
            ("role", "bits", "bytes", "formats"),
            [(_escaped(role), *_row(stored)) for role, stored in by_role.items()],
        ),
        "",
        *_table(
            ("layer", "experts", "bits", "bytes", "formats"),
            [
                (
                    "outside" if layer is None else f"{layer}",
                    f"{allocation.counts[layer]}" if layer in allocation.counts else "",
                    *_row(stored),
                )
                for layer, stored in by_layer.items()
            ],
        ),
    ]


@dataclass(frozen=True)
class _Stored:
    format: str
    weights: int
    nbytes: int


def _stored(layout: Layout, allocation: Allocation, name: str, group: Group) -> list[_Stored]:
    shapes = [
        (fmt, group.shape_with(len(experts))) for fmt, experts in allocation.parts(layout, name)
    ]
    return [_Stored(fmt.name, prod(shape), fmt.nbytes(shape)) for fmt, shape in shapes]


def _row(stored: Sequence[_Stored]) -> tuple[str, str, str]:
    weights, nbytes = sum(s.weights for s in stored), sum(s.nbytes for s in stored)
    shares: Counter[str] = Counter()
    for part in stored:
        shares[part.format] += part.weights
    formats = ", ".join(f"{name} {n / weights:.0%}" for name, n in shares.most_common())
    return (
        f"{8 * nbytes / weights:.3f}",
        f"{nbytes:,}",
        formats if len(shares) > 1 else stored[0].format,
    )


def _rebuilt(record: AllocationRecord, facts: CardFacts) -> list[str]:
    file = f"STUDY/allocations/{shlex.quote(_plain(record.name))}.json"
    command = f"allocator materialize STUDY {file} OUT"
    if facts.unfinished:
        command += " --unfinished"
    if facts.shard_bytes:
        command += f" --shard-size {facts.shard_bytes}"
    return [
        "## Built by",
        "",
        "```sh",
        f"{command} --container {facts.runtime.name}",
        "```",
        "",
        *_table(
            ("digest", "sha256"),
            [
                (
                    "the same tensors in one file"
                    if facts.shard_bytes
                    else f"`{facts.runtime.file_name}`",
                    facts.manifest.sha256_of_weights,
                ),
                ("checkpoint", _escaped(record.checkpoint)),
                ("allocation", record.digest),
                ("importance", record.importance),
                *([("finished weights", record.weights_digest)] if record.weights_digest else []),
            ],
        ),
        "",
        f"Encoded by {_escaped(record.codec)}. `manifest.json` has the sha256 of every file but "
        "this one.",
    ]
