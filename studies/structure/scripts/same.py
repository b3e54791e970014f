"""Whether two versions of the code propose, score and write the same.

    python studies/structure/scripts/same.py record CHECKOUT OUT.json [--study NAME] [--python PYTHON]
    python studies/structure/scripts/same.py compare ONE.json OTHER.json

`record` runs one set of tiny studies with the code of a checkout, through its command line alone:
random models by transformers, documents of random token ids, one thread, an empty cache. Both
versions should be run by the same interpreter (`--python`), so that the libraries are the same. The
file holds, per study: every trial (number, state, parameters, values, user and system attributes,
without times), `front.json`, the allocation files, the tables that are printed, and the sha256 of
every materialized file. `compare` says that two such files are equal trial by trial, or names the
first difference of every study, and exits with 1.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DEEPSEEK = {
    **SMALL,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 2.5,
}
QWEN3 = {
    **SMALL,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
STUDY = """schema = 1
checkpoint = "../{checkpoint}"
target = "{target}"
tokenizer = "none"
space = "space.toml"
sampler = "{sampler}"
trials = {trials}

{budget}

[calibration]
documents = "documents.jsonl"
report = "report.jsonl"
search_documents = 6
rungs = [2, 4]
measured_documents = 3
"""
DEVICE = """[budget.device]
memory = 27_100_000
context = 512
sequences = 4
reserve = "1MiB"
bandwidth = "1GB"
"""
WHOLE_DEVICE = """experts_used = [1, 2]
kv_format = ["f16", "q8_0", "q4_0"]
micro_batch = [64, 16]
"""
STUDIES = {
    "safetensors": {"checkpoint": "qwen3", "target": "safetensors", "budget": 150_000},
    "streamed": {"checkpoint": "deepseek", "target": "safetensors", "budget": 450_000,
                 "more": "\n[streamed]\ncandidates = 3\nrows = 0.5\n"},
    "device": {"checkpoint": "qwen3", "target": "gguf", "budget": DEVICE, "space": WHOLE_DEVICE},
    "evolution": {"checkpoint": "deepseek", "target": "gguf", "budget": 480_000,
                  "sampler": "evolution", "trials": 24},
    "stock": {"checkpoint": "qwen3", "target": "gguf", "budget": 170_000, "sampler": "nsga2"},
}  # fmt: skip
TIMES = {"seconds", "time", "worker", "lease", "pid", "host"}


def write_checkpoint(folder: Path, kind: str) -> None:
    """Saves a random model whose weights are large enough that every tensor matters."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

    made, values = {"deepseek": (DeepseekV3Config, DEEPSEEK), "qwen3": (Qwen3MoeConfig, QWEN3)}[
        kind
    ]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(**values), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() > 1 else 1 + p * 0.1)
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_study(folder: Path, *, checkpoint: str, target: str, budget, sampler: str = "auto",
                trials: int = 12, space: str = "", more: str = "") -> None:  # fmt: skip
    """Writes `study.toml`, its search space, and documents of random ids."""
    folder.mkdir()
    limit = budget if isinstance(budget, str) else f"[budget]\nweights = {budget}\n"
    text = STUDY.format(
        checkpoint=checkpoint, target=target, sampler=sampler, trials=trials, budget=limit
    )
    (folder / "study.toml").write_text(text + more)
    (folder / "space.toml").write_text("schema = 1\n" + space)
    for name, n in (("documents", 12), ("report", 4)):
        numbers = random.Random(name)
        rows = [{"ids": [numbers.randrange(1, 512) for _ in range(32)], "domain": "d"}
                for _ in range(n)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def without_times(value):
    """A copy of a JSON value without the keys that name times or processes."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in sorted(value.items()) if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def trials_of(journal: Path) -> list[dict]:
    """The trials of a study's journal, by number, as Optuna reads them."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    return [
        {
            "number": t.number,
            "state": t.state.name,
            "params": t.params,
            "values": t.values,
            "user_attrs": without_times(t.user_attrs),
            "system_attrs": without_times(t.system_attrs),
        }
        for t in study.get_trials()
    ]


