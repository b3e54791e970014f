"""What a tensor does in a model, in the same words for every architecture."""

from enum import StrEnum


class Role(StrEnum):
    """What a tensor does; the value names its group."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    EXPERT_GATE = "experts.gate"
    EXPERT_UP = "experts.up"
    EXPERT_DOWN = "experts.down"
    SHARED_GATE = "shared.gate"
    SHARED_UP = "shared.up"
    SHARED_DOWN = "shared.down"
    SHARED_ROUTER = "shared.router"
    MLP_GATE = "mlp.gate"
    MLP_UP = "mlp.up"
    MLP_DOWN = "mlp.down"
    Q = "attention.q"
    K = "attention.k"
    V = "attention.v"
    O = "attention.o"  # noqa: E741
    Q_A = "attention.q_a"
    Q_B = "attention.q_b"
    KV_A = "attention.kv_a"
    KV_B = "attention.kv_b"
    K_B = "attention.k_b"
    V_B = "attention.v_b"
    ATTENTION_GATE = "attention.gate"
    LINEAR_QKVZ = "linear.qkvz"
    LINEAR_QKV = "linear.qkv"
    LINEAR_Z = "linear.z"
    LINEAR_OUT = "linear.out"
    LINEAR_AB = "linear.ab"
    LINEAR_STATE = "linear.state"
    SSM_IN = "ssm.in"
    SSM_OUT = "ssm.out"
    SSM_STATE = "ssm.state"
    LATENT_IN = "latent.in"
    LATENT_OUT = "latent.out"
    CONV_IN = "conv.in"
    CONV_OUT = "conv.out"
    CONV_KERNEL = "conv.kernel"
    BIAS = "bias"
    EXPERT_BIAS = "experts.bias"
    EXPERT_SCALE = "experts.scale"
    LAYER_SCALE = "layer.scale"
    NEXTN = "nextn"

    @property
    def is_expert(self) -> bool:
        """Whether it is a routed expert's matrix."""
        return self in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)

    @property
    def has_row_per_expert(self) -> bool:
        """Whether it has one row or value per routed expert."""
        return self in (Role.ROUTER, Role.ROUTER_BIAS, Role.EXPERT_BIAS, Role.EXPERT_SCALE)

    @property
    def is_encoded(self) -> bool:
        """Whether its format is searched; routers, norms, biases and the like are never encoded."""
        other = (
            Role.NORM, Role.BIAS, Role.SHARED_ROUTER, Role.LINEAR_AB, Role.LINEAR_STATE,
            Role.SSM_STATE, Role.CONV_KERNEL, Role.LAYER_SCALE, Role.NEXTN,
        )  # fmt: skip
        return not self.has_row_per_expert and self not in other
