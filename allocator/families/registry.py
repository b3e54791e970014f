"""Every architecture, named once.

In: a `config.json`. Out: its `Family`. Invariant: an architecture that nobody registered is an
error that names those that are.
"""

from typing import Any

from allocator.errors import CheckpointError
from allocator.families.afmoe import AFMOE
from allocator.families.base import Family, Support
from allocator.families.config import Config
from allocator.families.deepseek_v2 import DEEPSEEK_V2
from allocator.families.deepseek_v3 import DEEPSEEK_V3
from allocator.families.dots1 import DOTS1
from allocator.families.ernie4_5_moe import ERNIE4_5_MOE
from allocator.families.gemma4 import GEMMA4, GEMMA4_TEXT
from allocator.families.glm4_moe import GLM4_MOE
from allocator.families.glm4_moe_lite import GLM4_MOE_LITE
from allocator.families.gpt_oss import GPT_OSS
from allocator.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from allocator.families.kimi_k2 import KIMI_K2
from allocator.families.laguna import LAGUNA
from allocator.families.lfm2_moe import LFM2_MOE
from allocator.families.minimax_m2 import MINIMAX_M2
from allocator.families.mixtral import MIXTRAL
from allocator.families.nemotron_h import NEMOTRON_H
from allocator.families.olmoe import OLMOE
from allocator.families.qwen2_moe import QWEN2_MOE
from allocator.families.qwen3_5_moe import QWEN3_5_MOE, QWEN3_5_MOE_TEXT
from allocator.families.qwen3_moe import QWEN3_MOE
from allocator.families.qwen3_next import QWEN3_NEXT

_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DEEPSEEK_V3,
        QWEN3_MOE,
        KIMI_K2,
        DEEPSEEK_V2,
        QWEN2_MOE,
        OLMOE,
        MIXTRAL,
        GLM4_MOE,
        GLM4_MOE_LITE,
        MINIMAX_M2,
        DOTS1,
        QWEN3_NEXT,
        QWEN3_5_MOE,
        QWEN3_5_MOE_TEXT,
        GPT_OSS,
        LFM2_MOE,
        AFMOE,
        LAGUNA,
        ERNIE4_5_MOE,
        HUNYUAN_V1_MOE,
        GEMMA4,
        GEMMA4_TEXT,
        NEMOTRON_H,
    )
}


def families(support: Support | None = None) -> tuple[Family, ...]:
    """Returns the registered architectures, with this support alone if given."""
    return tuple(f for f in _FAMILIES.values() if support in (None, f.support))


def register_family(family: Family) -> None:
    """Makes an architecture known to everything that asks `family_of`.

    Raises:
        ValueError: if another one has its `model_type`.
    """
    if _FAMILIES.get(family.model_type, family) is not family:
        raise ValueError(f"{family.model_type}: another family has this model_type")
    _FAMILIES[family.model_type] = family


def unregister_family(model_type: str) -> None:
    """Removes an architecture, e.g. after a test.

    Raises:
        KeyError: if it is not registered.
    """
    del _FAMILIES[model_type]


def family_of(config: Config, where: str = "config.json") -> Family:
    """Returns the family of a `config.json`.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: if no checkpoint of its `model_type` is read.
    """
    family = planned_family_of(config, where)
    if family.support is not Support.READ:
        raise CheckpointError(
            f"{where}: model_type is {family.model_type!r}, whose sizes alone are known: "
            f"`allocator plan` works with it; {Support.READ}: {_names(Support.READ)}"
        )
    return family


def planned_family_of(config: Config, where: str = "config.json") -> Family:
    """Returns the family of a `config.json`, also one that is planned only.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: if its `model_type` is not registered.
    """
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    read_inside = family is not None and family.text_key in config
    for key, inner in () if read_inside else config.items():
        if _is_nested(config, family, inner):
            raise CheckpointError(
                f"{where}: model_type is {model_type!r} with a language model of type "
                f"{inner.get('model_type')!r} inside of {key}: models of text and more are not "
                "supported; save the language model alone, e.g. with transformers, and name that"
            )
    if family is None:
        got = f"model_type {model_type!r} is not supported yet"
        if "model_type" not in config:
            got = "no model_type; needed the config.json of a MoE checkpoint"
        planned = _names(Support.PLANNED)
        raise CheckpointError(
            f"{where}: {got}; supported: {_names(Support.READ)}"
            + (f"; planned (`allocator plan` only): {planned}" if planned else "")
        )
    return family


def _is_nested(config: Config, family: Family | None, inner: Any) -> bool:
    """Whether a value is the config of a language model in place of one beside it."""
    key = "num_hidden_layers" if family is None else family.keys.layers
    return key not in config and isinstance(inner, dict) and key in inner


def _names(support: Support) -> str:
    return ", ".join(family.model_type for family in families(support))
