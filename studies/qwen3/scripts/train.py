"""Train a small Qwen3-MoE on source text of installed packages, on the CPU.

    python studies/qwen3/scripts/train.py OUT [--steps N] [--threads N]

Reads the Python and Markdown files of the packages in `PACKAGES` (all under BSD, MIT, Apache-2.0 or PSF
licences, and at the versions of constraints.txt), and the reference model's tokenizer, of which the first
`VOCABULARY` tokens stay. Writes OUT/model (a checkpoint as transformers saves it, bfloat16), OUT/ckpt.pt (a
stopped run resumes from there) and OUT/log.jsonl. What is trained depends on the number of steps and the
threads' sums alone, not on time.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).parents[3]
PACKAGES = (
    "torch", "transformers", "numpy", "pandas", "optuna", "safetensors", "lm_eval", "datasets",
    "huggingface_hub", "accelerate", "pytest", "matplotlib", "sqlalchemy", "pyarrow", "scipy", "sklearn",
)  # fmt: skip
VOCABULARY = 1536
WINDOW, BATCH = 256, 32
CORPUS_BYTES = 40_000_000
PEAK_RATE, WEIGHT_DECAY, WARM_UP = 3e-3, 0.05, 100
CONFIG = dict(
    vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, intermediate_size=512, moe_intermediate_size=256,
    num_experts=10, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
    norm_topk_prob=True, hidden_act="silu", max_position_embeddings=512, rms_norm_eps=1e-6,
    tie_word_embeddings=False, attention_bias=False, router_aux_loss_coef=0.01,
    output_router_logits=False, bos_token_id=None, eos_token_id=0,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip


def tokenizer(out: Path) -> Tokenizer:
    """Returns the reference model's tokenizer with its first tokens, and saves it beside the model."""
    source = json.loads((ROOT / "studies/reference/model/tokenizer.json").read_text())
    known = source["model"]
    known["vocab"] = {token: i for token, i in known["vocab"].items() if i < VOCABULARY}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in known["merges"]]
    known["merges"] = [m for m in pairs if "".join(m) in known["vocab"]]
    source["added_tokens"] = [t for t in source["added_tokens"] if t["id"] < VOCABULARY]
    made = Tokenizer.from_str(json.dumps(source))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(out / "model")
    return made


def corpus() -> list[str]:
    """Returns the files' texts, each once, shuffled, `CORPUS_BYTES` of them; a tenth is for evaluation."""
    texts: dict[str, str] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".md", ".rst")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > 400:
                texts.setdefault(hashlib.sha256(text.encode()).hexdigest(), text)
    shuffled = [texts[key] for key in sorted(texts)]
    random.Random(0).shuffle(shuffled)
    chosen, total = [], 0
    for text in shuffled:
        if total < CORPUS_BYTES:
            chosen.append(text[:200_000])
            total += len(chosen[-1])
    return chosen


def tokens(made: Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the token ids of texts, each ended by token 0, `(tokens,)`."""
    ids: list[int] = []
    for first in range(0, len(texts), 256):
        for encoding in made.encode_batch(texts[first : first + 256], add_special_tokens=False):
            ids += [*encoding.ids, 0]
    return np.array(ids, np.int32)


def batch(ids: np.ndarray, step: int) -> torch.Tensor:
    """Returns the windows of a step, `BATCH x (WINDOW + 1)`."""
    starts = np.random.default_rng(step).integers(0, len(ids) - WINDOW - 1, BATCH)
    return torch.from_numpy(np.stack([ids[s : s + WINDOW + 1] for s in starts]).astype(np.int64))


def rate(step: int, steps: int) -> float:
    """Returns the learning rate: a warm-up, then a cosine down to a twentieth."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return PEAK_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def loss_of(model: Qwen3MoeForCausalLM, windows: torch.Tensor, *, balance: bool) -> torch.Tensor:
    """Returns the mean negative log-likelihood, and the router's balance loss where it is trained."""
    output = model(input_ids=windows[:, :-1], output_router_logits=balance, use_cache=False)
    logits = output.logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    return loss + model.router_aux_loss_coef * output.aux_loss if balance else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    (args.out / "model").mkdir(parents=True, exist_ok=True)
    made = tokenizer(args.out)
    texts = corpus()
    held_out = tokens(made, texts[: len(texts) // 50])
    ids = tokens(made, texts[len(texts) // 50 :])
    model = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**CONFIG), dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    checkpoint, first = args.out / "ckpt.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} weights, {len(ids):,} tokens", flush=True
    )
    began = time.monotonic()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps)
        loss = loss_of(model, batch(ids, step), balance=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            with torch.no_grad():
                losses = [loss_of(model, batch(held_out, i), balance=False) for i in range(4)]
            line = {
                "step": step + 1,
                "train": round(loss.item(), 4),
                "held_out": round(float(torch.stack(losses).mean()), 4),
                "seconds": round(time.monotonic() - began),
            }
            with (args.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
    model.to(torch.bfloat16).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
