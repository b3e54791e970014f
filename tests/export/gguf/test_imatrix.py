"""Importance as llama-quantize takes it, and files of llama-quantize beside ours."""

import ctypes
import struct
import subprocess

import numpy as np
import pytest
from gguf import GGUFReader

from allocator.checkpoint.reading import read_inventory
from allocator.codecs import ggml
from allocator.codecs.encodings import Encodings
from allocator.decision.allocation import Allocation
from allocator.export.gguf.files import read_gguf, write_gguf
from allocator.export.gguf.imatrix import write_imatrix
from allocator.export.gguf.recipes import tensor_type_file
from allocator.export.tensors import EncodedTensors
from allocator.formats import FORMATS, fallback
from allocator.profiling.imatrix import given_importance
from allocator.profiling.statistics import importance_digest
from allocator.targets import GGUF

RETAINED = (0, 2, 3, 4, 6, 7)


def layout_of(path, **changes):
    inventory = read_inventory(path)
    object.__setattr__(inventory, "without_tokenizer", True)
    return GGUF.layout(inventory)


def random_importance(layout, seed=0):
    """As the calibration pass has it, with values of many sizes."""
    rng = np.random.default_rng(seed)
    heads = layout.inventory.dimensions.heads
    vectors = {}
    for group in layout.groups.values():
        if group.importance:
            outer = group.shape[:1] if group.role.is_expert else ()
            outer = (heads,) if str(group.role).endswith("k_b") else outer
            values = rng.lognormal(0, 3, (*outer, group.shape[-1]))
            vectors[group.name] = values.astype(np.float32)
    return vectors


def write(path, layout, importance, retained):
    return write_imatrix(
        path, layout, importance,
        retained=dict.fromkeys(layout.layers, retained),
        experts_used=layout.inventory.experts_used, n_tokens=12_345, dataset="text",
    )  # fmt: skip


def of_llama_quantize(path):
    """What its `load_imatrix` computes of a file, by name: written down from quantize.cpp."""
    if path.suffix != ".dat":
        tensors = {t.name: t.data for t in GGUFReader(path).tensors}
        values = {}
        for name in (n.removesuffix(".counts") for n in tensors if n.endswith(".counts")):
            sums, counts = tensors[f"{name}.in_sum2"].ravel(), tensors[f"{name}.counts"].ravel()
            of_matrix = sums.reshape(len(counts), -1)
            values[name] = np.concatenate(
                [
                    row / np.float32(n) if n > 0 else np.ones_like(row)
                    for row, n in zip(of_matrix, np.rint(counts), strict=True)
                ]
            )
        return values
    data, at, values = path.read_bytes(), 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        calls, n = struct.unpack_from("<ii", data, at)
        values[name] = np.frombuffer(data, "<f4", n, at + 8) / np.float32(calls)
        at += 8 + 4 * n
    return values


@pytest.fixture(scope="module", params=["deepseek", "qwen3_tied"])
def layout(request, checkpoints):
    return layout_of(checkpoints[request.param])


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_llama_quantize_takes_the_very_vectors(layout, tmp_path, suffix):
    importance, path = random_importance(layout), tmp_path / f"imatrix{suffix}"
    write(path, layout, importance, RETAINED)
    taken = of_llama_quantize(path)
    assert len(taken) == len(importance)
    for name, vectors in importance.items():
        group = layout.groups[name]
        chosen = vectors[list(RETAINED)] if group.role.is_expert else vectors
        if len(group.shape) == 3 and chosen.ndim == 1:  # one vector for all heads
            chosen = np.tile(chosen, (group.shape[0], 1))
        np.testing.assert_array_equal(taken[group.stored_as], chosen.ravel(), name)


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_what_is_written_reads_back(layout, tmp_path, suffix):
    importance, path = random_importance(layout), tmp_path / f"imatrix{suffix}"
    write(path, layout, importance, range(layout.inventory.n_experts))
    given = given_importance(path, layout)
    assert not given.notes
    halves = {n for n, v in importance.items() if v.shape != given.vectors[n].shape}
    assert all(n.endswith("v_b") for n in halves)
    for name, vectors in importance.items():
        own = np.broadcast_to(vectors, given.vectors[name].shape)
        np.testing.assert_array_equal(given.vectors[name], own)
    if not halves:
        assert importance_digest(given.vectors) == importance_digest(importance)


