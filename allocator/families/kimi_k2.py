"""Kimi-K2: DeepSeek-V3's architecture under a name of its own.

Sources: `config.json` of the released model, whose own code is DeepSeek-V3's.
"""

from dataclasses import replace

from allocator.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2", models="Kimi-K2", built_as="deepseek_v3")
