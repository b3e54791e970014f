"""Metadata against gguf-py's own writer and reader, and the refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from allocator.checkpoint.reading import read_inventory
from allocator.errors import CheckpointError, TargetError
from allocator.targets.gguf.general import short_count
from allocator.targets.gguf.metadata import Field, metadata, metadata_bytes, tokenizer
from allocator.targets.gguf.tokenizer import check_tokenizer

REFERENCE = Path(__file__).parents[3] / "studies/reference/model"


@pytest.fixture(scope="module")
def inventory():
    return read_inventory(REFERENCE)


def with_config(inventory, **changes):
    return replace(inventory, config={**inventory.config, **changes})


@pytest.fixture
def copied(tmp_path):
    """The reference checkpoint with tokenizer files that a test may change."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, tmp_path)
    for file in REFERENCE.glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def written(fields, path):
    """The bytes of these fields in a file by gguf-py: all but magic, version and two counts."""
    arch, *rest = fields
    writer = GGUFWriter(path, arch.value)
    for field in rest:
        writer.add_key_value(field.key, field.value, field.type, sub_type=field.element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.stat().st_size - 24


def values(inventory, **counts):
    return {
        f.key: f.value for f in metadata(inventory, **{"n_experts": 24, "experts_used": 4} | counts)
    }


def test_bytes_are_those_that_gguf_py_writes(inventory, tmp_path):
    fields = metadata(inventory, n_experts=24, experts_used=4)
    assert metadata_bytes(fields) == written(fields, tmp_path / "kv.gguf")


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
_SCALARS = {
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: _TEXTS,
}


@given(
    st.dictionaries(
        _TEXTS.filter(lambda key: key and key != "general.architecture"),  # gguf-py's own
        st.sampled_from(list(_SCALARS)).flatmap(
            lambda kind: st.tuples(st.just(kind), _SCALARS[kind], st.booleans(), st.integers(1, 4))
        ),
    )
)
def test_bytes_of_any_pairs_are_those_that_gguf_py_writes(tmp_path_factory, drawn):
    fields = [Field("general.architecture", "qwen3moe", GGUFValueType.STRING)]
    for key, (kind, value, is_array, n) in drawn.items():
        if is_array:
            fields.append(Field(key, (value,) * n, GGUFValueType.ARRAY, kind))
        else:
            fields.append(Field(key, value, kind))
    path = tmp_path_factory.mktemp("kv") / "kv.gguf"
    assert metadata_bytes(fields) == written(fields, path)


def test_bytes_do_not_depend_on_the_counts(inventory):
    sizes = {
        metadata_bytes(metadata(inventory, n_experts=n, experts_used=used))
        for n in (1, 7, 24, 100_000)
        for used in (1, 4)
    }
    assert len(sizes) == 1


def test_tokenizer_read_back_by_gguf_py_is_the_checkpoints(inventory, tmp_path):
    path = tmp_path / "kv.gguf"
    written(metadata(inventory, n_experts=24, experts_used=4), path)
    reader = GGUFReader(path)
    raw = json.loads((REFERENCE / "tokenizer.json").read_text())
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert {text: n for n, text in enumerate(tokens)} == raw["model"]["vocab"]
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    assert [m.split(" ") for m in merges] == raw["model"]["merges"]
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types == [3] + [1] * (len(tokens) - 1)  # control, then normal
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    for role in ("bos", "eos", "padding"):
        assert reader.get_field(f"tokenizer.ggml.{role}_token_id").contents() == 0
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False


def test_values_of_the_reference_model(inventory):
    found = values(inventory, n_experts=16, experts_used=3)
    expected = {
        "expert_count": 16, "expert_used_count": 3, "expert_gating_func": 2, "block_count": 6,
        "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_shared_count": 1,
        "leading_dense_block_count": 1, "context_length": 256, "rope.dimension_count": 32,
        "attention.key_length": 160, "attention.value_length": 128, "attention.q_lora_rank": 256,
        "attention.key_length_mla": 96, "attention.value_length_mla": 64, "vocab_size": 8192,
        "attention.kv_lora_rank": 128, "attention.head_count": 4, "attention.head_count_kv": 1,
        "expert_feed_forward_length": 256, "feed_forward_length": 768,
    }  # fmt: skip
    assert {key: found[f"deepseek2.{key}"] for key in expected} == expected
    assert "deepseek2.expert_group_count" not in found


def test_values_of_a_real_deepseek_v3_config(inventory):
    """As published: rope_theta beside rope_scaling, router groups."""
    published = with_config(
        inventory, n_group=8, topk_group=4, rope_parameters=None, rope_theta=10000,
        rope_scaling={
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
            "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
        },
    )  # fmt: skip
    found = values(published)
    assert found["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert found["deepseek2.rope.scaling.type"] == "yarn"
    assert found["deepseek2.rope.scaling.factor"] == 40
    assert found["deepseek2.rope.scaling.original_context_length"] == 4096
    assert found["deepseek2.expert_group_count"] == 8
    assert found["deepseek2.expert_group_used_count"] == 4
    for n_experts, experts_used in ((20, 4), (8, 4), (16, 9)):
        with pytest.raises(TargetError, match="multiple of 8"):
            values(published, n_experts=n_experts, experts_used=experts_used)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scoring_func": "softmax"}, TargetError, "scoring_func"),
        ({"hidden_act": "gelu"}, TargetError, "silu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, TargetError, "llama3"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 1.0}},
            TargetError,
            "mscale",
        ),
        ({"kv_lora_rank": "many"}, CheckpointError, "kv_lora_rank"),
        ({"moe_intermediate_size": None}, CheckpointError, "moe_intermediate_size"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(inventory, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        values(with_config(inventory, **changes))
    assert "\n" not in str(caught.value)


def test_without_tokenizer_there_is_no_vocab(copied):
    inventory = read_inventory(copied)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    found = values(inventory)
    assert found["tokenizer.ggml.model"] == "no_vocab"
    assert found["deepseek2.vocab_size"] == 8192
    assert "tokenizer.ggml.tokens" not in found
    with pytest.raises(CheckpointError, match='tokenizer = "none"') as caught:
        check_tokenizer(inventory)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_wanted_is_left_out(copied):
    inventory = replace(read_inventory(copied), without_tokenizer=True)
    assert values(inventory)["tokenizer.ggml.model"] == "no_vocab"
    check_tokenizer(inventory)
    (copied / "tokenizer.json").write_text("{")
    check_tokenizer(inventory)


def test_tokenizer_is_read_once_and_again_when_its_file_changes(copied):
    inventory = read_inventory(copied)
    first = tokenizer(inventory)
    assert tokenizer(inventory) is first
    edit(copied / "tokenizer_config.json", lambda c: c.update(add_bos_token=True))
    again = {f.key: f.value for f in tokenizer(inventory)}
    assert again["tokenizer.ggml.add_bos_token"] is True


def test_bos_of_a_post_processor_and_chat_template(copied):
    def add_bos(raw):
        raw["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>"}})

    edit(copied / "tokenizer.json", add_bos)
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    found = values(read_inventory(copied))
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"


NAMED = [
    {"name": "tool_use", "template": "T"},
    {"name": "default", "template": "D"},
    {"name": "rag-2", "template": "R"},
]


def jinja(folder, **templates):
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        place = folder if name == "chat_template" else folder / "additional_chat_templates"
        (place / f"{name}.jinja").write_text(text)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(chat_template="D")), "D"),
        (
            lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(chat_template=NAMED)),
            {"default": "D", "tool_use": "T", "rag_2": "R"},
        ),
        (
            lambda f: edit(
                f / "tokenizer_config.json", lambda c: c.update(chat_template=NAMED[:1])
            ),
            {"tool_use": "T"},
        ),
        (lambda f: jinja(f, chat_template="D"), "D"),
        (lambda f: jinja(f, chat_template="D", rag="R"), {"default": "D", "rag": "R"}),
        (lambda f: jinja(f, rag="R", tools="T"), {"rag": "R", "tools": "T"}),
        (lambda f: (f / "chat_template.json").write_text('{"chat_template": "D"}'), "D"),
    ],
)
def test_chat_templates_are_those_of_gguf_pys_writer(copied, tmp_path, write, expected):
    """The converter hands a text, or a list of named ones, to `add_chat_template`."""
    write(copied)
    inventory = read_inventory(copied)
    fields = metadata(inventory, n_experts=24, experts_used=4)
    path = tmp_path / "kv.gguf"
    assert metadata_bytes(fields) == written(fields, path)
    writer = GGUFWriter(tmp_path / "theirs.gguf", "deepseek2")
    if isinstance(expected, dict):
        expected = [{"name": name, "template": text} for name, text in expected.items()]
    writer.add_chat_template(expected)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def templates(path):
        found = {
            key: field.contents()
            for key, field in GGUFReader(path).fields.items()
            if key.startswith("tokenizer.chat_template")
        }
        names = found.get("tokenizer.chat_templates")
        return found | {"tokenizer.chat_templates": names and sorted(names)}

    assert templates(path) == templates(tmp_path / "theirs.gguf")