def contents(folder: Path) -> dict:
    """Files of a folder by name: values of JSON files, sha256 of the others."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        data = path.read_bytes()
        name = str(path.relative_to(folder))
        out[name] = (
            without_times(json.loads(data))
            if path.suffix == ".json"
            else hashlib.sha256(data).hexdigest()
        )
    return out


def record(checkout: Path, python: str, names: list[str]) -> dict:
    """Runs the studies with the code of `checkout`; returns what each proposed and wrote."""
    answers = {}
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for kind in {STUDIES[name]["checkpoint"] for name in names}:
            write_checkpoint(root / kind, kind)

        def run(*arguments: str) -> str:
            shared = ("--cache", "cache", "--threads", "1", "--quiet")
            done = subprocess.run(
                [python, "-m", "allocator.cli", *arguments, *shared],
                cwd=root, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{checkout}: allocator {' '.join(arguments)}: {done.stderr}")
            return done.stdout

        for name in names:
            write_study(root / name, **STUDIES[name])
            run("search", name)
            pick = f"{name}/allocations/pick.json"
            tables = {"front": run("front", name), "explain": run("explain", pick)}
            containers = dict.fromkeys((STUDIES[name]["target"], "safetensors"))
            for container in containers:
                run("materialize", pick, f"{name}/out-{container}", "--container", container)
            answers[name] = {
                "trials": trials_of(root / name / "journal"),
                "front": without_times(json.loads((root / name / "front.json").read_text())),
                "allocations": contents(root / name / "allocations"),
                "tables": {k: v.splitlines() for k, v in tables.items()},
                "files": {c: contents(root / name / f"out-{c}") for c in containers},
            }
            print(f"{name}: {len(answers[name]['trials'])} trials", flush=True)
        print("cache: ", *sorted({p.parts[0] for p in (Path(x).relative_to(root / "cache")
              for x in (root / "cache").rglob("*"))}))  # fmt: skip
    return answers


def first_difference(one, other, at: str = "") -> str | None:
    """The path of the first place where two JSON values differ, and both values; None if none."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if (key in one) != (key in other):
                return f"{at}.{key}: only in {'ONE' if key in one else 'OTHER'}"
        pairs = [(f"{at}.{k}", one[k], other[k]) for k in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{at}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{at}: {one!r} != {other!r}"
    differences = (first_difference(a, b, path) for path, a, b in pairs)
    return next((d for d in differences if d is not None), None)


def compare(one: dict, other: dict) -> int:
    """Prints a line per study and part; 1 if anything differs."""
    differs = 0
    for name in dict.fromkeys((*one, *other)):
        if (name in one) != (name in other):
            print(f"{name}: only in {'ONE' if name in one else 'OTHER'}")
            differs = 1
            continue
        odd = {part: first_difference(one[name][part], other[name][part]) for part in one[name]}
        for part, difference in odd.items():
            if difference is not None:
                print(f"{name}: {part}{difference}")
                differs = 1
        if not any(odd.values()):
            files = sum(map(len, one[name]["files"].values()))
            print(f"{name}: equal: {len(one[name]['trials'])} trials, front, "
                  f"{len(one[name]['allocations'])} allocation files, {files} written files")  # fmt: skip
    return differs


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("record")
    p.add_argument("checkout", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--study", action="append", choices=tuple(STUDIES), help="default: all")
    p.add_argument("--python", default=sys.executable)
    p = verbs.add_parser("compare")
    p.add_argument("one", type=Path)
    p.add_argument("other", type=Path)
    args = parser.parse_args()
    if args.verb == "compare":
        return compare(*(json.loads(path.read_text()) for path in (args.one, args.other)))
    answers = record(args.checkout, args.python, args.study or list(STUDIES))
    args.out.write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
