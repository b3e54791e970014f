"""What stock llama.cpp needs to know of an architecture, as plain keys and values.

In: what a family says of one config and its tensors (`ModelFacts`). Out: the hyperparameters of a
GGUF file, what must hold because llama.cpp hard-codes it, what llama.cpp must be told beside the
file, and what its graph depends on. Invariant: a model that llama.cpp would compute in another way
is a `TargetError`; an architecture without hyperparameters here is one, too.

The type of a value is its type in the file: `int` an unsigned integer of 32 bits, `float` a float
of 32 bits, `bool` and `str` their own, a tuple an array of signed integers of 32 bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from allocator.errors import CheckpointError, TargetError
from allocator.families.config import SLIDING, Config, number, whole
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.rope import rope_pairs, rotated_width, yarn_betas
from allocator.families.sizes import Dimensions, Router

Value = bool | int | float | str | tuple[int, ...]
Pair = tuple[str, Value]
"""A key, without the architecture that llama.cpp has before it, and its value."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a checkpoint where its description is made.

    Attributes:
        config: the language model's.
        keys: of `config`.
        dimensions: sizes.
        router: how experts are chosen.
        vocabulary: rows of the embedding.
        moe_layers: layers that route.
    """

    config: Config
    keys: Keys
    dimensions: Dimensions
    router: Router
    vocabulary: int
    moe_layers: tuple[int, ...]


@dataclass(frozen=True)
class Half:
    """A tensor of llama.cpp's that is a part of a checkpoint's.

    Attributes:
        of: the role of the checkpoint's tensor.
        role: of the half.
        name: llama.cpp's, with `{layer}`.
    """

    of: Role
    role: Role
    name: str


Order = Callable[[Dimensions], tuple[int, ...]]
"""Numbers of rows or columns of a checkpoint's matrix, in the order that a file has them in."""


@dataclass(frozen=True)
class Piece(Half):
    """Some rows of a checkpoint's matrix, which llama.cpp has as a matrix of its own.

    The pieces of a matrix have each of its rows once.

    Attributes:
        rows: of the checkpoint's tensor.
    """

    rows: Order


@dataclass(frozen=True)
class Fixed:
    """A choice that llama.cpp hard-codes.

    Attributes:
        key: of `config.json`.
        value: what llama.cpp computes with.
        default: what transformers computes with where `config.json` does not say.
    """

    key: str
    value: Value | None
    default: Value | None


@dataclass(frozen=True)
class Made:
    """A tensor of a file that is made from `config.json` alone, in F32.

    Attributes:
        name: llama.cpp's.
        values: of its only axis.
    """

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Window:
    """A sliding window of attention.

    Attributes:
        tokens: that a token looks back on, itself included.
        layers: that have the window; others look back on everything.
    """

    tokens: int = 0
    layers: frozenset[int] = frozenset()

    @classmethod
    def over(cls, tokens: int, kinds: Sequence[str]) -> "Window":
        """Returns the window of the layers whose kind, of `layer_types`, says so."""
        return cls(tokens, frozenset(i for i, kind in enumerate(kinds) if kind == SLIDING))


@dataclass(frozen=True)
class GgufFacts:
    """What is known of a GGUF file from which a config is made.

    Attributes:
        architecture: llama.cpp's name.
        pairs: of the file, without the architecture before their keys.
        names: of its tensors in layers, with `{layer}`.
        shapes: of all its tensors, by llama.cpp's names.
        read: returns the values of a tensor in F32 with one axis.
    """

    architecture: str
    pairs: Mapping[str, Any]
    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], tuple[float, ...]]

    def __getitem__(self, key: str) -> Any:
        """Returns the value of a pair.

        Raises:
            CheckpointError: if the file has none.
        """
        if key not in self.pairs:
            raise CheckpointError(
                f"no {self.architecture}.{key}, which says how it is computed; use the original"
            )
        return self.pairs[key]

    def by_layer(self, key: str) -> tuple[Any, ...]:
        """Returns a pair's value of each layer; of equal ones, `pairs` has one.

        A list may have layers of multi-token prediction, too: these are left out.

        Raises:
            CheckpointError: if the file has none.
        """
        value, n_layers = self[key], self["block_count"]
        return value[:n_layers] if isinstance(value, tuple) else (value,) * n_layers

    def rope(self) -> dict[str, Any]:
        """Returns how positions are rotated, as transformers has it in one table.

        Of another kind of scaling than YaRN it names the kind, which is refused.

        Raises:
            CheckpointError: if the file lacks a pair.
        """
        table = {"rope_type": "default", "rope_theta": self.pairs.get("rope.freq_base", 10000.0)}
        if (kind := self.pairs.get("rope.scaling.type", "none")) == "none":
            return table
        original = self.pairs.get("rope.scaling.original_context_length")
        table |= {
            "rope_type": kind,
            "factor": self["rope.scaling.factor"],
            "original_max_position_embeddings": original,
        }
        for beta in ("beta_fast", "beta_slow"):
            if (value := self.pairs.get(f"rope.scaling.yarn_{beta}")) is not None:
                table[beta] = value
        return table


