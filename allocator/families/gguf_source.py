"""The config of a model from the pairs of its GGUF file: the inverse of what a family writes.

In: the pairs of a file, and names and shapes of its tensors. Out: the family, and what is known of
the model, a `config.json` as a mapping among it. Invariant: the pairs that the family writes of
that config, and the tensors that it makes of it, are those of the file, so that nothing is guessed:
a pair that is missing, contradicts others or is not known is a `CheckpointError`.

A file says what is computed, and not whose model it is: of families with one architecture the first
whose pairs are the file's is taken, and they must agree on sizes and router.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from allocator.errors import AllocatorError, CheckpointError, first_line
from allocator.families.base import Family, Support
from allocator.families.config import MOST_LISTED, MOST_WIDE, Config
from allocator.families.gguf import GATE_UP, SIGMOID, SOFTMAX, Gguf, GgufFacts, ModelFacts
from allocator.families.registry import families
from allocator.families.roles import Role
from allocator.families.sizes import Router, Scoring

_LAYER = re.compile(r"^blk\.([0-9]{1,6})\.")
_WAY_OUT = "convert the original with llama.cpp's converter of today, or use the original"

_Pairs = Mapping[str, Any]


def _head(pairs: _Pairs) -> int:
    return int(pairs["embedding_length"] // pairs["attention.head_count"])


_ABSENT: Mapping[str, Callable[[_Pairs], Any]] = {
    "attention.head_count_kv": lambda pairs: pairs["attention.head_count"],
    "attention.key_length": _head,
    "attention.value_length": _head,
    "rope.dimension_count": lambda pairs: pairs.get("attention.key_length") or _head(pairs),
    "rope.freq_base": lambda pairs: 10000.0,
    "expert_feed_forward_length": lambda pairs: pairs["feed_forward_length"],
    "expert_shared_count": lambda pairs: 0,
    "expert_weights_scale": lambda pairs: 1.0,
    "expert_weights_norm": lambda pairs: False,
    "leading_dense_block_count": lambda pairs: 0,
}
"""What llama.cpp's loader takes where a file lacks a pair."""

_GATING: Mapping[str, int] = {Scoring.SOFTMAX: SOFTMAX, Scoring.SIGMOID: SIGMOID}
_NEUTRAL: Mapping[str, Callable[[Any, _Pairs], bool]] = {
    "attention.causal": lambda value, pairs: value is True,
    "attention.key_length": lambda value, pairs: value == _head(pairs),
    "attention.value_length": lambda value, pairs: value == _head(pairs),
    "attention.sliding_window": lambda value, pairs: value == 0,
    "expert_group_count": lambda value, pairs: value in (0, 1),
    "expert_group_used_count": lambda value, pairs: pairs.get("expert_group_count", 1) in (0, 1),
    "expert_shared_count": lambda value, pairs: value == 0,
    "expert_weights_scale": lambda value, pairs: value in (0, 1),
    "expert_weights_norm": lambda value, pairs: value is False,
    "leading_dense_block_count": lambda value, pairs: value == 0,
    "rope.scaling.type": lambda value, pairs: value == "none",
    "rope.scaling.factor": lambda value, pairs: value == 1 or _no_scaling(pairs),
    "rope.scaling.original_context_length": lambda value, pairs: _no_scaling(pairs),
    "rope.scaling.finetuned": lambda value, pairs: True,
    "rope.scaling.yarn_attn_factor": lambda value, pairs: value == 1,
    "rope.scaling.yarn_ext_factor": lambda value, pairs: value == 1,
}
"""Pairs that a family does not write, and whether a value changes nothing."""


def _no_scaling(pairs: _Pairs) -> bool:
    return bool(pairs.get("rope.scaling.type", "none") == "none")


def _no_values(name: str) -> tuple[float, ...]:
    raise CheckpointError(f"no values of {name}")


