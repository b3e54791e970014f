"""Tokenizers of SentencePiece's form: llama.cpp cuts as the tokenizers library."""

import json

import pytest
import tokenizers

from allocator.checkpoint.reading import read_inventory
from allocator.errors import CheckpointError, TargetError
from allocator.targets.gguf.tokenizer import tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
FORMS = {  # normalizer and pre-tokenizer as released files have them
    "llama": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "mistral": (None, {**METASPACE, "prepend_scheme": "first"}),
    "gemma": (
        REPLACE,
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
         "invert": False},
    ),
}  # fmt: skip


def with_merges(texts, order):
    """A tokenizer.json as transformers makes one of SentencePiece's: all pairs of each token."""
    vocabulary = {text: n for n, text in enumerate([*SPECIAL, *BYTES, *texts, *order])}
    merges = []
    for union in order:
        cuts = [(union[:at], union[at:]) for at in range(1, len(union))]
        merges += [list(p) for p in cuts if all(part in vocabulary for part in p)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": n, "content": text, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for n, text in enumerate(SPECIAL)
        ],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>",
                  "fuse_unk": True, "byte_fallback": True},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tokenizer_file, tmp_path_factory):
    """`trained(name, chosen)`: a GGUF with a tokenizer of that form, trained on the strings."""

    def make(name, chosen, **config):
        chosen = [text.replace("\0", "") for text in chosen]  # as a token, llama.cpp reads none
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Metaspace(split=True),
             tokenizers.pre_tokenizers.Split("\n", "isolated")]
        )  # fmt: skip
        common = sorted({c for c in "".join(chosen) if c < "\u3000"} | {"▁"} - {" "})
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=6000, min_frequency=1, show_progress=False, initial_alphabet=common,
            limit_alphabet=len(common),
        )  # fmt: skip
        library.train_from_iterator([*chosen, *("▁" * 8, "\n" * 5)], trainer)
        learnt = json.loads(library.to_str())["model"]["vocab"]
        order = [t for t in sorted(learnt, key=learnt.get) if len(t) > 1]
        raw = with_merges([t for t in learnt if len(t) == 1], [*order, "▁▁", "▁▁▁", "\n\n"])
        raw["normalizer"], raw["pre_tokenizer"] = FORMS[name]
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_text(json.dumps(raw))
        config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return tokenizer_file(folder)

    return make


def unexplained(name, texts):
    """Those without a known reason.

    llama.cpp puts a space before every text after an added token, and before one with a space of
    its own; `Metaspace` puts it before the first text alone, and not before a space.
    """
    if name != "mistral":
        return texts
    return [t for t in texts if t[0] not in " ▁" and not any(a in t for a in SPECIAL)]


@pytest.mark.parametrize("name", FORMS)
def test_a_forms_strings(name, trained, strings, cut_otherwise, taken_over):
    chosen = [*strings(SPECIAL, n=400), *(" " * n + "a" for n in range(20)), "", "<s>x</s> y"]
    file = trained(name, strings(n=400))
    fields = {f.key: f.value for f in tokenizer(file.inventory)}
    model, prefix = ("gemma4", False) if name == "gemma" else ("llama", True)
    assert fields["tokenizer.ggml.model"] == model
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert unexplained(name, cut_otherwise(file, chosen)) == []
    if name == "gemma":
        with pytest.raises(CheckpointError, match="'gemma4', needed gpt2 or llama"):
            taken_over(file, chosen)
    else:
        assert unexplained(name, taken_over(file, chosen)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_forms_2000_strings(name, trained, strings, cut_otherwise):
    chosen = strings(SPECIAL)
    bad = cut_otherwise(trained(name, strings()), chosen)
    assert unexplained(name, bad) == []
    assert bool(bad) is (name == "mistral")


def test_a_tokenizer_that_scores_cannot_say_is_refused(trained, strings):
    """Each change makes llama.cpp merge otherwise, seen in what the library cuts."""
    file = trained("llama", strings(n=100))
    path = file.inventory.path / "tokenizer.json"
    raw = json.loads(path.read_text())

    def refused(change, match):
        changed = json.loads(json.dumps(raw))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(TargetError, match=match) as caught:
            tokenizer(read_inventory(file.inventory.path))
        assert "\n" not in str(caught.value)

    merges = raw["model"]["merges"]
    refused(lambda r: r["model"]["merges"].append(merges[0]), "do not follow one another")
    refused(lambda r: r["model"]["merges"].pop(), "is no merge of")
    refused(lambda r: r["model"]["vocab"].pop("<0x7F>"), "without token <0x7F>")
    refused(lambda r: r["model"]["vocab"].update({"a\0": 259}), "NUL")
    refused(lambda r: r["model"].update(ignore_merges=True), "ignore_merges")
    refused(lambda r: r.update(normalizer={"type": "NFKC"}), "byte fallback with")
    refused(lambda r: r.update(normalizer=None, pre_tokenizer={**METASPACE, "split": True}), "with")
    refused(lambda r: r["model"].update(type="Unigram"), "Unigram")


def test_merges_of_line_ends_and_letters_are_refused(trained, strings):
    file = trained("gemma", strings(n=100))
    path = file.inventory.path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["a\n"] = 259
    raw["model"]["merges"].append(["a", "\n"])
    path.write_text(json.dumps(raw))
    with pytest.raises(TargetError, match="line ends"):
        tokenizer(read_inventory(file.inventory.path))


def test_types_and_scores(trained, strings):
    """Bytes and the unknown token have types of their own; earlier merges have higher scores."""
    file = trained("llama", strings(n=100))
    raw = json.loads((file.inventory.path / "tokenizer.json").read_text())
    fields = {f.key.removeprefix("tokenizer.ggml."): f.value for f in tokenizer(file.inventory)}
    assert "merges" not in fields
    assert fields["token_type"][:4] == (2, 3, 3, 6)  # unknown, control, control, byte
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)
    assert fields["add_bos_token"] is True
    score = dict(zip(fields["tokens"], fields["scores"], strict=True))
    made = list(dict.fromkeys("".join(pair) for pair in raw["model"]["merges"]))
    assert [score[union] for union in made] == [-float(n) for n in range(len(made))]
