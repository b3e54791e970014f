"""Verification passes on what materialize wrote, and finds every kind of change."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from allocator.codecs.encodings import Encodings
from allocator.codecs.ggml import GGML
from allocator.decision.allocation import Allocation
from allocator.errors import AllocatorError, VerifyError
from allocator.export.checkpoint import materialize
from allocator.export.manifest import Manifest, file_digest
from allocator.export.runtimes import runtime_named
from allocator.export.safetensors import comparison
from allocator.export.safetensors.runtime import SAFETENSORS_TOLERANCE
from allocator.export.tensors import EncodedTensors
from allocator.export.verification import check_weights, verify
from allocator.files.checksums import seal, unseal
from allocator.targets import target_named

encode = GGML.encode

RANDOM_WEIGHTS_TOLERANCE = 0.05
PRECISE = ("BF16",)  # random weights: llama.cpp's 8-bit activations flip their routing


def of(made, **options):
    """Opens the source that a directory is held against."""
    return partial(EncodedTensors, made.encodings, **options)


def file_of(folder, container):
    return folder / runtime_named(container).file_name


def stored(target):
    """Formats of the allocations here: parts need two, and llama.cpp runs on none of them."""
    return (*PRECISE, "Q8_0", "Q4_0") if target == "safetensors" else PRECISE


@pytest.fixture(scope="module")
def precise(case, tmp_path_factory):
    """Directories of allocations that llama.cpp computes closely."""
    made = {}

    def get(name, target, container):
        key = name, target, container
        if key not in made:
            the = case(name, target)
            folder = tmp_path_factory.mktemp("precise") / container
            made[key] = the.write(folder, container, the.allocation(formats=stored(target))).folder
        return made[key]

    return get


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_odd_tolerances_are_refused_first(tmp_path, tolerance):
    with pytest.raises(VerifyError, match="0 or more"):
        verify(tmp_path / "nothing", None, None, tolerance=tolerance)


WAITS = {
    "gguf": "loading the file in llama.cpp: ",
    "safetensors": "opening the checkpoint in transformers: ",
}


def test_good_ones_pass(case, precise, which, every_step):
    name, target, container = which
    made, folder = case(name, target), precise(*which)
    # random weights: llama.cpp's 8-bit activations flip routings that trained ones decide clearly
    limit = RANDOM_WEIGHTS_TOLERANCE if container == "gguf" else SAFETENSORS_TOLERANCE
    found = verify(folder, of(made), made.scorer, tolerance=limit)
    assert WAITS[container] in every_step.getvalue()
    allocation = made.allocation(formats=stored(target))
    size = allocation.nbytes(made.layout, target_named(container))
    assert (found.file_bytes, found.tensor_bytes) == (size.file, size.tensors)
    n_parts = sum(text.count("+") + 1 for text in allocation.format_of.values())
    assert (n_parts > len(made.layout.groups)) == (target == "safetensors")
    assert found.n_tensors == n_parts + len(made.layout.full_precision)
    assert 0 <= found.divergence <= limit
    assert found.loss > 0.01
    assert found.runtime_loss == pytest.approx(found.loss, abs=2 * limit)
    if container == "gguf":
        assert found.divergence > 0  # it ran, in another runtime


@pytest.fixture
def copy(precise, tmp_path):
    def make(which):
        return shutil.copytree(precise(*which), tmp_path / "copy")

    return make


def resign(folder, **changes):
    """Makes the manifest agree with the files again."""
    data = unseal((folder / "manifest.json").read_bytes()) | changes
    data["sha256"] = {name: file_digest(folder / name) for name in data["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(data))


def refused(folder, made, match):
    with pytest.raises(VerifyError, match=match) as caught:
        verify(folder, of(made), made.scorer)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("at", [-1, -5000, "middle"])
def test_a_flipped_byte_is_found(case, copy, which, at, signed):
    folder = copy(which)
    path = file_of(folder, which[2])
    data = bytearray(path.read_bytes())
    where = len(data) // 2 if at == "middle" else len(data) + at
    if path.suffix == ".gguf":  # the last bytes may be padding
        where -= 64
    data[where] ^= 1
    path.write_bytes(data)
    if signed:
        resign(folder)
    refused(folder, case(*which[:2]), "other bytes" if signed else "changed since it was written")


def test_a_flipped_byte_in_every_part_is_found(case, copy):
    which = ("qwen3", "safetensors", "safetensors")
    folder, made = copy(which), case(*which[:2])
    path = file_of(folder, "safetensors")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    parts = [name for name in table if name.startswith("layers.1.experts.down.")]
    assert len(parts) == 2
    for name in parts:
        flipped = bytearray(data)
        flipped[end + table[name]["data_offsets"][1] - 1] ^= 1
        path.write_bytes(flipped)
        resign(folder)
        refused(folder, made, f"{name} holds other bytes than its {name.split('.')[-1]} encoding")


def damaged(case, precise, which, tmp_path, at):
    """A copy of a directory and of its bank, with one bit flipped in both, in the same slot."""
    made, folder = case(*which[:2]), shutil.copytree(precise(*which), tmp_path / "copy")
    encodings = Encodings(
        shutil.copytree(made.encodings_folder, tmp_path / "bank"), made.layout, {}
    )
    allocation = made.allocation(formats=stored(which[1]))
    name = "layers.1.experts.gate"
    fmt, experts = allocation.parts(made.layout, name)[0]
    slot = encodings.encoded(name, fmt.name, experts)[-1].tobytes()
    holding = [p for p in (tmp_path / "bank").iterdir() if slot in p.read_bytes()]
    assert len(holding) == 1
    for path in (file_of(folder, which[2]), *holding):
        data = bytearray(path.read_bytes())
        assert data.count(slot) == 1
        data[data.index(slot) + at] ^= 4
        path.write_bytes(data)
    resign(folder)
    return folder, SimpleNamespace(encodings=encodings, scorer=made.scorer)


@pytest.mark.parametrize("at", [0, 4321])
def test_a_flip_that_the_bank_has_too_is_found(case, precise, which, tmp_path, at, caplog):
    folder, other = damaged(case, precise, which, tmp_path, at)
    refused(folder, other, "experts.gate.* holds other bytes than its")
    (record,) = caplog.records
    assert "damaged encoding of layers.1.experts.gate" in record.getMessage()


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_a_wrong_encoding_with_right_digests_is_found_by_encoding_anew(
    case, tmp_path, monkeypatch, container
):
    """As of a memory that failed while the cache was filled."""
    made = case("qwen3", "gguf")
    encodings, allocation = (
        Encodings(tmp_path / "bank", made.layout, {}),
        made.allocation(formats=PRECISE),
    )

    def failing(weights, *args, **options):
        found = encode(weights, *args, **options)
        found.reshape(-1)[found.size // 2] ^= 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(GGML, "encode", failing)
        source = EncodedTensors(encodings, allocation)
        materialize(source, tmp_path / "out", container=container, importance="i" * 64)
    runtime, source = runtime_named(container), EncodedTensors(encodings, allocation)
    tensors = runtime.read(tmp_path / "out" / runtime.file_name, made.layout)
    check_weights(tmp_path / "out", runtime, source, tensors)
    before = sorted((tmp_path / "bank").iterdir())
    with pytest.raises(VerifyError, match="holds other bytes than its BF16 encoding"):
        verify(tmp_path / "out", partial(EncodedTensors, encodings, encode=True), made.scorer)
    assert sorted((tmp_path / "bank").iterdir()) == before
    good = made.write(tmp_path / "good", container, allocation).folder
    with pytest.raises(VerifyError, match="holds other bytes"):
        verify(good, partial(EncodedTensors, encodings), made.scorer)
    anew = partial(EncodedTensors, encodings, encode=True)
    verify(good, anew, made.scorer, tolerance=RANDOM_WEIGHTS_TOLERANCE)


def test_parts_of_other_experts_are_found(case, copy):
    """The same bytes under an allocation that gives two experts each other's format."""
    which = ("qwen3", "safetensors", "safetensors")
    folder, made = copy(which), case(*which[:2])
    data = json.loads((folder / "allocation.json").read_text())
    name = "layers.1.experts.down"
    (a, *many), (b, *more) = (
        piece.split(":")[1].split(",") for piece in data["formats"][name].split("+")
    )
    lists = (",".join(sorted([b, *many], key=int)), ",".join(sorted([a, *more], key=int)))
    names = [piece.split(":")[0] for piece in data["formats"][name].split("+")]
    data["formats"][name] = "+".join(map(":".join, zip(names, lists, strict=True)))
    (folder / "allocation.json").write_text(json.dumps(data))
    resign(folder, allocation=Allocation.from_json(data).digest)
    refused(folder, made, f"{name}.* holds other bytes")


