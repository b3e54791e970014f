"""Which key of a `config.json` says what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentKeys:
    """Keys of latent attention; transformers' usual ones by default."""

    rank: str = "kv_lora_rank"
    q_rank: str = "q_lora_rank"
    nope: str = "qk_nope_head_dim"
    rope: str = "qk_rope_head_dim"
    value: str = "v_head_dim"
    interleaved: str = "rope_interleave"


@dataclass(frozen=True)
class LinearKeys:
    """Keys of linear attention; Qwen3-Next's by default."""

    key_heads: str = "linear_num_key_heads"
    value_heads: str = "linear_num_value_heads"
    key_head: str = "linear_key_head_dim"
    value_head: str = "linear_value_head_dim"
    kernel: str = "linear_conv_kernel_dim"


@dataclass(frozen=True)
class StateSpaceKeys:
    """Keys of a state space model; Nemotron-H's by default."""

    heads: str = "mamba_num_heads"
    head: str = "mamba_head_dim"
    state: str = "ssm_state_size"
    groups: str = "n_groups"
    kernel: str = "conv_kernel"


@dataclass(frozen=True)
class Keys:
    """Keys of an architecture; transformers' usual ones by default.

    Attributes:
        experts: routed experts of a layer: alternatives, of which the first that is present counts.
        latent: None for grouped attention.
        linear: None where no layer has linear attention.
        state_space: None where no layer is a state space model.
        expert_hidden: width of what routed experts get; None where they get states as they are.
        conv_kernel: tokens that a short convolution reaches over; None where no layer is one.
        heads_by_layer: a list of heads of queries, where layers have several numbers of them.
        default_epsilon: what transformers adds to a norm's mean square where no key says.
    """

    experts: tuple[str, ...]
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    vocabulary: str = "vocab_size"
    experts_used: str = "num_experts_per_tok"
    expert_width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    shared_experts: str = "n_shared_experts"
    shared_width: str = "shared_expert_intermediate_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head: str = "head_dim"
    groups: str = "n_group"
    groups_used: str = "topk_group"
    scale: str = "routed_scaling_factor"
    nextn: str = "num_nextn_predict_layers"
    context: str = "max_position_embeddings"
    norm_epsilon: str = "rms_norm_eps"
    latent: LatentKeys | None = None
    linear: LinearKeys | None = None
    state_space: StateSpaceKeys | None = None
    expert_hidden: str | None = None
    conv_kernel: str | None = None
    heads_by_layer: str | None = None
    default_epsilon: float = 1e-6
