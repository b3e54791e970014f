"""Architectures: the only place that knows names of tensors and keys of `config.json`.

In: a `config.json` as a mapping. Out: a `Family`: for every tensor name its role, layer and expert,
the name llama.cpp gives it, the model's sizes and router, and what a GGUF file says of it.
Invariant: no module outside of this package reads a key of `config.json` or asks for a
`model_type`.

A family is one file here: a table, registered in `registry`, that passes
`allocator.testing.families.FamilyConformance`.
"""

from allocator.families.base import (
    BLOCKS_SUFFIX,
    EXPONENTS_SUFFIX,
    SCALE_SUFFIX,
    Family,
    Joined,
    Parts,
    Place,
    Rule,
    Stack,
    Support,
)
from allocator.families.config import Config
from allocator.families.gguf import ComputeGraph, Gguf, Half, Made, ModelFacts, Piece, Window
from allocator.families.keys import Keys, LatentKeys, LinearKeys, StateSpaceKeys
from allocator.families.registry import (
    families,
    family_of,
    planned_family_of,
    register_family,
    unregister_family,
)
from allocator.families.roles import Role
from allocator.families.sizes import (
    Dimensions,
    LatentAttention,
    LinearAttention,
    Router,
    Scoring,
    StateSpace,
)
from allocator.families.transforms import Transform

__all__ = [
    "BLOCKS_SUFFIX",
    "EXPONENTS_SUFFIX",
    "SCALE_SUFFIX",
    "ComputeGraph",
    "Config",
    "Dimensions",
    "Family",
    "Gguf",
    "Half",
    "Joined",
    "Keys",
    "LatentAttention",
    "LatentKeys",
    "LinearAttention",
    "LinearKeys",
    "Made",
    "ModelFacts",
    "Parts",
    "Piece",
    "Place",
    "Role",
    "Router",
    "Rule",
    "Scoring",
    "Stack",
    "StateSpace",
    "StateSpaceKeys",
    "Support",
    "Transform",
    "Window",
    "families",
    "family_of",
    "planned_family_of",
    "register_family",
    "unregister_family",
]
