"""GLM-4.7-Flash: DeepSeek-V3's architecture, whose config names its layers otherwise.

Sources: transformers' `modeling_glm4_moe_lite`; llama.cpp's loader and graph of `deepseek2`.
"""

from dataclasses import replace

from allocator.families.base import Parts
from allocator.families.common import dense_then_routed
from allocator.families.config import Config
from allocator.families.deepseek_v3 import DEEPSEEK_V3, latent_attention


def _layer_parts(config: Config, layer: int) -> Parts:
    config = {"first_k_dense_replace": 1, **config}
    return dense_then_routed(latent_attention(config), config, layer)


GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    models="GLM-4.7-Flash",
    layer_parts=_layer_parts,
    router_groups=(1, 1),
    plan_notes=lambda config: (),
)
