"""Allocations of random checkpoints, written as both containers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from allocator.checkpoint.reading import read_inventory
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.export.checkpoint import materialize
from allocator.export.tensors import EncodedTensors
from allocator.scoring.scorer import Scorer
from allocator.scoring.swap_model import SwapModel
from allocator.targets import TARGETS

torch.set_num_threads(1)
FAST = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q5_0", "IQ4_NL", "Q4_0")  # to encode
CASES = [("deepseek", "gguf"), ("deepseek", "safetensors"), ("qwen3", "gguf"),
         ("qwen3", "safetensors")]  # fmt: skip
WRITTEN = [
    (*case, container)
    for case in CASES
    for container in (("gguf", "safetensors") if case[1] == "gguf" else ("safetensors",))
]


def in_parts(rng, group, retained, formats):
    """The experts of a group dealt out at random over two formats (one, if there is no other)."""
    names = [f.name for f in group.offered() if f.name in formats]
    picks = sorted(rng.choice(len(names), min(2, len(names)), replace=False))
    experts = list(retained[group.layer])
    if len(picks) < 2:
        return names[picks[0]]
    head = set(rng.choice(experts, rng.integers(1, len(experts)), replace=False).tolist())
    parts = [sorted(head), [e for e in experts if e not in head]]
    return "+".join(
        f"{names[i]}:{','.join(map(str, part))}" for i, part in zip(picks, parts, strict=True)
    )


@pytest.fixture(scope="session")
def wide(tmp_path_factory, make_checkpoint):
    """Checkpoints by name, with rows of whole 256-blocks."""
    folder = tmp_path_factory.mktemp("wide")
    return {
        "deepseek": make_checkpoint(
            folder / "deepseek", "deepseek", hidden_size=256, moe_intermediate_size=256
        ),
        "qwen3": make_checkpoint(folder / "qwen3", "qwen3", hidden_size=256, dtype="bfloat16"),
    }


@pytest.fixture(scope="session")
def case(wide, tmp_path_factory, make_documents):
    """`case(name, target)`: bank, layout, scorer, `allocation(seed)`, `write(folder, ...)`."""
    made, encodings_folder = {}, tmp_path_factory.mktemp("bank")

    def get(name, target):
        if (name, target) in made:
            return made[name, target]
        layout = TARGETS[target].layout(read_inventory(wide[name]))
        encodings = Encodings(encodings_folder, layout, {})

        def allocation(seed=0, formats=None):
            rng = np.random.default_rng(seed)
            one = TARGETS[target].one_expert_count
            counts = {x: 6 if one else 5 + i for i, x in enumerate(layout.layers)}
            chosen = {
                g: str(rng.choice([
                    f.name for f in group.offered()
                    if f.name in (formats or FAST)
                ]))
                for g, group in layout.groups.items()
            }  # fmt: skip
            retained = {
                x: tuple(sorted(rng.choice(8, n, replace=False).tolist()))
                for x, n in counts.items()
            }
            if TARGETS[target].mixes_experts:
                for g in (n for n in layout.groups if n.endswith(("experts.down", "experts.up"))):
                    chosen[g] = in_parts(rng, layout.groups[g], retained, formats or FAST)
            return Allocation.of(target=target, retained=retained, formats=chosen, experts_used=2)

        def write(folder, container, chosen=None, source=EncodedTensors, **options):
            made_of = source(encodings, chosen or allocation())
            return materialize(made_of, folder, container=container, importance="i" * 64, **options)

        scorer = Scorer(SwapModel(layout, encodings.decoded), make_documents([32] * 3, seed=1))
        made[name, target] = SimpleNamespace(
            path=wide[name], layout=layout, encodings=encodings, scorer=scorer,
            allocation=allocation, write=write, encodings_folder=encodings_folder,
        )  # fmt: skip
        return made[name, target]

    return get


@pytest.fixture(scope="session")
def written(case, tmp_path_factory):
    """`written(name, target, container)`: a directory, read only."""
    made = {}

    def get(name, target, container):
        key = name, target, container
        if key not in made:
            folder = tmp_path_factory.mktemp("written") / "-".join(key)
            made[key] = case(name, target).write(folder, container)
        return made[key]

    return get


def pytest_generate_tests(metafunc):
    """`which`: name, target and container of everything that can be written."""
    if "which" in metafunc.fixturenames:
        metafunc.parametrize("which", WRITTEN, ids="-".join)