def test_which_chat_template_holds_is_as_in_transformers(copied):
    edit(copied / "tokenizer_config.json", lambda c: c.update(chat_template="config"))
    (copied / "chat_template.jinja").write_text("file")
    theirs = AutoTokenizer.from_pretrained(copied).chat_template
    assert values(read_inventory(copied))["tokenizer.chat_template"] == theirs == "file"


@pytest.mark.parametrize(
    "template",
    [7, ["D"], [{"name": "a"}], [{"name": 1, "template": "D"}], {"a": 1},
     [{"name": "a b", "template": "1"}, {"name": "a_b", "template": "2"}]],
)  # fmt: skip
def test_chat_templates_that_are_none_are_refused(copied, template):
    edit(copied / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    with pytest.raises(CheckpointError) as caught:
        values(read_inventory(copied))
    assert "\n" not in str(caught.value)


def test_sampling_is_what_the_converter_reads_of_generation_config(copied, tmp_path):
    """The converter's names, by gguf-py's own writer."""
    told = {
        "temperature": 1, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "do_sample": True,
        "penalty_repeat": 1.1, "penalty_last_n": 64, "mirostat": 2, "mirostat_tau": 5.0,
        "mirostat_eta": 0.1, "xtc_probability": 0.5, "xtc_threshold": None, "sequence": "top_k",
    }  # fmt: skip
    (copied / "generation_config.json").write_text(json.dumps(told))
    inventory = read_inventory(copied)
    fields = metadata(inventory, n_experts=24, experts_used=4)
    assert metadata_bytes(fields) == written(fields, tmp_path / "kv.gguf")
    writer = GGUFWriter(tmp_path / "theirs.gguf", "deepseek2")
    for name, value in told.items():
        name = {"temperature": "temp"}.get(name, name)
        if value is not None and name != "do_sample":
            getattr(writer, f"add_sampling_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def sampling(path):
        fields = GGUFReader(path).fields.items()
        return {k: (f.types, f.contents()) for k, f in fields if k.startswith("general.sampling")}

    assert sampling(tmp_path / "kv.gguf") == sampling(tmp_path / "theirs.gguf")
    assert len(sampling(tmp_path / "kv.gguf")) == 11
    for damaged in ('{"top_k": 1.5}', '{"top_k": true}', '{"temperature": "hot"}', "[]", "{"):
        (copied / "generation_config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
            values(inventory)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("./Qwen3", "deepseek_v3 29.3M"),
        ("/models/mine", "deepseek_v3 29.3M"),
        ("a/b/c", "deepseek_v3 29.3M"),
        ("", "deepseek_v3 29.3M"),
        (None, "deepseek_v3 29.3M"),
    ],
)
def test_the_name_does_not_say_where_the_checkpoint_lies(inventory, told, name):
    """29.31 M parameters are what its card says."""
    assert values(with_config(inventory, _name_or_path=told))["general.name"] == name


@pytest.mark.parametrize(
    ("n", "text"),
    [(12, "12"), (1500, "1.50K"), (30.5e9, "30.5B"), (671e9, "671B"), (2e12, "2000B")],
)
def test_sizes_have_three_digits(n, text):
    assert short_count(int(n)) == text


def test_rows_without_a_token_are_unused(copied):
    def drop_last(raw):
        raw["model"]["vocab"] = {t: n for t, n in raw["model"]["vocab"].items() if n < 8190}
        raw["model"]["merges"] = raw["model"]["merges"][:-2]
        raw["added_tokens"].append({"id": 8190, "content": "<mine>", "special": False})

    edit(copied / "tokenizer.json", drop_last)
    found = values(read_inventory(copied))
    assert found["tokenizer.ggml.tokens"][8190:] == ("<mine>", "[PAD8191]")
    assert found["tokenizer.ggml.token_type"][8189:] == (1, 4, 5)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"8191": _added("a")})),
        ("tokenizer.json", lambda raw: raw["added_tokens"].append({"id": 8191} | _added("a"))),
    ],
)
def test_a_text_with_two_ids_is_refused_as_llama_cpp_aborts_on_it(copied, file, change):
    def drop_last(raw):
        raw["model"]["vocab"] = {t: n for t, n in raw["model"]["vocab"].items() if n < 8191}
        raw["model"]["merges"].pop()

    edit(copied / "tokenizer.json", drop_last)
    edit(copied / file, change)
    with pytest.raises(CheckpointError, match=r"tokens \d+ and 8191 are both 'a', needed one id"):
        values(read_inventory(copied))


