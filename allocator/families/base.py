"""What an architecture is made of: a table of its tensors, its config's keys, and its router.

In: a `config.json` as a mapping. Out: a `Family`, and of one config its `Dimensions` and `Router`,
the tensors that it asks for, and for every tensor name its role, layer and expert. Invariant: a
name that no rule matches is an error upstream, so no tensor is overlooked.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from types import EllipsisType
from typing import TypeVar

from allocator.errors import CheckpointError, TargetError
from allocator.families.config import (
    MOST_LISTED,
    MOST_WIDE,
    SHARED_KEYS,
    Config,
    count,
    is_tied,
    number,
    optional,
    plain_floats,
)
from allocator.families.gguf import Gguf, Half, ModelFacts
from allocator.families.keys import Keys, LatentKeys, LinearKeys, StateSpaceKeys
from allocator.families.roles import Role
from allocator.families.sizes import (
    Dimensions,
    LatentAttention,
    LinearAttention,
    Router,
    Scoring,
    StateSpace,
)
from allocator.families.transforms import PLUS_ONE, Transform

_NUMBER = "0|[1-9][0-9]{0,5}"

SCALE_SUFFIX = "_scale_inv"
"""After the name of an FP8 matrix: that of the factors which its blocks are multiplied by."""
BLOCKS_SUFFIX, EXPONENTS_SUFFIX = "_blocks", "_scales"
"""After the name of a stack in MXFP4: those of its 4-bit floats and of their blocks' exponents."""

Place = tuple[EllipsisType | slice | int, ...]
"""An index: which part of a parameter a tensor is; `(...,)` for all of it."""
Parts = frozenset[str]
"""Names of a layer's tensors, as `Rule.part` has them."""


class Support(StrEnum):
    """How far an architecture is supported."""

    READ = "read, searched and written"
    PLANNED = "planned"
    """Its sizes are known, for `allocator plan`; no checkpoint is read."""


@dataclass(frozen=True)
class Rule:
    """One tensor of an architecture, or one per layer, or one per expert of a layer.

    Attributes:
        pattern: its name with `{layer}` and `{expert}`; of what is no expert, as transformers has
            it in the model.
        role: what it does.
        shape: its axes by the names of `Dimensions.sizes`, e.g. `experts x hidden`.
        gguf: llama.cpp's name with `{layer}`, which the experts of a layer share; None where
            llama.cpp has no such tensor.
        aliases: other names under which checkpoints have it; an inventory calls it by `pattern`.
        transforms: what llama.cpp has in place of its values, one after the other; of a tensor
            that is not encoded. `in_gguf` has these, and what `adds_one` means.
        gguf_shape: its axes in llama.cpp, where these are others.
        in_one_row: a vector that checkpoints, and transformers' model, have as a matrix of one row.
        adds_one: of a norm, whether transformers multiplies by one more than its values. Files of
            transformers have the values, files of llama.cpp what is multiplied by.
    """

    pattern: str
    role: Role
    shape: str
    gguf: str | None = None
    aliases: tuple[str, ...] = ()
    transforms: tuple[Transform, ...] = ()
    gguf_shape: str | None = None
    in_one_row: bool = False
    adds_one: bool = False

    def __post_init__(self) -> None:
        assert PLUS_ONE not in self.transforms, self.pattern  # `adds_one` says so
        if self.adds_one:
            assert self.role is Role.NORM, self.pattern

    @property
    def in_gguf(self) -> tuple[Transform, ...]:
        """What llama.cpp has in place of its values, one after the other."""
        return (PLUS_ONE, *self.transforms) if self.adds_one else self.transforms

    @cached_property
    def expressions(self) -> tuple[re.Pattern[str], ...]:
        """Of each of its names, with groups `layer` and `expert`."""
        return tuple(map(expression, (self.pattern, *self.aliases)))

    @property
    def n_axes(self) -> int:
        """Axes of its shape."""
        return len(self.shape.split(" x "))

    @property
    def has_layer(self) -> bool:
        """Whether there is one per layer."""
        return "{layer}" in self.pattern

    @property
    def has_expert(self) -> bool:
        """Whether there is one per routed expert."""
        return "{expert}" in self.pattern

    @cached_property
    def part(self) -> str:
        """What it is called within its layer."""
        return self.pattern.rpartition("{layer}.")[2].removesuffix(".weight")

    def match(self, name: str) -> re.Match[str] | None:
        """Matches a tensor name; None if it is another tensor's."""
        return next((m for e in self.expressions if (m := e.fullmatch(name))), None)