GATE_UP = "blk.{layer}.ffn_gate_up_exps.weight"
"""llama.cpp's name of a tensor `(experts, gate's rows, then up's, hidden)`, which it reads in place
of gate and up."""


class ComputeGraph(Enum):
    """A graph of llama.cpp's whose memory is predicted to the byte, by how its layers attend."""

    GROUPED = auto()
    """Every head has a query; groups of heads share keys and values."""
    LATENT = auto()
    """Keys and values are read from one latent row per token."""


def _no_window(config: Config, n_layers: int) -> Window:
    return Window()


def _own(config: Config) -> Config:
    return config


def _no_lines(config: Config) -> tuple[str, ...]:
    return ()


def _nothing(facts: ModelFacts) -> None:
    return


def _none_made(facts: ModelFacts) -> tuple[Made, ...]:
    return ()


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp has an architecture; names of tensors stand in its rules.

    Attributes:
        architecture: llama.cpp's name.
        hyperparameters: yields the pairs that this architecture has beside those of all, or in
            their place; None where no file is written.
        graph: that llama.cpp builds, where its memory is predicted; None where it is not known,
            and no whole device is a budget.
        fixed: what llama.cpp hard-codes.
        check: refuses what llama.cpp does not load.
        halves: tensors that it stores in parts, by heads.
        pieces: tensors that it stores in parts, by rows.
        row_orders: by role, the rows of a tensor as its file has them: `(rows,)` numbers of the
            checkpoint's rows.
        column_orders: by role, the columns of a matrix as its file has them. What is encoded
            together then are other weights, so a model computes in that order, too.
        window: returns the sliding window of a config with so many layers; none by default.
        divides_mscale: see `rope_pairs`.
        reads_yarn_betas: whether its loader reads YaRN's betas from the file.
        computed: returns a config by which transformers computes as llama.cpp does, where llama.cpp
            cannot be told what a checkpoint's own config says; by default that config itself.
        rotation: returns a config that says under the usual keys how positions are rotated, of
            layers of full attention where layers differ.
        otherwise: lines on what llama.cpp computes otherwise than a config says.
        made: tensors that a file has beside those of the checkpoint.
        source: returns what `config.json` has that the pairs of all architectures do not say, from
            a file of this one; None where a file is no checkpoint that is read. The pairs of the
            config, and the tensors made of it, are held against the file's.
        absent: what its loader takes where a file lacks a pair, from the file's other pairs, in
            addition to what it takes in all architectures.
        unread: pairs of a file that change nothing in what is computed.
    """

    architecture: str
    hyperparameters: Callable[[ModelFacts], Iterator[Pair]] | None
    graph: ComputeGraph | None
    fixed: tuple[Fixed, ...] = ()
    check: Callable[[ModelFacts], None] = _nothing
    halves: tuple[Half, ...] = ()
    pieces: tuple[Piece, ...] = ()
    row_orders: Mapping[Role, Callable[[Dimensions], Sequence[int]]] = field(default_factory=dict)
    column_orders: Mapping[Role, Order] = field(default_factory=dict)
    window: Callable[[Config, int], Window] = _no_window
    divides_mscale: bool = False
    reads_yarn_betas: bool = False
    computed: Callable[[Config], Config] = _own
    rotation: Callable[[Config], Config] = _own
    otherwise: Callable[[Config], tuple[str, ...]] = _no_lines
    made: Callable[[ModelFacts], tuple[Made, ...]] = _none_made
    source: Callable[[GgufFacts], Config] | None = None
    absent: Mapping[str, Callable[[Mapping[str, Any]], Value]] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        moved = [*self.row_orders, *self.column_orders, *(piece.role for piece in self.pieces)]
        assert len(moved) == len(set(moved)), self.architecture  # one change of places per role

    @property
    def parts(self) -> tuple[Half, ...]:
        """Tensors that are parts of a checkpoint's: halves and pieces."""
        return (*self.halves, *self.pieces)

    def known_graph(self) -> ComputeGraph:
        """Returns the graph that llama.cpp builds.

        Raises:
            TargetError: if what it allocates for the architecture is not known.
        """
        if self.graph is None:
            raise TargetError(
                f"gguf: what llama.cpp allocates to compute {self.architecture} is not known, so a "
                "whole device cannot be the limit; limit the file with --budget"
            )
        return self.graph

    def pairs(
        self, facts: ModelFacts, *, n_experts: int, experts_used: int
    ) -> Iterator[tuple[str, Value]]:
        """Yields every pair that says how the model is computed, under its whole key.

        Args:
            facts: of the checkpoint.
            n_experts: routed experts that every MoE layer retains.
            experts_used: routed experts per token.

        Raises:
            CheckpointError: if `config.json` lacks or contradicts what is needed.
            TargetError: if llama.cpp computes the model in another way, or not with these counts.
        """
        if self.hyperparameters is None:
            raise TargetError(
                f"gguf: what a file of {self.architecture} must say of the model is not known; "
                "needed an architecture whose files are written"
            )
        _check_router_groups(facts.router, n_experts, experts_used)
        of_all = list(_of_all(facts))
        self._check_fixed(facts.config)
        own = dict(self.hyperparameters(facts))
        yield from self._named((key, own.pop(key, value)) for key, value in of_all)
        yield f"{self.architecture}.expert_count", n_experts
        yield f"{self.architecture}.expert_used_count", experts_used
        yield from self._named(own.items())
        config = self.rotation(self.computed(facts.config))
        rope = rope_pairs(config, self.architecture, divides_mscale=self.divides_mscale)
        yield from self._named(rope)

    def _named(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for key, value in pairs:
            yield f"{self.architecture}.{key}", value

    def _check_fixed(self, config: Config) -> None:
        for fixed in self.fixed:
            value = config.get(fixed.key, fixed.default)
            if isinstance(fixed.value, bool):
                value = bool(value)
            if value != fixed.value:
                raise TargetError(
                    f"gguf: llama.cpp computes {self.architecture} with {fixed.key} = "
                    f"{fixed.value!r}, config.json says {config.get(fixed.key)!r}; use target "
                    "safetensors"
                )

    def yarn_betas(self, config: Config) -> tuple[float, float] | None:
        """Returns YaRN's betas that llama.cpp must be told; None where the file tells it enough."""
        return None if self.reads_yarn_betas else yarn_betas(self.rotation(config))

    def notes(self, config: Config) -> tuple[str, ...]:
        """Returns a line on everything that no file can tell llama.cpp."""
        if self.hyperparameters is None:
            return ()
        notes = self.otherwise(config)
        if (betas := self.yarn_betas(config)) is None:
            return notes
        return (
            *notes,
            f"llama.cpp must be told {yarn_options(betas)}: its loader of {self.architecture} does "
            "not read YaRN's betas from the file, and would compute with 32 and 1",
        )


def yarn_options(betas: tuple[float, float]) -> str:
    """Returns what llama.cpp's programs are told of YaRN."""
    fast, slow = betas
    return f"--yarn-beta-fast {fast:g} --yarn-beta-slow {slow:g}"


def paired_halves(heads: int, width: int) -> list[int]:
    """Returns rows in the order in which llama.cpp rotates neighbours as pairs, `(heads * width,)`.

    transformers rotates row `i` of a head's first half with row `i` of its second.
    """
    half = width // 2
    return [
        head * width + i + part * half
        for head in range(heads)
        for i in range(half)
        for part in range(2)
    ]


SIGMOID = 2
"""llama.cpp's `LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID`."""
SOFTMAX = 1
"""llama.cpp's `LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX`."""


def grouped_pairs(facts: ModelFacts, *, rotated: float | None = None) -> Iterator[Pair]:
    """Yields what a file says of attention whose heads share keys and values, and of rotation.

    Args:
        facts: of the checkpoint.
        rotated: share of a head that is rotated where `config.json` does not say; None where the
            architecture rotates whole heads, whatever `config.json` says.
    """
    head = facts.dimensions.head
    yield "attention.head_count_kv", whole(facts.config, facts.keys.kv_heads)
    yield "attention.key_length", head
    yield "attention.value_length", head
    width = head if rotated is None else rotated_width(facts.config, head, rotated)
    yield "rope.dimension_count", width


def scaled_router_pairs(facts: ModelFacts) -> Iterator[Pair]:
    """Yields what a file says of a router like DeepSeek-V3's and of experts beside it."""
    yield "leading_dense_block_count", leading_dense(facts)
    yield "expert_shared_count", whole(facts.config, facts.keys.shared_experts)
    yield "expert_weights_scale", number(facts.config, facts.keys.scale)
    yield "expert_weights_norm", facts.router.normalizes


def scaled_router_source(file: GgufFacts) -> dict[str, Any]:
    """Returns the keys that `scaled_router_pairs` and groups of experts are made of."""
    return {
        "first_k_dense_replace": file.pairs.get("leading_dense_block_count", 0),
        "n_shared_experts": file.pairs.get("expert_shared_count", 0),
        "routed_scaling_factor": file.pairs.get("expert_weights_scale", 1.0),
        "norm_topk_prob": file.pairs.get("expert_weights_norm", False),
        "n_group": file.pairs.get("expert_group_count", 1),
        "topk_group": file.pairs.get("expert_group_used_count", 1),
    }


def nothing_else(file: GgufFacts) -> dict[str, Any]:
    """Returns no key: the pairs of all architectures say everything."""
    return {}


def check_all_route(facts: ModelFacts, architecture: str) -> None:
    """Refuses dense layers, for an architecture that llama.cpp loads without any.

    Raises:
        TargetError: if a layer does not route.
    """
    if leading_dense(facts):
        raise TargetError(
            f"gguf: llama.cpp needs experts in every layer of {architecture}, some are dense; "
            "use target safetensors"
        )


def check_equal_heads(facts: ModelFacts, architecture: str) -> None:
    """Refuses grouped heads, for an architecture that llama.cpp loads without them.

    Raises:
        TargetError: if there are fewer heads of keys than of queries.
    """
    heads, kv_heads = facts.dimensions.heads, facts.dimensions.kv_heads
    if kv_heads != heads:
        raise TargetError(
            f"gguf: llama.cpp loads {architecture} with as many heads of keys as of queries, got "
            f"{kv_heads} and {heads}; use target safetensors"
        )


def leading_dense(facts: ModelFacts) -> int:
    """Returns how many layers come before the first that routes.

    Raises:
        TargetError: if a layer after the first does not route.
    """
    first, n_layers = facts.moe_layers[0], facts.dimensions.n_layers
    if facts.moe_layers != tuple(range(first, n_layers)):
        raise TargetError(
            f"gguf: llama.cpp needs experts in every layer from the first on that has them, got "
            f"layers {facts.moe_layers} of {n_layers}; use target safetensors"
        )
    return first


def _of_all(facts: ModelFacts) -> Iterator[Pair]:
    """The pairs that every architecture has."""
    config, keys = facts.config, facts.keys
    yield "vocab_size", facts.vocabulary
    yield "block_count", facts.dimensions.n_layers
    yield "context_length", whole(config, keys.context)
    yield "embedding_length", whole(config, keys.hidden)
    yield "feed_forward_length", whole(config, keys.dense_width)
    yield "expert_feed_forward_length", whole(config, keys.expert_width)
    heads = config.get(keys.heads_by_layer) if keys.heads_by_layer else None
    yield "attention.head_count", tuple(heads) if heads else whole(config, keys.heads)
    epsilon = number({keys.norm_epsilon: keys.default_epsilon, **config}, keys.norm_epsilon)
    yield "attention.layer_norm_rms_epsilon", epsilon


def _check_router_groups(router: Router, n_experts: int, experts_used: int) -> None:
    if router.groups == 1:
        return
    size = n_experts // router.groups
    # a group is ranked by its two best experts, and only the chosen groups' experts are used
    if n_experts % router.groups or size < 2 or experts_used > size * router.groups_used:
        raise TargetError(
            f"gguf: {experts_used} of {n_experts} retained experts in {router.groups} router "
            f"groups (n_group) of which {router.groups_used} are chosen; retain a multiple of "
            f"{router.groups}, at least two per group and {experts_used} in the chosen ones"
        )
