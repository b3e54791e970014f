"""Tokenizers in other files than tokenizer.json: converted, or refused before measuring."""

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from allocator import api
from allocator.app.study_folder import StudyFolder
from allocator.checkpoint.reading import read_inventory
from allocator.checkpoint.tokenizer import read_tokenizer
from allocator.cli import main
from allocator.errors import CheckpointError, TargetError
from allocator.targets.gguf.tokenizer import check_tokenizer, tokenizer

REFERENCE = Path(__file__).parents[2] / "studies/reference/model"
BYTES = list(bytes_to_unicode().values())
MERGES = ["t h", "th e", "Ġ the", "i n", "in g", "1 2"]
VOCABULARY = {text: n for n, text in enumerate([*BYTES, *(m.replace(" ", "") for m in MERGES)])}
THINK = len(VOCABULARY)
CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": {
        str(THINK): {"content": "<think>", "special": False},
        str(THINK + 1): {"content": "<|end|>", "special": True},
    },
    "eos_token": "<|end|>",
    "pad_token": "<|end|>",
    "unk_token": None,
}
TEXTS = ["the thing is 1234", "  nothing\n\n\nin  it's <think>12</think>", "漢字 🙂 naïve\t\x00"]


@pytest.fixture
def checkpoint(formula, tmp_path):
    """`checkpoint(**files)`: zeros of the Qwen3-MoE family (512 tokens), with these files."""

    def make(family="qwen3_moe", **files):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        source = formula.checkpoint
        (folder / "model.safetensors").symlink_to(source / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
        for name, content in files.items():
            name = name.replace("__", ".")
            data = content if isinstance(content, bytes | str) else json.dumps(content)
            (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return folder

    return make


def pair(**others):
    return {
        "vocab__json": VOCABULARY,
        "merges__txt": "#version: 0.2\n" + "".join(f"{m}\n" for m in MERGES),
        **others,
    }


@pytest.fixture
def formula(tmp_path_factory, make):
    """Zeros with an embedding that holds the vocabulary."""
    folder = tmp_path_factory.mktemp("zeros")
    make.zeros(
        folder, tensors=make.tensors(vocab_size=512), vocab_size=512,
        max_position_embeddings=128, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        moe_intermediate_size=32, intermediate_size=64, rope_theta=1e4, rms_norm_eps=1e-6,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    return SimpleNamespace(checkpoint=folder)


def test_vocabulary_and_merges_are_converted_as_transformers_reads_them(checkpoint):
    folder = checkpoint(**pair(tokenizer_config__json=CONFIG))
    inventory = read_inventory(folder)
    found = read_tokenizer(inventory)
    assert found is read_tokenizer(inventory)
    assert found.converted
    library, theirs = (
        tokenizers.Tokenizer.from_str(found.text),
        AutoTokenizer.from_pretrained(folder),
    )
    for text in TEXTS:
        assert library.encode(text).ids == theirs(text)["input_ids"]
    assert THINK in library.encode(TEXTS[1]).ids
    fields = {f.key: f.value for f in tokenizer(inventory)}
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.merges"] == tuple(MERGES)
    assert fields["tokenizer.ggml.tokens"][: len(VOCABULARY)] == tuple(VOCABULARY)
    assert fields["tokenizer.ggml.token_type"][THINK : THINK + 3] == (4, 3, 5)
    assert fields["tokenizer.ggml.eos_token_id"] == THINK + 1
    assert fields["tokenizer.ggml.add_bos_token"] is False
    check_tokenizer(inventory)


TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
REMOTE = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
FORMS = {
    "tiktoken": {"tiktoken__model": TIKTOKEN, "tokenizer_config__json": REMOTE,
                 "tokenization_own__py": "raise SystemExit('it ran')\n"},
    "tiktoken by another name": {"qwen__tiktoken": TIKTOKEN},
    "sentencepiece": {"tokenizer__model": b"\n\x0e\n\x05<unk>", "tokenizer_config__json": {}},
    "a config alone": {"tokenizer_config__json": CONFIG},
    "half of the pair": {"vocab__json": VOCABULARY},
    "wordpiece": {"vocab__txt": "[PAD]\nthe\n"},
    "the pair of a class with code": pair(
        tokenizer_config__json=REMOTE, tokenization_own__py="raise SystemExit('it ran')\n"
    ),
    "the pair of a class that reads other files": pair(
        tokenizer_config__json={"tokenizer_class": "LlamaTokenizer"}
    ),
    "a merge of unknown tokens": pair(merges__txt="#version: 0.2\nt h\nq z\n"),
    "a vocabulary that is no object": pair(vocab__json=[1, 2]),
    "added tokens that are lost": pair(added_tokens__json={"<lost>": 300}),
    "added tokens that the config puts elsewhere": pair(
        tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer",
                                "added_tokens_decoder": {"400": {"content": "<far>"}}}
    ),
    "added tokens of the config that are no tokens": pair(
        tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer",
                                "added_tokens_decoder": {"400": "<far>"}}
    ),
    "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_converted_is_refused_unless_none_is_wanted(
    checkpoint, write_study, tmp_path, form, capsys
):
    folder = checkpoint(**FORMS[form])
    study = write_study(tmp_path / "study", REFERENCE)
    text = (study / "study.toml").read_text().replace(str(REFERENCE), str(folder))
    assert 'tokenizer = "none"' in text
    (study / "study.toml").write_text(text)
    assert StudyFolder(study, cache=tmp_path / "cache").layout.groups  # none is wanted
    (study / "study.toml").write_text(text.replace('tokenizer = "none"\n', ""))
    options = {"cache": tmp_path / "cache", "threads": 1}
    for verb in (
        lambda: api.estimate(study, **options),
        lambda: api.search(study, **options),
        lambda: StudyFolder(study, **options).layout,
    ):
        with pytest.raises((CheckpointError, TargetError), match='tokenizer = "none"') as caught:
            verb()
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
    assert main(["inspect", str(folder), "--target", "gguf"]) in (0, None)
    shown = capsys.readouterr().out.splitlines()
    notes = [line for line in shown if line.startswith("note: ")]
    assert notes[-1].startswith("note: no tokenizer:")
    assert (
        "tokenizer" not in api.inspect(folder).attrs["notes"]
    )  # safetensors carries what is there
    assert not (study / "journal.log").exists()


def test_an_allocation_is_not_materialized_without_a_tokenizer(
    finished_study, study_cache, tmp_path
):
    study = shutil.copytree(finished_study, tmp_path / "study")
    toml = study / "study.toml"
    toml.write_text(toml.read_text().replace('tokenizer = "none"\n', ""))
    with pytest.raises(CheckpointError, match='tokenizer = "none"'):
        api.materialize(study, study / "allocations/pick.json", tmp_path / "out", cache=study_cache)
    assert not (tmp_path / "out").exists()