@pytest.mark.parametrize("signed", [False, True])
def test_a_changed_allocation_is_found(case, copy, which, signed):
    folder, made = copy(which), case(*which[:2])
    other = made.allocation(1, formats=stored(which[1]))
    (folder / "allocation.json").write_text(json.dumps(other.to_json()))
    if signed:
        resign(folder)
    refused(folder, made, "the manifest says" if signed else "changed since it was written")
    if signed:
        resign(folder, allocation=other.digest)
        refused(folder, made, "the allocation takes|other bytes|is stored as")


def test_a_missing_file_is_found(case, copy, which):
    folder = copy(which)
    (folder / "allocation.json").unlink()
    refused(folder, case(*which[:2]), "missing or changed")
    (folder / "manifest.json").unlink()
    refused(folder, case(*which[:2]), "no readable manifest")


def outside(data, folder):
    """A file that is there, whole, and elsewhere."""
    data["sha256"]["../copy/allocation.json"] = data["sha256"]["allocation.json"]


def file_outside(data, folder):
    """The case that passed once: another file, and no digest of it."""
    data["file"] = "../elsewhere.gguf"
    del data["sha256"]["model.gguf"]
    shutil.move(folder / "model.gguf", folder.parent / "elsewhere.gguf")


def file_unsigned(data, folder):
    del data["sha256"]["model.gguf"]


