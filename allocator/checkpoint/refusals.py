"""Reasons why a directory is no checkpoint that can be read, with the way out, in one line each.

In: a path, or the names and dtypes that its files hold, where reading them failed. Out: a text for
a `CheckpointError`. Invariant: it is asked only after a check has failed, so that a whole
checkpoint of a known family never depends on what is recognised here.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from allocator.families import Family

LFS_POINTER = b"version https://git-lfs.github.com"
"""What a file begins with that git has fetched in place of a large one."""
FETCH_LFS = "a git-lfs pointer in place of the file; fetch it with `git lfs pull`"

_QUANTIZED = (  # in order: the first kind with a name among the tensors' is the cause
    ("GPTQ or AWQ", r"\.(qweight|qzeros|g_idx)$"),
    ("bitsandbytes", r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|\.quant_state\."),
    ("NVFP4", r"\.(weight_scale_2|weight_global_scale)$"),
    ("compressed-tensors", r"\.weight_(packed|shape|zero_point)$"),
    ("MXFP4", r"_(blocks|scales)$"),
    ("MLX", r"\.biases$"),
    ("FP8 with other scales than `weight_scale_inv`", r"\.(weight|input|activation)_scale$"),
    ("integers with scales", r"\.(scales|zeros|qscales)$"),
)
ORIGINAL = (
    "needed the checkpoint that it was made from, in BF16, F16, F32, or FP8 in blocks "
    "(weight_scale_inv)"
)
_TOWERS = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower|mm_projector)\.")
_TAIL = re.compile(r"(?<![\w])(layers\.[0-9]+\..+|embed_tokens\.weight|norm\.weight)$")


def no_directory(path: Path) -> str:
    """Says why `path` is no directory, or has no `config.json`."""
    if (path / "study.toml").exists() or path.name == "study.toml":
        return f"{path}: a study, needed a model: what its study.toml names as checkpoint"
    if path.is_file():
        kind = {
            ".safetensors": "one file of a checkpoint: needed the directory that it lies in, "
            f"{path.parent}",
        }.get(path.suffix, f"a file: needed a checkpoint directory, e.g. {path.parent}")
        return f"{path}: {kind}"
    if path.is_dir():
        found = f"{path}/config.json: no such file; "
        if snapshots := sorted(path.glob("snapshots/*/config.json")):
            return f"{found}needed one of its snapshots, e.g. {snapshots[0].parent}"
        return (
            f"{found}needed a checkpoint directory, with it beside the safetensors, or one with a "
            "GGUF model alone"
        )
    hint = ""
    if not path.parent.exists():
        name = "/".join(path.parts[-2:])
        hint = f"; if {name} is a model on the Hub: `hf download {name} --local-dir DIR`, and DIR"
    return f"{path}: no such directory or file; needed a checkpoint directory{hint}"


def no_weights(path: Path) -> str:
    """Says why a directory has neither `model.safetensors` nor its index."""
    if interrupted(path):
        return f"{path}: no weights yet: an interrupted download; run it again"
    names = {p.name for p in path.iterdir()}
    shards = sorted(n for n in names if n.endswith(".safetensors"))
    if "adapter_model.safetensors" in names:
        return f"{path}: an adapter (adapter_model.safetensors); merge it into its model first"
    if shards:
        return (
            f"{path}: {len(shards)} safetensors files ({shards[0]}, ...) without "
            "model.safetensors.index.json; fetch it beside them"
        )
    if any(n.endswith((".bin", ".pth", ".pt")) for n in names):
        return (
            f"{path}: weights as pickles alone (pytorch_model.bin), which are not opened; save "
            "them as safetensors, e.g. with transformers' save_pretrained"
        )
    return (
        f"{path}: neither model.safetensors nor model.safetensors.index.json; "
        "needed a directory with a safetensors checkpoint"
    )


def already_quantized(path: Path) -> str:
    """Says that a directory is one of ours."""
    return f"{path}: written by `allocator materialize`: already quantized; {ORIGINAL}"


def interrupted(path: Path) -> bool:
    """Returns whether a download of the Hub's client is not finished."""
    places = (path, path / ".cache/huggingface/download")
    return any(next(place.glob("*.incomplete"), None) for place in places if place.is_dir())


def missing_shards(path: Path, missing: list[str], n_shards: int) -> str:
    """Says which shards of an index are missing."""
    way_out = (
        "the download was interrupted: run it again" if interrupted(path) else "fetch the rest"
    )
    return (
        f"{path}: {len(missing)} of {n_shards} shards of the index are missing, e.g. "
        f"{missing[0]}; {way_out}"
    )


def quantized(names: Iterable[str], method: str | None) -> str | None:
    """Says how these tensors are quantized, naming one; None if none looks quantized."""
    found = list(names)
    told = "" if method is None else f" (quant_method {method!r})"
    for kind, pattern in _QUANTIZED:
        if name := next((n for n in found if re.search(pattern, n)), None):
            return f"{name} is of weights quantized as {kind}{told}, which are not read; {ORIGINAL}"
    return None


def stored_as(name: str, dtype: str, known: Iterable[str]) -> str:
    """Says why a dtype is not read."""
    if dtype.startswith(("I", "U", "BOOL")):
        return (
            f"{name} is stored as {dtype}, whole numbers: packed weights, or a table of another "
            f"architecture; needed one of {', '.join(known)}"
        )
    return (
        f"{name} is stored as {dtype}, needed one of {', '.join(known)}; convert the checkpoint "
        "to bfloat16 first"
    )


def unknown_tensor(name: str, family: Family, n_layers: int, n_nextn: int) -> str:
    """Says why a name is no tensor of its family."""
    model = family.model_type
    if ".lora_" in name or name.startswith("base_model."):
        return f"{name} is of an adapter (LoRA); merge it into its model first"
    if re.search(r"\.experts\.[a-z_]+$", name):
        return (
            f"{name} stacks the experts of a layer in one tensor; split it: needed "
            "experts.N.gate_proj.weight, up_proj.weight (the halves of gate_up_proj[N]) and "
            "down_proj.weight of every expert"
        )
    if name.endswith(".bias"):
        return (
            f"{name} is a bias (attention_bias in config.json), which {model} is not supported "
            "with; needed a checkpoint without biases"
        )
    if _TOWERS.search(name):
        return (
            f"{name} is of a model of images or sound beside the language model, which is not "
            "supported; save the language model alone"
        )
    if name.startswith("mtp."):
        return (
            f"{name} is of multi-token prediction under a name of its own; needed it in layers "
            f"from model.layers.{n_layers} on, or left out"
        )
    tail = _TAIL.search(name)
    if (
        tail is not None
        and not name.startswith("model.layers.")
        and family.match(f"model.{tail[1]}")
    ):
        return (
            f"{name} has the prefix {name[: tail.start()]!r}, needed 'model.': the names of a "
            f"whole {model} for causal language modelling; save it so, e.g. with transformers"
        )
    return (
        f"{name} is no tensor of {model} with {n_layers} layers and {n_nextn} for multi-token "
        "prediction; is config.json that of another model, or the architecture another?"
    )