def family_of_gguf(
    pairs: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    read: Callable[[str], tuple[float, ...]] = _no_values,
) -> tuple[Family, ModelFacts]:
    """Returns the family of a GGUF file, and what its pairs say of the model.

    Args:
        pairs: of the whole file, by key.
        shapes: of its tensors, by llama.cpp's names.
        where: the file, for messages.
        read: returns the values of a tensor in F32 with one axis.

    Raises:
        CheckpointError: if no family is read from such a file, or its pairs do not say the config.
    """
    architecture = pairs.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{where}: no general.architecture; {_WAY_OUT}")
    candidates = [
        (family, family.gguf)
        for family in families(Support.READ)
        if family.gguf is not None and family.gguf.architecture == architecture
    ]
    if not candidates:
        ggufs = (family.gguf for family in families(Support.READ))
        known = dict.fromkeys(g.architecture for g in ggufs if g is not None and g.source)
        raise CheckpointError(
            f"{where}: architecture {architecture!r}, needed one of {', '.join(known)}"
        )
    if all(gguf.source is None for _, gguf in candidates):
        models = " and ".join(family.model_type for family, _ in candidates)
        raise CheckpointError(
            f"{where}: a GGUF file of {models} is not read as a checkpoint yet; name the directory "
            "of the original"
        )
    own = _plain(pairs, architecture, where)
    if not own.get("expert_count"):
        raise CheckpointError(
            f"{where}: {architecture} without {architecture}.expert_count; needed a "
            "Mixture-of-Experts model"
        )
    file = GgufFacts(architecture, own, _names(shapes, own["block_count"]), shapes, read)
    fits: list[tuple[Family, ModelFacts]] = []
    problems: list[list[str]] = []
    for family, gguf in candidates:
        if gguf.source is None:
            continue
        try:
            facts = _facts(family, gguf, file, shapes)
            differences = list(_differences(family, gguf, facts, file))
        except AllocatorError as error:
            differences = [str(error)]
        except (ArithmeticError, TypeError, ValueError) as error:  # of values of another kind
            differences = [f"its pairs make no sense ({first_line(error)}); {_WAY_OUT}"]
        if differences:
            problems.append(differences)
        else:
            fits.append((family, facts))
    if not fits:  # the nearest family's, and first of those with the file's router
        raise CheckpointError(f"{where}: {min(problems, key=_distance)[0]}")
    meanings = [(facts.router, facts.dimensions) for _, facts in fits]
    if any(meaning != meanings[0] for meaning in meanings):
        models = " and ".join(f.model_type for f, _ in fits)
        raise CheckpointError(
            f"{where}: {models} compute {architecture} otherwise, and the file does not say which "
            "it is; use the original"
        )
    return fits[0]


def _names(shapes: Mapping[str, tuple[int, ...]], n_layers: int) -> frozenset[str]:
    """Names of tensors with `{layer}`, without those of multi-token prediction."""
    found = ((_LAYER.match(name), name) for name in shapes)
    return frozenset(
        name if match is None else _LAYER.sub("blk.{layer}.", name)
        for match, name in found
        if match is None or int(match[1]) < n_layers
    )


_OTHER_GATING = re.compile(r"expert_gating_func is \d")


def _distance(differences: list[str]) -> tuple[bool, int]:
    return any(map(_OTHER_GATING.search, differences)), len(differences)


def _plain(pairs: Mapping[str, Any], architecture: str, where: str) -> dict[str, Any]:
    """The architecture's own pairs, without layers of multi-token prediction."""
    begin = f"{architecture}."
    own = {key.removeprefix(begin): value for key, value in pairs.items() if key.startswith(begin)}
    nextn = own.pop("nextn_predict_layers", 0)
    if "expert_feed_forward_length" in own:  # where no layer is dense, a file need not say how wide
        own.setdefault("feed_forward_length", own["expert_feed_forward_length"])
    needed = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length")
    for key in (*needed, "expert_used_count"):
        value, most = own.get(key), MOST_LISTED if key == "block_count" else MOST_WIDE
        listed = value if key in _BY_LAYER and isinstance(value, tuple) else ()
        if all(type(n) is int and 0 <= n <= most for n in listed) and any(listed):
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{where}: {begin}{key} is {value!r}, needed one number from 1 to {most}; "
                f"{_WAY_OUT}"
            )
    if type(nextn) is not int or not 0 <= nextn < own["block_count"]:
        raise CheckpointError(
            f"{where}: {begin}nextn_predict_layers is {nextn!r} of {own['block_count']} layers; "
            f"{_WAY_OUT}"
        )
    whole = own["block_count"]
    own["block_count"] -= nextn
    return {
        key: _value(
            value[:-nextn] if nextn and isinstance(value, tuple) and len(value) == whole else value
        )
        for key, value in own.items()
    }


_BY_LAYER = ("attention.head_count", "feed_forward_length")
"""Pairs that may be lists by layer."""


