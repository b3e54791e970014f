"""Released tokenizers out of pinned packages, files that hold nothing else, and strings to cut."""

import json
import random
import shutil
import unicodedata
from functools import cache
from types import SimpleNamespace

import pytest
import tokenizers

from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.decision.allocation import Allocation
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.targets import GGUF
from allocator.targets.gguf.tokenizer import tokenizer
from allocator.testing.tensors import ZeroTensors


@pytest.fixture(scope="session")
def released(package):
    """`released(name)`: the directory with a released tokenizer.json and its config."""

    def get(name):
        (found,) = package(name).rglob("tokenizer.json")
        return found.parent

    return get


# -- a file with a tokenizer and weights of nothing

SIZES = {
    "max_position_embeddings": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "moe_intermediate_size": 32, "intermediate_size": 64, "rope_theta": 1e4,
    "rms_norm_eps": 1e-6, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_file(make, tmp_path_factory):
    """`tokenizer_file(folder)`: a GGUF of zeros with the tokenizer of `folder`."""

    def write(source):
        folder = tmp_path_factory.mktemp("tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (source / name).exists():
                shutil.copy(source / name, folder)
        raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        n = 1 + max(*raw["model"]["vocab"].values(), *(a["id"] for a in raw["added_tokens"]))
        tensors = make.tensors(vocab_size=n, num_hidden_layers=1)
        make.zeros(folder, tensors=tensors, vocab_size=n, **SIZES)
        layout = GGUF.layout(read_inventory(folder))
        chosen = Allocation.of(
            target="gguf",
            retained={0: (0, 1, 2, 3)},
            formats=dict.fromkeys(layout.groups, "Q8_0"),
            experts_used=2,
        )
        write_gguf(folder / "model.gguf", layout, chosen, ZeroTensors(layout, chosen))
        return SimpleNamespace(path=folder / "model.gguf", inventory=layout.inventory)

    return write


# -- strings

_CODE = (
    "def f(x, *, y=0x1F):\n    return {'a': [x[0], ~y], \"b\": x ** 2}  # note\n",
    "for (int i = 0; i < n; ++i) {\r\n\tsum += a[i] * 1.5e-3f;\r\n}\r\n",
    '<div class="a b">&nbsp;<!-- c --></div>\n\n\n',
    "SELECT * FROM t WHERE a <> 'O''Neil' AND b >= 10 LIMIT 5;",
    "$x = <<<EOT\n  \\frac{a_1}{b^2} $$\\alpha$$\nEOT;",
    "https://example.org/a%20b?q=1&r=%F0%9F%98%80#top user.name+tag@example.co.uk",
    '```python\n>>> print(f"{x!r:>10}")\n```\n| a | b |\n|---|:-:|\n',
    "// \\u00e9 \\x41 ;; !!== ->=> ::: ... ---- ____ ==== ####\n",
)
_SPACES = (
    " ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\n\n", " \n", "\n ", "\v", "\f", "\x85",
    "\xa0", "\u1680", "\u2003", "\u2009", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
)  # fmt: skip
_EMOJI = (
    "🙂", "👍🏽", "👨‍👩‍👧‍👦", "❤️", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "☎︎", "🧑🏿‍🚀", "©", "™️", "🫠", "🦾", "⛹🏻‍♀️",
)  # fmt: skip
_CONTRACTIONS = (
    "I'm", "we'RE", "he'S", "they'Ll", "don't", "I'd", "y'all've", "'tis", "O'Neil", "it’s",
    "'ſ", "x'Dx", "''s", "'s's",
)  # fmt: skip


@cache
def _by_script():
    """Assigned characters by the first word of their name, and those of every general category."""
    scripts, kinds = {}, {}
    for number in range(0x110000):
        character = chr(number)
        kind = unicodedata.category(character)
        if kind == "Cs":
            continue
        kinds.setdefault(kind, []).append(character)
        if kind[0] in "LMN":
            script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
            scripts.setdefault(script, []).append(character)
    return scripts, kinds


def make_strings(added=(), *, n=2000, seed=0):
    """Strings of all scripts and kinds of characters; `added` are texts to put in raw."""
    rng = random.Random(seed)
    scripts, kinds = _by_script()
    names = sorted(scripts)
    numbers, control, private = (
        [c for kind in of for c in kinds[kind]]
        for of in (("Nd", "No", "Nl"), ("Cc", "Cf"), ("Co", "Cn"))
    )
    signs = [c for kind in ("Po", "Ps", "Pd", "Sm", "So") for c in kinds[kind]]

    def some(characters, most):
        return "".join(rng.choices(characters, k=rng.randint(1, most)))

    def word(name=None):
        text = some(scripts[name or rng.choice(names)], 9)
        return rng.choice((text, text.title(), f" {text}", text.upper()))

    def marks():
        base = rng.choice((*"aeinouAEO", "क", "ب", "ั", " ", "1", "."))
        return base + some(kinds["Mn"], 4)

    makers = (
        word,
        lambda: some("0123456789", 9) + rng.choice((".", ",", "", "e-", "%")),
        lambda: some(numbers, 6),
        lambda: "".join(rng.choices(_SPACES, k=rng.randint(1, 6))),
        lambda: rng.choice(_SPACES) * rng.randint(1, 40),
        lambda: rng.choice(_CODE)[rng.randint(0, 12) :],
        lambda: "".join(rng.choices(_EMOJI, k=rng.randint(1, 3))),
        marks,
        lambda: some(control, 5),
        lambda: some(signs, 7),
        lambda: some(private, 3),
        lambda: rng.choice(_CONTRACTIONS),
        lambda: rng.choice(kinds[rng.choice(list(kinds))]) * rng.randint(1, 200),
        lambda: some(scripts["LATIN"][:52], 12),
        lambda: some([*"漢字かなカナ한글，。！"], 12),
        lambda: rng.choice(added) if added else "",
    )
    found = [word(name) + some(_SPACES, 1) + word(name) for name in names]
    while len(found) < n:
        found.append("".join(rng.choice(makers)() for _ in range(rng.randint(1, 8))))
    return found[:n]


@pytest.fixture(scope="session")
def cut_otherwise():
    """`cut_otherwise(file, chosen)`: strings that llama.cpp cuts otherwise than the library."""

    def compare(file, chosen):
        source = read_tokenizer(file.inventory)
        library = tokenizers.Tokenizer.from_str(source.text)
        with LlamaCpp(file.path, context=32, threads=1) as runtime:
            return [
                text
                for text in chosen
                if runtime.tokenize(text, markup=True)
                != [*source.prefix, *library.encode(text, add_special_tokens=False).ids]
            ]

    return compare


@pytest.fixture(scope="session")
def taken_over():
    """`taken_over(file, chosen)`: the tokenizer's pairs read from the file and written again.

    Text is cut by them as by the tokenizer that they were made of.
    """

    def compare(file, chosen):
        inventory = read_inventory(file.path)
        assert tokenizer(inventory) == tokenizer(file.inventory)
        made, source = read_tokenizer(inventory), read_tokenizer(file.inventory)
        assert made.prefix == source.prefix
        ignores = [bool(t.raw["model"].get("ignore_merges")) for t in (made, source)]
        assert ignores[0] == ignores[1]
        ids = [
            [e.ids for e in library.encode_batch(chosen, add_special_tokens=False)]
            for library in (tokenizers.Tokenizer.from_str(t.text) for t in (made, source))
        ]
        return [text for text, a, b in zip(chosen, *ids, strict=True) if a != b]

    return compare


@pytest.fixture(scope="session")
def strings():
    """`make_strings`."""
    return make_strings