def in_all_formats(layout, seed=0):
    """Retained experts, and formats that differ from group to group; all of them are tried."""
    rng, least = np.random.default_rng(seed), {f: 0 for f in FORMATS}
    formats = {}
    for group in layout.groups.values():
        held = [
            f.name for f in FORMATS.values()
            if group.can_hold(f) and (group.importance or not f.needs_importance)
        ]  # fmt: skip
        rng.shuffle(held)
        formats[group.name] = min(held, key=least.__getitem__)
        least[formats[group.name]] += 1
    return Allocation.of(
        target="gguf",
        retained=dict.fromkeys(layout.layers, RETAINED),
        formats=formats,
        experts_used=layout.inventory.experts_used,
    )


def files(layout, allocation, importance, folder):
    """Ours, the floats of the same experts, the imatrix and the types."""
    encodings = Encodings(folder / "encodings", layout, importance)
    floats = Allocation.of(
        target="gguf",
        retained=allocation.retained_experts,
        formats=dict.fromkeys(layout.groups, "BF16"),
        experts_used=allocation.experts_used,
    )
    for name, chosen in (("ours", allocation), ("floats", floats)):
        path = folder / f"{name}.gguf"
        write_gguf(path, layout, chosen, EncodedTensors(encodings, chosen))
    write(folder / "imatrix.gguf", layout, importance, RETAINED)
    (folder / "types.txt").write_text(tensor_type_file(layout, allocation))


def test_quantizing_our_floats_with_our_imatrix_gives_our_file(tmp_path, make_checkpoint):
    """Row by row as llama-quantize does, with ggml's function; the program itself runs below."""
    path = make_checkpoint(tmp_path / "model", "qwen3", hidden_size=256, dtype="bfloat16")
    layout = layout_of(path)
    formats = ("IQ4_XS", "Q6_K", "Q3_K", "Q4_0", "Q8_0")
    narrow = [f for f in formats if FORMATS[f].block == 32]
    chosen = {}
    for i, group in enumerate(layout.groups.values()):
        held = formats if group.shape[-1] % 256 == 0 else narrow
        chosen[group.name] = held[i % len(held)]
    allocation = Allocation.of(
        target="gguf", retained=dict.fromkeys(layout.layers, RETAINED), formats=chosen,
        experts_used=2,
    )  # fmt: skip
    files(layout, allocation, random_importance(layout), tmp_path)
    ours, floats = (read_gguf(tmp_path / f"{name}.gguf") for name in ("ours", "floats"))
    taken = of_llama_quantize(tmp_path / "imatrix.gguf")
    for name, (fmt, shape, data) in ours.items():
        if fmt == floats[name][0]:
            np.testing.assert_array_equal(data, floats[name][2])
            continue
        bits = floats[name][2].reshape(-1).view(np.uint16).astype(np.uint32) << 16
        rows = bits.view(np.float32).reshape(-1, *shape[-2:])
        weights = taken.get(name, np.zeros(0, np.float32)).reshape(-1, shape[-1])
        number = ggml.TYPES[fmt]
        for matrix, stored in enumerate(data.reshape(len(rows), -1)):
            out = np.zeros_like(stored)
            weighed = rows[matrix].copy()
            imatrix = weights[matrix].copy() if len(weights) else None
            ggml.library().ggml_quantize_chunk(
                number, weighed.ctypes.data, out.ctypes.data, 0, shape[-2], shape[-1],
                None if imatrix is None else imatrix.ctypes.data,
            )  # fmt: skip
            np.testing.assert_array_equal(out, stored, f"{name} {matrix} {fmt}")


# -- the program itself