def _value(value: Any) -> Any:
    """A value as a config has it: of 32-bit floats the shortest decimal; of equal ones, one."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _facts(
    family: Family, gguf: Gguf, file: GgufFacts, shapes: Mapping[str, tuple[int, ...]]
) -> ModelFacts:
    """What is known of a file's model, if the model is of this family.

    Raises:
        CheckpointError: if the family refuses the config.
    """
    embedding, router = (str(family.rule_of(r).gguf) for r in (Role.EMBEDDING, Role.ROUTER))
    vocabulary = shapes.get(embedding, (0,))[0]
    layers = range(file["block_count"])
    moe_layers = tuple(n for n in layers if router.format(layer=n) in shapes)
    if not vocabulary or not moe_layers:
        lacks = router if vocabulary else embedding
        raise CheckpointError(
            f"no {lacks.format(layer=0)}; needed a whole Mixture-of-Experts model"
        )
    config = _config(family, gguf, file, vocabulary)
    family.check(config, "its pairs")
    return family.facts(config, vocabulary=vocabulary, moe_layers=moe_layers)


def _config(family: Family, gguf: Gguf, file: GgufFacts, vocabulary: int) -> Config:
    """The config of a file, if it is of this family."""
    keys, absent = family.keys, {**_ABSENT, **gguf.absent}

    def stored(key: str) -> Any:
        lacks = key not in file.pairs and key in absent
        return absent[key](file.pairs) if lacks else file[key]

    config = {
        "model_type": family.model_type,
        keys.experts[0]: file["expert_count"],
        keys.experts_used: file["expert_used_count"],
        keys.layers: file["block_count"],
        keys.hidden: file["embedding_length"],
        keys.vocabulary: vocabulary,
        keys.dense_width: file["feed_forward_length"],
        keys.heads: file["attention.head_count"],
        keys.context: file["context_length"],
        keys.norm_epsilon: stored("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.names,
    }
    if keys.nextn:
        config[keys.nextn] = 0
    if keys.expert_width != keys.dense_width:
        config[keys.expert_width] = file["expert_feed_forward_length"]
    if keys.latent is None:
        config[keys.kv_heads] = stored("attention.head_count_kv")
        config[keys.head] = stored("attention.key_length")
    else:
        latent, rotated = keys.latent, file["rope.dimension_count"]
        config |= {
            keys.kv_heads: config[keys.heads],
            latent.rank: file["attention.kv_lora_rank"],
            latent.q_rank: file.pairs.get("attention.q_lora_rank"),
            latent.nope: file["attention.key_length_mla"] - rotated,
            latent.rope: rotated,
            latent.value: file["attention.value_length_mla"],
        }
    assert gguf.source is not None
    own = {fixed.key: fixed.value for fixed in gguf.fixed} | dict(gguf.source(file))
    if "rope_parameters" not in own:
        config |= _rotation(file, divides_mscale=gguf.divides_mscale)
    return config | own


def _rotation(file: GgufFacts, *, divides_mscale: bool) -> dict[str, Any]:
    """The keys on rotation of families that do not tell layers apart."""
    rope = file.rope()
    base = {"rope_theta": rope.pop("rope_theta")}
    if rope["rope_type"] == "default":
        return base
    if divides_mscale and "rope.scaling.yarn_log_multiplier" in file.pairs:
        # a tenth is stored (TAG_DEEPSEEK2_YARN_LOG_MUL_FIX)
        scale = round(10 * file["rope.scaling.yarn_log_multiplier"], 6)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return base | {"rope_scaling": rope}


def _differences(family: Family, gguf: Gguf, facts: ModelFacts, file: GgufFacts) -> Iterator[str]:
    """Yields what is otherwise in a file than in one that the family writes of its config.

    Raises:
        AllocatorError: if the family refuses the config.
    """
    architecture = gguf.architecture
    stored = {"vocab_size": facts.vocabulary, **file.pairs}
    pairs = gguf.pairs(
        facts, n_experts=file["expert_count"], experts_used=file["expert_used_count"]
    )
    wanted = {key.removeprefix(f"{architecture}."): value for key, value in pairs}
    made = gguf.made(facts)
    known = {*(rule.gguf for rule in family.rules), *(part.name for part in gguf.parts)}
    known |= {tensor.name for tensor in made}
    if Role.EXPERT_GATE in family.roles:
        known.add(GATE_UP)
    for name in sorted(file.names - known):
        yield f"{name.format(layer='N')} is no tensor of {family.model_type}; use the original"
    absent = {**_ABSENT, **gguf.absent}
    for key, value in wanted.items():
        if key in gguf.unread:
            continue
        if key not in stored and key not in absent:
            yield f"no {architecture}.{key}, which says how the model is computed; {_WAY_OUT}"
            continue
        own = stored[key] if key in stored else absent[key](stored)
        if not _equal(own, value):
            verb = "is" if key in stored else "is missing, which llama.cpp takes for"
            yield (
                f"{architecture}.{key} {verb} {own!r}, but {value!r} in a {family.model_type} of "
                f"its other pairs; {_WAY_OUT}"
            )
    for tensor in made:
        if file.read(tensor.name) != tuple(np.array(tensor.values, np.float32).tolist()):
            yield f"{tensor.name} has other values than the pairs mean; {_WAY_OUT}"
    for key in sorted(stored.keys() - wanted.keys() - gguf.unread):
        if not _is_neutral(key, stored[key], file.pairs, facts.router):
            yield (
                f"{architecture}.{key} is {stored[key]!r}, with which {family.model_type} is not "
                "known to be computed; use the original"
            )


def _is_neutral(key: str, value: Any, pairs: _Pairs, router: Router) -> bool:
    """Whether a pair that a family does not write changes nothing."""
    if key == "expert_gating_func":
        return bool(_GATING.get(router.scoring) == value)
    return key in _NEUTRAL and _NEUTRAL[key](value, pairs)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same in 32 bits."""
    one, other = (_value(value) for value in (one, other))
    if isinstance(one, bool | str | tuple) or isinstance(other, bool | str | tuple):
        return type(one) is type(other) and bool(one == other)
    return isinstance(one, int | float) and bool(np.float32(one) == np.float32(other))
