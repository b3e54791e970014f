"""What choosing codes anew leaves of each group's loss: a factor per group, from a few rows.

In: a finisher, its allocation's weights, documents. Out: by group, the quadratic after over before,
on documents that the codes were not chosen on. Invariant: a factor is in 0..1, and the same inputs
give the same factors, which are cached on disk.

The factor differs by group (.3 to .9 on the reference model) and hardly by format, so one format
stands for all, the one that the allocation stores, and a few experts and rows for the group. Second
moments come from every other document, and the quadratics from the others: codes that are judged by
the moments that they were chosen by look better than they are, the more so the fewer tokens reach a
matrix.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import torch

from allocator.checkpoint.tensors import Floats, read_tensor
from allocator.codecs import Bytes, codec_of
from allocator.codecs.blocks import BlockFormat
from allocator.codecs.encodings import Encodings
from allocator.errors import StudyError
from allocator.files.checksums import read_checked, write_checked
from allocator.files.progress import step
from allocator.finishing.codes import choose, quadratic
from allocator.finishing.finish import Finisher, first_tokens, original_with
from allocator.finishing.recipe import inputs_digest
from allocator.formats import Format
from allocator.profiling.second_moments import Smoothing, second_moments
from allocator.scoring.documents import Document
from allocator.scoring.swap_model import SwapModel
from allocator.targets import Group
from allocator.targets.group_weights import group_weights

N_EXPERTS = 2
"""Experts, or heads, of a group that are looked at."""
N_ROWS = 128
"""Rows of each that are looked at."""


class _Factors(msgspec.Struct, forbid_unknown_fields=True):
    """`factors-*.json`."""

    factors: dict[str, float]


def measured_factors(finisher: Finisher, encodings: Encodings) -> dict[str, float]:
    """Measures the factors of an allocation's groups, or reads them from the finisher's folder.

    Args:
        finisher: of the allocation; nothing of it is finished.
        encodings: that the allocation is encoded with.

    Returns:
        By group; groups that are offered no format whose codes can be chosen are absent.

    Raises:
        StudyError: if the model is streamed.
    """
    sample = f"{N_EXPERTS} experts, {N_ROWS} rows"
    recipe = finisher.recipe.codes_alone
    inputs = inputs_digest(recipe, inputs=finisher.inputs(recipe), factors=sample)
    path = finisher.folder / f"factors-{inputs[:32]}.json"
    known = read_checked(path, _Factors, inputs)
    if known is None:
        known = _Factors(dict(_measure(finisher, encodings)))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checked(path, known, inputs)
    return known.factors


def _measure(finisher: Finisher, encodings: Encodings) -> Iterator[tuple[str, float]]:
    model, layout, recipe = finisher.model, finisher.plain.layout, finisher.recipe
    if not isinstance(model, SwapModel):
        raise StudyError("--resolve needs the model in memory; leave [streamed] out of study.toml")
    formats = {
        name: fmt for name, group in layout.groups.items()
        if (fmt := _format(finisher, group)) is not None
    }  # fmt: skip
    documents = first_tokens(finisher.documents.search, recipe.moments_tokens)
    model.put(original_with(finisher.plain.allocation, layout))
    groups = [layout.groups[name] for name in formats]

    def moments(chosen: Sequence[Document], damping: float) -> Iterator[tuple[Group, torch.Tensor]]:
        return second_moments(
            model, chosen, groups, fisher=recipe.fisher, seed=recipe.seed, memory_bytes=1 << 30,
            smoothing=Smoothing(recipe.shrink_tokens, damping),
            threads=finisher.threads, progress=finisher.progress,
        )  # fmt: skip

    chosen_by = moments(documents[::2], recipe.damping)
    judged_by = moments(documents[1::2] or documents, 0.0)
    with step("factors", len(groups), unit="matrices", shown=finisher.progress) as shown:
        for (group, given), (_, other) in zip(chosen_by, judged_by, strict=True):
            yield group.name, _factor(finisher, encodings, formats[group.name], group, given, other)
            shown.update()


def _format(finisher: Finisher, group: Group) -> Format | None:
    """The format of the group's first part, or of those whose codes can be chosen the nearest."""
    allocation, layout = finisher.plain.allocation, finisher.plain.layout
    stored = allocation.parts(layout, group.name)[0][0]
    able = [f for f in (stored, *group.offered()) if _block_format(f) is not None]
    return min(able, key=lambda f: abs(f.bits - stored.bits), default=None)


def _block_format(fmt: Format) -> BlockFormat | None:
    return codec_of(fmt).block_format(fmt)


def _factor(
    finisher: Finisher,
    encodings: Encodings,
    fmt: Format,
    group: Group,
    given: torch.Tensor,
    other: torch.Tensor,
) -> float:
    """The quadratic after over before, of some rows.

    Args:
        finisher: of the allocation.
        encodings: that the weights before are of.
        fmt: that the rows are encoded in.
        group: of the rows.
        given: moments that the codes are chosen by, of retained experts or heads, or `(in, in)`.
        other: moments that the codes are judged by.
    """
    weights, data, places = _sample(finisher, encodings, fmt, group)
    block_format = _block_format(fmt)
    assert block_format is not None
    apart = given.ndim == 3
    given, other = (m[places] if apart else m[None] for m in (given, other))
    rows, encoded = (torch.from_numpy(x).to(given.device) for x in (weights, data))
    with torch.inference_mode():
        chosen = choose(rows, encoded, block_format, given, rounds=finisher.recipe.rounds)
        before, after = (
            float(quadratic(rows, block_format.values(x), other).double().sum())
            for x in (encoded, chosen.data)
        )
    return min(max(after / before, 0.0), 1.0) if before > 0 else 1.0


def _sample(
    finisher: Finisher, encodings: Encodings, fmt: Format, group: Group
) -> tuple[Floats, Bytes, list[int]]:
    """Some rows of some experts or heads.

    Returns:
        Weights `n x rows x in`, their bytes, and places of the experts among the retained ones, or
        of the heads.
    """
    inventory, layout = finisher.plain.layout.inventory, finisher.plain.layout
    encodings.release()
    if group.role.is_expert:
        retained = group.experts(finisher.plain.allocation.retained_experts)
        places = _spread(len(retained), N_EXPERTS)
        experts = [retained[i] for i in places]
        weights = np.stack([read_tensor(inventory, group.sources[e]) for e in experts])
        data = encodings.encoded(group.name, fmt.name, experts)
    else:
        weights, data = group_weights(layout, group), encodings.encoded(group.name, fmt.name)
        if weights.ndim == 2:
            weights, data = weights[None], data[None]
        places = _spread(len(weights), N_EXPERTS)
        weights, data = weights[places], data[places]
    rows = _spread(weights.shape[1], N_ROWS)
    return np.ascontiguousarray(weights[:, rows]), np.ascontiguousarray(data[:, rows]), places


def _spread(n: int, most: int) -> list[int]:
    """At most so many of `n` places, evenly spread, each in the middle of its share."""
    k = min(n, most)
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]