@pytest.fixture(scope="session")
def quantize(package, tmp_path_factory):
    """llama-quantize as its sources have it, linked with libraries of that version."""
    (libraries,) = package("llama.cpp-libraries").rglob("bins/linux-x64")
    (sources,) = package("llama.cpp-sources").glob("*/vendor/llama.cpp")
    program = tmp_path_factory.mktemp("llama-quantize") / "llama-quantize"
    names = ("libllama.v0.5.0.so", "libggml.v0.5.0.so", "libllama-common.so", "libggml-base.so")
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{libraries}",
         *(f"-I{sources / at}" for at in ("include", "common", "ggml/include", "vendor")),
         *(sources / "tools/quantize" / name for name in ("quantize.cpp", "main.cpp")),
         f"-L{libraries}", *(f"-l:{name}" for name in names), "-o", program],
        check=True,
    )  # fmt: skip

    def run(*arguments):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run.library = libraries / "libggml-base.so"
    return run


@pytest.fixture
def same_build(quantize, monkeypatch):
    """Our codec encodes by llama-quantize's own ggml."""
    lib, typed = ctypes.CDLL(str(quantize.library)), ggml.library()
    for name in ("ggml_quantize_chunk", "ggml_get_type_traits", "ggml_quantize_init"):
        function, known = getattr(lib, name), getattr(typed, name)
        function.restype, function.argtypes = known.restype, known.argtypes
    monkeypatch.setattr(ggml, "library", lambda: lib)
    for cached in (ggml._traits, ggml._prepared):
        cached.cache_clear()
    yield
    for cached in (ggml._traits, ggml._prepared):
        cached.cache_clear()


@pytest.fixture(params=["deepseek", "qwen3"])
def wide_layout(request, make_checkpoint, tmp_path):
    changes = {"hidden_size": 256, "moe_intermediate_size": 256, "dtype": "bfloat16"}
    return layout_of(make_checkpoint(tmp_path / "model", request.param, **changes))


def run_on(quantize, folder, *, base="Q8_0"):
    return quantize(
        "--imatrix", folder / "imatrix.gguf", "--tensor-type-file", folder / "types.txt",
        folder / "floats.gguf", folder / "theirs.gguf", base, "2",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_llama_quantize_writes_our_tensors(quantize, same_build, wide_layout, tmp_path, seed):
    """Every tensor: the same type and the same bytes, in all formats."""
    allocation = in_all_formats(wide_layout, seed)
    files(wide_layout, allocation, random_importance(wide_layout, seed), tmp_path)
    run_on(quantize, tmp_path)
    ours, theirs = (read_gguf(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    differing = [
        (name, fmt, theirs[name][0])
        for name, (fmt, shape, data) in ours.items()
        if (fmt, shape) != theirs[name][:2] or not np.array_equal(data, theirs[name][2])
    ]
    print(len(ours), "tensors", sorted({t[0] for t in ours.values()}))
    assert not differing


@pytest.mark.slow
def test_fallbacks_are_those_of_llama_quantize(quantize, checkpoints, tmp_path):
    """Rows that are no whole blocks of a type: what it takes instead is what baselines take."""
    layout = layout_of(checkpoints["qwen3"])
    for kind in sorted(f for f in FORMATS if FORMATS[f].block == 256):
        folder = tmp_path / kind
        folder.mkdir()
        wanted = {name: fallback(kind, g.shape).name for name, g in layout.groups.items()}
        allocation = Allocation.of(
            target="gguf", retained=dict.fromkeys(layout.layers, RETAINED), formats=wanted,
            experts_used=2,
        )  # fmt: skip
        files(layout, allocation, random_importance(layout), folder)
        types = "".join(f"^{g.stored_as}$={kind.lower()}\n" for g in layout.groups.values())
        (folder / "types.txt").write_text(types)
        run_on(quantize, folder)
        theirs = read_gguf(folder / "theirs.gguf")
        assert {n: theirs[g.stored_as][0] for n, g in layout.groups.items()} == wanted
