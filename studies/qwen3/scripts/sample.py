"""Write text sampled from the small Qwen3-MoE itself: its calibration and report documents.

    python studies/qwen3/scripts/sample.py MODEL OUT [--threads N]

Pure sampling at temperature 1 from token 0, which ends every training text, so that KL(original || candidate)
on these documents is the divergence of the two distributions, and no third-party text is needed.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DOCUMENTS = {"calibration": 480, "report": 96}
LENGTH, BATCH = 256, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(20261127)
    made = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, n in DOCUMENTS.items():
        with (args.out / f"{split}.jsonl").open("w") as file:
            for _ in range(0, n, BATCH):
                begun = torch.zeros(BATCH, 1, dtype=torch.long)
                ids = model.generate(
                    begun, attention_mask=torch.ones_like(begun), do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1,
                    suppress_tokens=[0], pad_token_id=0,
                )  # fmt: skip
                for row in ids.tolist():
                    record = {"ids": row, "domain": "code", "text": made.decode(row[1:])}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                print(split, file.tell(), flush=True)


if __name__ == "__main__":
    main()