@dataclass(frozen=True)
class Stack:
    """The experts of a layer in one tensor.

    It is `(experts, sum of rows, in_features)`, or transposed, `(experts, in_features, sum of
    rows)`, which its shape tells.

    Attributes:
        pattern: its name with `{layer}`.
        roles: what its rows are: `(gate, up)`, or `(down,)`.
        transposed: what it is where its shape does not tell.
        alternating: rows of the roles take turns; else they come one role after the other.
        in_mxfp4: checkpoints may have it in MXFP4, in two tensors (`BLOCKS_SUFFIX`), where it is
            not transposed.
    """

    pattern: str
    roles: tuple[Role, ...]
    transposed: bool = False
    alternating: bool = False
    in_mxfp4: bool = False

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """Of its name, with the group `layer`."""
        return expression(self.pattern)


@dataclass(frozen=True)
class Joined:
    """Tensors of a layer with a row per expert, whose columns take turns in one tensor.

    Attributes:
        pattern: its name with `{layer}`, in checkpoints and in transformers' model.
        parts: patterns of the rules of its parts; the first has its columns 0, n, 2n, ...
    """

    pattern: str
    parts: tuple[str, ...]

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """Of its name, with the group `layer`."""
        return expression(self.pattern)


def expression(pattern: str) -> re.Pattern[str]:
    """Compiles a name with `{layer}` and `{expert}` to an expression with these groups."""
    text = re.escape(pattern)
    for key in ("layer", "expert"):
        text = text.replace(rf"\{{{key}\}}", f"(?P<{key}>{_NUMBER})")
    return re.compile(text)


def _softmax_router(config: Config) -> tuple[str, bool]:
    return Scoring.SOFTMAX, True


def _as_it_is(config: Config) -> Config:
    return config


def _no_sizes(config: Config, layer: int) -> Mapping[str, int]:
    return {}


_NEXTN = (  # DeepSeek-V3's README_WEIGHTS.md
    ("embed_tokens.weight", "vocabulary x hidden"),
    ("enorm.weight", "hidden"),
    ("hnorm.weight", "hidden"),
    ("eh_proj.weight", "hidden x twice_hidden"),
    ("shared_head.norm.weight", "hidden"),
    ("shared_head.head.weight", "vocabulary x hidden"),
)


