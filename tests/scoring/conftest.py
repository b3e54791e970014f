"""Small random layouts and documents, for what is streamed."""

import pytest

from allocator.checkpoint.inventory import read_inventory
from allocator.targets import target_named


@pytest.fixture(
    params=[
        ("deepseek", "gguf"),
        ("deepseek", "safetensors"),
        ("qwen3_tied", "gguf"),
        ("qwen3", "safetensors"),
    ],
    ids="-".join,
)
def layout(request, checkpoints):
    kind, target = request.param
    return target_named(target).layout(read_inventory(checkpoints[kind]))


@pytest.fixture
def documents(make_documents):
    return make_documents((17, 17, 9, 9, 17, 21))