def allocation_unsigned(data, folder):
    del data["sha256"]["allocation.json"]


def something_beside(data, folder):
    (folder / "model-00002.gguf").write_bytes(b"")


def other_sizes(data, folder):
    data["tensor_bytes"] += 32
    data["overhead_bytes"] -= 32


def other_container(data, folder):
    data["container"] = "onnx"


def other_schema(data, folder):
    data["schema"] = 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (outside, "names of files beside it"),
        (file_outside, "needed 'model.gguf' beside it"),
        (file_unsigned, "no sha256 of model.gguf"),
        (allocation_unsigned, "no sha256 of allocation.json"),
        (something_beside, "model-00002.gguf: not in the manifest"),
        (other_sizes, "the manifest says"),
        (other_container, "'onnx', needed gguf or safetensors"),
        (other_schema, "schema 2, needed 1"),
    ],
)
@pytest.mark.parametrize("form", ["earlier", "sealed"])
def test_a_manifest_that_no_directory_has_is_refused(case, copy, change, match, form):
    which = ("qwen3", "gguf", "gguf")
    folder = copy(which)
    data = unseal((folder / "manifest.json").read_bytes())
    change(data, folder)
    text = json.dumps(data).encode() if form == "earlier" else seal(data)
    (folder / "manifest.json").write_bytes(text)
    refused(folder, case(*which[:2]), match)


def test_another_checkpoint_is_refused(case, precise, make_checkpoint, which, tmp_path):
    from allocator.checkpoint.reading import read_inventory
    from allocator.targets import TARGETS

    name, target, _ = which
    other = {"deepseek": "qwen3", "qwen3": "deepseek"}[name]
    refused(precise(*which), case(other, target), "made from checkpoint")
    wide = {"deepseek": {"hidden_size": 256, "moe_intermediate_size": 256}}.get(
        name, {"hidden_size": 256, "dtype": "bfloat16"}
    )
    twin = make_checkpoint(tmp_path / "twin", name, seed=1, **wide)
    layout = TARGETS[target].layout(read_inventory(twin))
    encodings = Encodings(tmp_path / "bank", layout, {})
    with pytest.raises(VerifyError, match="made from checkpoint"):
        verify(precise(*which), partial(EncodedTensors, encodings), case(name, target).scorer)


def test_a_runtime_that_computes_otherwise_is_found(case, copy, which, monkeypatch):
    made = case(*which[:2])
    if which[2] == "gguf":
        from allocator.export.gguf.llamacpp import LlamaCpp

        original = LlamaCpp.logits
        monkeypatch.setattr(LlamaCpp, "logits", lambda *args: original(*args)[:, ::-1].copy())
    else:
        load = comparison.load

        def off(folder):
            model = load(folder)
            double = torch.ones(made.layout.inventory.config["hidden_size"])
            double[0] = 2
            model.model.norm.register_forward_hook(lambda _, __, normed: normed * double)
            return model

        monkeypatch.setattr(comparison, "load", off)
    refused(copy(which), made, "its runtime is off")


def test_manifest_refuses_unknown_keys(copy):
    folder = copy(("qwen3", "gguf", "gguf"))
    data = unseal((folder / "manifest.json").read_bytes()) | {"surprise": 1}
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(AllocatorError, match="surprise"):
        Manifest.read(folder)