@dataclass(frozen=True)
class Family:
    """An architecture: one table, from which everything else is derived.

    Attributes:
        model_type: transformers' name, as in `config.json`.
        models: released ones, for readers.
        rules: one per tensor.
        keys: of `config.json`.
        layer_parts: which tensors a config gives a layer.
        scoring: how a config's router scores experts, and whether it divides the chosen gates by
            their sum.
        tied: whether the head of a config is to be the embedding.
        layer_sizes: sizes of a layer that are not those of the whole model, by the names that
            `Rule.shape` uses.
        layers: the sets of tensors that may make up a layer.
        gguf: how llama.cpp has it; None where `no_gguf` says why not.
        no_gguf: why target gguf refuses it.
        support: how far it is supported.
        stacks: tensors that hold the experts of a layer.
        joined: tensors that hold several others with a row per expert.
        ignored: expressions for names that are left out: other parts of the model.
        computed: expressions for names of buffers that a model computes itself.
        text_key: key of the language model's own config, in a model of text and more.
        completed: returns a config with the keys that `keys` names, where configs may say the same
            under others.
        prefixes: beginnings of names that checkpoints may have in place of those of the rules, and
            which these are.
        built_as: transformers' name of the architecture, where a config calls it otherwise.
        layer_prefix: what names of a layer's tensors begin with.
        n_nextn_layers: multi-token-prediction layers where `config.json` does not say.
        nextn: tensors of such a layer, beside those of other layers.
        router_groups: groups of experts, and how many a token uses, where `config.json` does not
            say.
        ranks_groups: whether groups are ranked by their two best experts, even a single one.
        selection_bias: whether a bias per expert takes part in the choice alone.
        scales_gates: whether gates are multiplied by a factor.
        router_reads_config: whether transformers' router reads `keys.experts_used` of its config
            whenever it runs; else modules have the number as `top_k`.
        never_null: keys of `config.json` that may be left out, but with which transformers refuses
            null.
        bias_keys: keys of `config.json` that add biases, which no rule names.
        plan_notes: what a plan of this model tells its reader.
    """

    model_type: str
    models: str
    rules: tuple[Rule, ...]
    keys: Keys
    layer_parts: Callable[[Config, int], Parts]
    layers: tuple[Parts, ...]
    layer_sizes: Callable[[Config, int], Mapping[str, int]] = _no_sizes
    scoring: Callable[[Config], tuple[str, bool]] = _softmax_router
    tied: Callable[[Config], bool] = is_tied
    gguf: Gguf | None = None
    no_gguf: str = ""
    support: Support = Support.READ
    stacks: tuple[Stack, ...] = ()
    joined: tuple[Joined, ...] = ()
    ignored: tuple[str, ...] = ()
    computed: tuple[str, ...] = (
        rf"model\.(layers\.({_NUMBER})\.self_attn\.)?rotary_emb\."
        r"(inv_freq|original_inv_freq|cos_cached|sin_cached)",
    )
    text_key: str | None = None
    completed: Callable[[Config], Config] = _as_it_is
    prefixes: tuple[tuple[str, str], ...] = ()
    built_as: str | None = None
    layer_prefix: str = "model.layers.{layer}."
    n_nextn_layers: int = 0
    nextn: tuple[tuple[str, str], ...] = _NEXTN
    router_groups: tuple[int, int] = (1, 1)
    ranks_groups: bool = False
    selection_bias: bool = False
    scales_gates: bool = False
    router_reads_config: bool = False
    never_null: frozenset[str] = frozenset()
    bias_keys: tuple[str, ...] = ()
    plan_notes: Callable[[Config], tuple[str, ...]] = field(default=lambda config: ())

    def __post_init__(self) -> None:
        assert self.gguf is not None or self.no_gguf, self.model_type
        encoded = {rule.role for rule in self.rules if rule.role.is_encoded}
        changed = {rule.role for rule in self.rules if rule.in_gguf or rule.gguf_shape}
        assert not changed & encoded, self.model_type
        if self.gguf is not None:
            assert {*self.gguf.row_orders, *self.gguf.column_orders} <= encoded, self.model_type

    # -- names

    @cached_property
    def roles(self) -> frozenset[Role]:
        """Roles of its groups and tensors, of parts too."""
        return frozenset((*(r.role for r in self.rules), *self._parts))

    @cached_property
    def _parts(self) -> dict[Role, Half]:
        """Tensors that llama.cpp stores in parts, by the role of the part."""
        if self.gguf is None:
            return {}
        return {part.role: part for part in self.gguf.parts}

    def plain_name(self, name: str) -> str:
        """Returns a tensor's name as the rules begin it."""
        for prefix, plain in self.prefixes:
            if name.startswith(prefix):
                return plain + name.removeprefix(prefix)
        return name

    def match(self, name: str) -> tuple[Rule, int | None, int | None] | None:
        """Returns the rule, layer and expert of a tensor name; None if no rule knows the name."""
        name = self.plain_name(name)
        for rule in self.rules:
            if match := rule.match(name):
                numbers = match.groupdict()
                layer, expert = numbers.get("layer"), numbers.get("expert")
                return (
                    rule,
                    None if layer is None else int(layer),
                    None if expert is None else int(expert),
                )
        return None

    def match_stack(self, name: str) -> tuple[Stack, int] | None:
        """Returns the stack of a tensor name, and its layer; None if the name is no stack's."""
        name = self.plain_name(name)
        for stack in self.stacks:
            if match := stack.expression.fullmatch(name):
                return stack, int(match["layer"])
        return None

    def match_mxfp4(self, name: str, suffix: str) -> tuple[Stack, int] | None:
        """Returns the stack in MXFP4 that a tensor is of, and its layer; None if it is of none.

        Args:
            name: of the tensor.
            suffix: `BLOCKS_SUFFIX` or `EXPONENTS_SUFFIX`.
        """
        match = self.match_stack(name.removesuffix(suffix)) if name.endswith(suffix) else None
        return match if match and match[0].in_mxfp4 else None

    def match_joined(self, name: str) -> tuple[Joined, int] | None:
        """Returns what a tensor name joins, and its layer; None if the name is of one tensor."""
        name = self.plain_name(name)
        for joined in self.joined:
            if match := joined.expression.fullmatch(name):
                return joined, int(match["layer"])
        return None

    def place_in_model(self, name: str) -> tuple[str, Place]:
        """Returns which parameter of transformers' model holds a tensor, and where in it.

        Args:
            name: as the inventory has it.
        """
        if self._has_places and (match := self.match(name)) is not None:
            rule, layer, _ = match
            if rule.in_one_row:
                return name, (0,)
            for joined in self.joined:
                if rule.pattern in joined.parts:
                    first, step = joined.parts.index(rule.pattern), len(joined.parts)
                    return joined.pattern.format(layer=layer), (..., slice(first, None, step))
        return name, (...,)

    @cached_property
    def _has_places(self) -> bool:
        return bool(self.joined) or any(rule.in_one_row for rule in self.rules)

    def rule_of(self, role: Role) -> Rule:
        """Returns the (first) rule of a role."""
        return next(rule for rule in self.rules if rule.role is role)

    def is_ignored(self, name: str) -> bool:
        """Returns whether a tensor belongs to another part of the model, and is left out."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def is_computed(self, name: str) -> bool:
        """Returns whether a tensor is a buffer that a model computes itself."""
        return any(re.fullmatch(pattern, name) for pattern in self.computed)

    def foreign_layer(self, name: str) -> int | None:
        """Returns the layer of a tensor that no rule knows (multi-token prediction has its own)."""
        match = expression(self.layer_prefix).match(self.plain_name(name))
        return None if match is None else int(match["layer"])

    def source_name(self, role: Role, layer: int | None) -> str:
        """Returns the checkpoint's name of the first tensor with this role, or of its whole."""
        part = self._parts.get(role)
        whole = role if part is None else part.of
        return self.rule_of(whole).pattern.format(layer=layer, expert=0)

    def gguf_name(self, role: Role, layer: int | None) -> str:
        """Returns llama.cpp's name of the tensor with this role, for roles once per layer."""
        part = self._parts.get(role)
        name = self.rule_of(role).gguf if part is None else part.name
        assert name is not None, f"{self.model_type}: {role} has no name in llama.cpp"
        return name.format(layer=layer)

    def for_gguf(self) -> Gguf:
        """Returns how llama.cpp has the architecture.

        Raises:
            TargetError: if it does not.
        """
        if self.gguf is None:
            raise TargetError(f"gguf: {self.model_type}: {self.no_gguf}; use target safetensors")
        return self.gguf

    # -- a config

    def text_config(self, config: Config) -> Config:
        """Returns the language model's config, which may lie inside that of a larger model."""
        inner = config.get(self.text_key) if self.text_key else None
        if isinstance(inner, Mapping):
            config = {**{key: config[key] for key in SHARED_KEYS if key in config}, **inner}
        return self.completed(config)

    def settings(self, config: Config) -> tuple[str, Config]:
        """Returns what transformers builds the model from.

        Returns:
            Its name of the architecture, and the language model's settings.
        """
        inner = self.text_config(config)
        named = self.built_as or inner.get("model_type", self.model_type)
        return named, {
            k: plain_floats(v) for k, v in inner.items() if k not in ("model_type", "auto_map")
        }

    def n_experts_key(self, config: Config) -> str:
        """Returns the key under which `config` says how many routed experts a layer has.

        Raises:
            CheckpointError: if it has none of the known ones.
        """
        config = self.text_config(config)
        for key in self.keys.experts:
            if key in config:
                return key
        raise CheckpointError(
            f"config.json: no {' or '.join(self.keys.experts)} for model_type "
            f"{self.model_type!r}; a MoE checkpoint names its number of routed experts"
        )

    def n_experts(self, config: Config) -> int:
        """Returns how many routed experts a MoE layer has.

        Raises:
            CheckpointError: if `config` does not say.
        """
        return count(self.text_config(config), self.n_experts_key(config))

    def with_expert_width(self, config: Config, width: int) -> Config:
        """Returns a config of the same model with routed experts of another width."""
        inner = {**self.text_config(config), self.keys.expert_width: width}
        if self.text_key is None or self.text_key not in config:
            return inner
        return {**config, self.text_key: inner}

    def n_layers(self, config: Config) -> int:
        """Returns how many decoder layers there are, without those of multi-token prediction."""
        return int(self.text_config(config)[self.keys.layers])

    def n_nextn(self, config: Config) -> int | None:
        """Returns how many layers of multi-token prediction there are; None if not said."""
        value = self.text_config(config).get(self.keys.nextn)
        return None if value is None else int(value)

    def dimensions(self, config: Config) -> Dimensions:
        """Returns the sizes that tensors and computations have.

        Raises:
            CheckpointError: if `config` lacks or contradicts them.
        """
        config, keys = self.text_config(config), self.keys
        hidden, heads = count(config, keys.hidden), count(config, keys.heads)
        return Dimensions(
            hidden=hidden,
            vocabulary=count(config, keys.vocabulary),
            n_layers=count(config, keys.layers),
            heads=heads,
            kv_heads=optional(config, keys.kv_heads) or heads,
            head=optional(config, keys.head) or hidden // heads,
            experts=self.n_experts(config),
            expert_width=optional(config, keys.expert_width),
            dense_width=optional(config, keys.dense_width),
            n_shared=optional(config, keys.shared_experts) or 0,
            shared_width=optional(config, keys.shared_width),
            latent=None if keys.latent is None else _latent(config, keys.latent),
            linear=(
                _in_groups(config, keys.linear, LinearAttention, "value_heads", "key_heads")
                if keys.linear is not None
                else None
            ),
            state_space=(
                _in_groups(config, keys.state_space, StateSpace, "heads", "groups")
                if keys.state_space is not None
                else None
            ),
            expert_hidden=optional(config, keys.expert_hidden) if keys.expert_hidden else None,
            conv_kernel=None if keys.conv_kernel is None else count(config, keys.conv_kernel),
        )

    def router(self, config: Config) -> Router:
        """Returns how a token's experts are chosen and weighed.

        Raises:
            CheckpointError: if `config` contradicts itself.
        """
        config = self.text_config(config)
        scoring, normalizes = self.scoring(config)
        scaled = self.scales_gates and config.get(self.keys.scale) is not None
        groups, groups_used = self._router_groups(config)
        return Router(
            scoring=scoring,
            normalizes=normalizes,
            scale=number(config, self.keys.scale) if scaled else 1.0,
            groups=groups,
            groups_used=groups_used,
            ranks_groups=self.ranks_groups or config.get(self.keys.groups) is not None,
            selection_bias=self.selection_bias,
        )

    def experts_used(self, config: Config) -> int:
        """Returns how many routed experts a token passes through."""
        return int(self.text_config(config)[self.keys.experts_used])

    def _router_groups(self, config: Config) -> tuple[int, int]:
        """Groups of a router, and how many of them a token uses; null stands for no groups."""
        groups, used = self.router_groups
        groups = config.get(self.keys.groups, groups) or 1
        return (1, 1) if groups == 1 else (groups, config.get(self.keys.groups_used, used))

    def facts(self, config: Config, *, vocabulary: int, moe_layers: tuple[int, ...]) -> ModelFacts:
        """Returns what the description of a model in a runtime's file is made from.

        Args:
            config: of the checkpoint.
            vocabulary: rows of the embedding.
            moe_layers: layers that route.
        """
        return ModelFacts(
            config=self.text_config(config),
            keys=self.keys,
            dimensions=self.dimensions(config),
            router=self.router(config),
            vocabulary=vocabulary,
            moe_layers=moe_layers,
        )

    def empty_part(self, config: Config) -> str | None:
        """Returns the key that gives the model a part without values; None if no key does."""
        key = self.keys.shared_experts
        return key if self.text_config(config).get(key) == 0 else None

    # -- checks and shapes

    def check(self, config: Config, where: str) -> None:
        """Checks the counts and widths of a config.

        Args:
            config: of the checkpoint.
            where: the file, for messages.

        Raises:
            CheckpointError: if one is missing, or makes no sense.
        """
        config, keys = self.text_config(config), self.keys

        def check(key: str, least: int, most: int = MOST_WIDE) -> int:
            value = config.get(key)
            if type(value) is not int or not least <= value <= most:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}, needed a number from {least} to {most}"
                )
            return value

        used = check(keys.experts_used, 1)
        check(keys.hidden, 1)
        check(keys.vocabulary, 1)
        check(keys.layers, 1, MOST_LISTED)
        for key in self._width_keys():
            if config.get(key) is not None:
                check(key, 0)
        scale = config.get(keys.scale)
        if scale is not None and type(scale) not in (int, float):
            raise CheckpointError(f"{where}: {keys.scale} is {scale!r}, needed a number")
        n_experts = check(self.n_experts_key(config), 1, MOST_LISTED)
        if config.get(keys.nextn) is not None:
            check(keys.nextn, 0, MOST_LISTED)
        for key in sorted(self.never_null & set(config)):
            if config[key] is None:
                raise CheckpointError(
                    f"{where}: {key} is null, which transformers refuses; write its value "
                    "(or leave it out, where transformers' default is meant)"
                )
        if config.get(keys.groups) is not None:
            check(keys.groups, 1)
        groups, chosen = self._router_groups(config)
        if groups > 1 and keys.groups_used in config:
            check(keys.groups_used, 1)
        if used > n_experts or n_experts % groups or chosen > groups:
            raise CheckpointError(
                f"{where}: {used} of {n_experts} experts used, in {chosen} of {groups} groups; "
                "needed at most all, in equal groups"
            )

    def _width_keys(self) -> Iterator[str]:
        keys = self.keys
        yield from (keys.head, keys.heads, keys.kv_heads, keys.dense_width, keys.expert_width)
        yield from (keys.shared_experts, keys.shared_width, keys.groups_used)
        if keys.latent is not None:
            latent = keys.latent
            yield from (latent.rank, latent.q_rank, latent.nope, latent.rope, latent.value)
        for sizes in (keys.linear, keys.state_space):
            if sizes is not None:
                yield from asdict(sizes).values()
        for key in (keys.expert_hidden, keys.conv_kernel):
            if key is not None:
                yield key

    def shapes(self, config: Config, layer: int | None) -> dict[Rule, tuple[int, ...]]:
        """Returns the tensors that a config asks for in a layer, or outside of the layers.

        Args:
            config: of the checkpoint.
            layer: its number, also of a layer of multi-token prediction; None for outside.

        Returns:
            Shapes by rule, in the order of `rules`; of an expert's rule, for each expert.

        Raises:
            CheckpointError: if it lacks or contradicts what shapes are made of.
        """
        config = self.text_config(config)
        for key in self.bias_keys:
            if config.get(key):
                raise CheckpointError(
                    f"config.json: {key} is {config[key]!r}, but {self.model_type} is not "
                    "supported with biases; needed a checkpoint without them"
                )
        sizes = self.dimensions(config).sizes
        if layer is None:
            rules = [r for r in self.rules if not r.has_layer]
            rules = [r for r in rules if r.role is not Role.HEAD or not self.tied(config)]
        else:
            parts = self.layer_parts(config, layer)
            rules = [r for r in self.rules if r.has_layer and r.part in parts]
            sizes = {**sizes, **self.layer_sizes(config, layer)}
        return {rule: self._shape(config, sizes, rule.shape) for rule in rules}

    def shape(self, config: Config, rule: Rule) -> tuple[int, ...]:
        """Returns the shape that a config gives a tensor in layers without `layer_sizes`.

        Raises:
            CheckpointError: if it lacks or contradicts what shapes are made of.
        """
        config = self.text_config(config)
        return self._shape(config, self.dimensions(config).sizes, rule.shape)

    def gguf_shape(self, config: Config, rule: Rule) -> tuple[int, ...] | None:
        """Returns the shape that llama.cpp gives a tensor; None for the checkpoint's.

        Raises:
            CheckpointError: if `config` lacks or contradicts what shapes are made of.
        """
        if rule.gguf_shape is None:
            return None
        config = self.text_config(config)
        return self._shape(config, self.dimensions(config).sizes, rule.gguf_shape)

    def nextn_shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Returns the tensors that a layer of multi-token prediction has beside those of others.

        Returns:
            Shapes by the name within the layer.

        Raises:
            CheckpointError: if it lacks or contradicts what shapes are made of.
        """
        config = self.text_config(config)
        sizes = self.dimensions(config).sizes
        return {name: self._shape(config, sizes, axes) for name, axes in self.nextn}

    def _shape(self, config: Config, sizes: Mapping[str, int | None], axes: str) -> tuple[int, ...]:
        """The sizes of axes such as `experts x hidden`."""
        shape = []
        for axis in axes.split(" x "):
            size = sizes[axis]
            if size is None:  # only widths may be missing
                dense = axis == "dense_width"
                size = count(config, self.keys.dense_width if dense else self.keys.expert_width)
            shape.append(size)
        return tuple(shape)


def _latent(config: Config, keys: LatentKeys) -> LatentAttention:
    return LatentAttention(
        rank=count(config, keys.rank),
        q_rank=None if config.get(keys.q_rank) is None else count(config, keys.q_rank),
        nope=count(config, keys.nope),
        rope=count(config, keys.rope),
        value=count(config, keys.value),
        interleaved=bool(config.get(keys.interleaved, True)),
    )


_Sizes = TypeVar("_Sizes", LinearAttention, StateSpace)


def _in_groups(
    config: Config, keys: LinearKeys | StateSpaceKeys, kind: type[_Sizes], heads: str, groups: str
) -> _Sizes:
    """Sizes by the keys of the same names; as many heads in every group."""
    key_of = asdict(keys)
    sizes = {name: count(config, key) for name, key in key_of.items()}
    if sizes[heads] % sizes[groups]:
        raise CheckpointError(
            f"config.json: {key_of[heads]} is {sizes[heads]}, needed a multiple of "
            f"{key_of[groups]}, {sizes[groups]}"
        )
    return kind(**sizes)