def _added(text):
    return {"content": text, "special": False}


_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern):
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }


def test_pre_tokenizer_of_qwen_is_known(copied):
    edit(copied / "tokenizer.json", lambda raw: raw.update(pre_tokenizer=_split(_QWEN)))
    assert values(read_inventory(copied))["tokenizer.ggml.pre"] == "qwen2"


_DEEPSEEK = r"""[
  {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
  {"type": "Split", "pattern": {"Regex": "[一-龥぀-ゟ゠-ヿ]+"}, "behavior": "Isolated",
   "invert": false},
  {"type": "Split", "pattern": {"Regex":
   "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"},
   "behavior": "Isolated", "invert": false},
  {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
]"""  # noqa: E501


def test_pre_tokenizer_of_deepseek_is_known_as_its_released_json_has_it(copied):
    steps = {"type": "Sequence", "pretokenizers": json.loads(_DEEPSEEK)}
    edit(copied / "tokenizer.json", lambda raw: raw.update(pre_tokenizer=steps))
    assert values(read_inventory(copied))["tokenizer.ggml.pre"] == "deepseek-v3"
    for change in ({"behavior": "Removed"}, {"invert": True}):
        steps["pretokenizers"][0].update(change)
        edit(copied / "tokenizer.json", lambda raw: raw.update(pre_tokenizer=steps))
        with pytest.raises(TargetError, match="drops or joins"):
            values(read_inventory(copied))
        steps["pretokenizers"] = json.loads(_DEEPSEEK)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda raw: raw["model"].update(type="Unigram"), TargetError),
        (lambda raw: raw["model"].update(byte_fallback=True), TargetError),
        (lambda raw: raw["model"].update(ignore_merges=True, merges=[]), TargetError),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), TargetError),
        (lambda raw: raw.update(normalizer={"type": "Lowercase"}), TargetError),
        (lambda raw: raw.update(pre_tokenizer=_split("my own")), TargetError),
        (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), TargetError),
        (lambda raw: raw["model"]["merges"].append("a b c"), TargetError),
        (lambda raw: raw["model"]["vocab"].update(much=9000), CheckpointError),
        (lambda raw: raw.pop("model"), CheckpointError),
        (lambda raw: raw["model"].update(vocab=[]), CheckpointError),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_express_is_refused(copied, change, error):
    edit(copied / "tokenizer.json", change)
    with pytest.raises(error, match=r"tokenizer\.json") as caught:
        values(read_inventory(copied))
    assert "\n" not in str(caught.value)
