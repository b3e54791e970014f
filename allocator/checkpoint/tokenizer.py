"""The tokenizer of a checkpoint, from any of the files that models are released with.

In: the directory of a checkpoint and its `config.json`. Out: a `Tokenizer`: `tokenizer.json` as the
`tokenizers` library reads it, the ids of its special tokens, and what it puts around a text.
Invariant: a written file and calibration text go by this one reading; no code of a checkpoint is
executed, and a conversion that loses tokens is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from allocator.checkpoint.gguf import tokenizer as gguf_tokenizer
from allocator.checkpoint.inventory import GgufModel, Inventory
from allocator.checkpoint.safetensors import read_json
from allocator.errors import CheckpointError, first_line
from allocator.families.config import token_ids

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model*", "tiktoken.model", "*.tiktoken",
    "tekken.json", "tokenization*.py", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip
"""Patterns of the files that a runtime needs in addition to weights and `config.json`."""
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_PAIR = ("vocab.json", "merges.txt")
_WATCHED = (".", "additional_chat_templates", *(name for name in CARRIED if "*" not in name))
_FOREIGN = ("tokenizer.model*", "tiktoken.model", "*.tiktoken", "tekken.json", "vocab.txt", *_PAIR)
_WAY_OUT = (
    'put the tokenizer.json of this model there, or tokenizer = "none" into study.toml for a gguf '
    "that reads token ids alone"
)


@dataclass(frozen=True)
class Added:
    """A token that is cut from a text before anything else.

    Attributes:
        number: its id.
        content: its text.
        special: whether decoding leaves it out.
    """

    number: int
    content: str
    special: bool


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A checkpoint's tokenizer; the same object for the same files.

    Attributes:
        path: the checkpoint's directory.
        text: of `tokenizer.json`.
        raw: the same, decoded.
        config: `tokenizer_config.json`; empty if there is none.
        config_ids: ids by role, as config.json has them.
        converted: whether the checkpoint has no `tokenizer.json`, and it was made of other files.
    """

    path: Path
    text: str
    raw: Mapping[str, Any]
    config: Mapping[str, Any]
    config_ids: Mapping[str, int | None]
    converted: bool = False

    @cached_property
    def added(self) -> dict[int, Added]:
        """Tokens outside the merges, by id; those that the config alone names too."""
        tokens = [(int(a["id"]), a) for a in self.raw.get("added_tokens") or ()]
        known = {number for number, _ in tokens}
        named = dict(self.config.get("added_tokens_decoder") or {}).items()
        tokens += [(int(n), a) for n, a in named if int(n) not in known]
        return {n: Added(n, str(a["content"]), bool(a.get("special"))) for n, a in tokens}

    @cached_property
    def texts(self) -> dict[int, str]:
        """Text of every token by id."""
        vocabulary = {int(n): str(text) for text, n in self.raw["model"]["vocab"].items()}
        return vocabulary | {n: a.content for n, a in self.added.items()}

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids by role of `ROLES`: the tokenizer's own, else config.json's."""
        ids = {text: number for number, text in self.texts.items()}
        by_role = {}
        for role in ROLES:
            text = self.config.get(f"{role}_token")
            text = text.get("content") if isinstance(text, dict) else text
            number = ids.get(text) if isinstance(text, str) else None
            number = self.config_ids.get(role) if number is None else number
            if number is not None:
                by_role[role] = number
        return by_role

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Added tokens that end a reply: eos, then those that generation_config.json lists."""
        file = self.path / "generation_config.json"
        listed = (read_json(file) if file.is_file() else {}).get("eos_token_id")
        ids = [self.special_ids.get("eos"), *(listed if isinstance(listed, list) else [])]
        return tuple(dict.fromkeys(n for n in ids if type(n) is int and n in self.added))

    def adds(self, role: str) -> bool:
        """Returns whether it puts bos before, or eos after, a text by itself."""
        if role not in self.special_ids:
            return False
        if (flag := self.config.get(f"add_{role}_token")) is not None:
            return bool(flag)
        post = self.raw.get("post_processor") or {}
        steps = post.get("processors", [post])
        single: list[dict[str, Any]] = next(
            (s["single"] for s in steps if s.get("type") == "TemplateProcessing"), []
        )
        edge = (single[0] if role == "bos" else single[-1]) if single else {}
        return bool(
            edge.get("SpecialToken", {}).get("id") == self.texts.get(self.special_ids[role], 0)
        )

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that it puts before a text: bos, or nothing."""
        return (self.special_ids["bos"],) if self.adds("bos") else ()

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """By name, `default` first; files of their own before `tokenizer_config.json`'s.

        That order is transformers'; `chat_template.json` is what older versions wrote.
        """
        plain = self.path / "chat_template.jinja"
        named = sorted((self.path / "additional_chat_templates").glob("*.jinja"))
        if plain.is_file() or named:
            files = {"default": plain} if plain.is_file() else {}
            files |= {f.stem: f for f in named}
            return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        stored = self.config.get("chat_template")
        if stored is None and (self.path / "chat_template.json").is_file():
            stored = read_json(self.path / "chat_template.json")["chat_template"]
        if isinstance(stored, str):
            stored = {"default": stored} if stored else {}
        elif isinstance(stored, list):
            stored = {choice["name"]: choice["template"] for choice in stored}
        templates = dict(stored or {})
        if not all(isinstance(x, str) for pair in templates.items() for x in pair):
            raise ValueError("chat templates that are no text")
        return {n: templates[n] for n in sorted(templates, key=lambda n: (n != "default", n))}


def carried_files(path: Path) -> list[Path]:
    """Lists the files that a runtime needs beside the weights, relative to the checkpoint.

    There are none beside a GGUF model, whatever lies in its directory.
    """
    if not path.is_dir():
        return []
    paths = {file for pattern in CARRIED for file in path.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(path) for file in paths)


def read_tokenizer(inventory: Inventory) -> Tokenizer | None:
    """Reads the tokenizer of a checkpoint, once per version; None if it has no file of one.

    A checkpoint with `vocab.json` and `merges.txt` alone is converted by transformers, offline and
    without code of the checkpoint: the class that its config names says how text is cut. That of a
    GGUF model cuts text as llama.cpp does.

    Raises:
        CheckpointError: if its files are damaged, or are of a kind that is not converted.
    """
    if inventory.gguf is not None:
        return _of_gguf(inventory.gguf)
    path = inventory.path
    versions = tuple(_version(path / name) for name in _WATCHED)
    config = inventory.family.text_config(inventory.config)
    ids = tuple(token_ids(config, ROLES).items())
    return _read(path, ids, versions)


def has_tokenizer(inventory: Inventory) -> bool:
    """Returns whether a checkpoint has files of a tokenizer, or pairs of one; neither is read."""
    if inventory.gguf is not None:
        return gguf_tokenizer.has_tokenizer(inventory.gguf.values)
    files = carried_files(inventory.path)
    return any(file.name != "generation_config.json" for file in files)


@lru_cache(maxsize=8)
def _of_gguf(model: GgufModel) -> Tokenizer | None:
    if not gguf_tokenizer.has_tokenizer(model.values):
        return None
    raw, config = gguf_tokenizer.tokenizer_files(model.values, str(model.path))
    return Tokenizer(model.path, json.dumps(raw), raw, config, {}, converted=True)


@lru_cache(maxsize=8)
def _read(
    path: Path,
    config_ids: tuple[tuple[str, int | None], ...],
    versions: tuple[tuple[int, int], ...],
) -> Tokenizer | None:
    config = {}
    if (path / "tokenizer_config.json").is_file():
        config = read_json(path / "tokenizer_config.json")
    file = path / "tokenizer.json"
    foreign = sorted(f.name for pattern in _FOREIGN for f in path.glob(pattern))
    if file.is_file():
        raw = read_json(file)
        text = file.read_text(encoding="utf-8")
        converted = False
    elif set(_PAIR) <= set(foreign):
        text, converted = _converted(path), True
        raw = json.loads(text)
    elif foreign or config:
        what = " and ".join(foreign) or "tokenizer_config.json"
        raise CheckpointError(
            f"{path}: a tokenizer in {what}, needed tokenizer.json or both of {' and '.join(_PAIR)}"
            f" (nothing else says how text is cut without code of its own); {_WAY_OUT}"
        )
    else:
        return None
    if not isinstance(raw, dict) or not isinstance(config, dict):
        raise CheckpointError(f"{file}: needed an object; fetch the file again")
    return Tokenizer(path, text, raw, config, dict(config_ids), converted)


def _version(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def missing_tokenizer(path: Path) -> CheckpointError:
    """Returns the error of a checkpoint without a tokenizer, where one is needed."""
    return CheckpointError(f"{path}: no tokenizer.json, nor any other tokenizer; {_WAY_OUT}")


def _converted(path: Path) -> str:
    """`tokenizer.json` of a checkpoint with `vocab.json` and `merges.txt`."""
    from transformers import AutoTokenizer

    vocabulary = read_json(path / "vocab.json")
    try:
        made = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        text = str(made.backend_tokenizer.to_str())
    except Exception as error:  # whatever a tokenizer's class raises
        raise CheckpointError(
            f"{path}: transformers makes no tokenizer.json of vocab.json and merges.txt "
            f"({first_line(error)}); {_WAY_OUT}"
        ) from None
    raw = json.loads(text)
    # transformers makes an empty tokenizer, without a word, where its class asks for other files
    wanted = vocabulary | _added_in_files(path)
    ids = raw["model"]["vocab"] | {a["content"]: a["id"] for a in raw["added_tokens"]}
    lines = [x for x in (path / "merges.txt").read_text(encoding="utf-8").split("\n") if x.strip()]
    n_merges = len(lines) - lines[0].startswith("#version") if lines else 0
    lost = [text for text, number in wanted.items() if ids.get(text) != number]
    if lost or n_merges != len(raw["model"]["merges"]):
        raise CheckpointError(
            f"{path}: transformers makes a tokenizer.json of vocab.json and merges.txt that lacks "
            f"{len(lost)} of {len(wanted)} tokens or some of {n_merges} merges; {_WAY_OUT}"
        )
    return text


def _added_in_files(path: Path) -> dict[str, int]:
    """Ids by text of the tokens that the files name beside `vocab.json`."""
    file, config = path / "added_tokens.json", path / "tokenizer_config.json"
    ids = dict(read_json(file)) if file.is_file() else {}
    named = (read_json(config) if config.is_file() else {}).get("added_tokens_decoder") or {}
    return ids | {a["content"]: int(number) for number, a in named.items()}
