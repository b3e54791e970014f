"""Make a trained model whose experts are 224 wide: neurons of the reference model's removed, then tuned.

    python studies/padding/scripts/narrow.py OUT [--width 224] [--steps 32] [--threads N]

Of every routed and every shared expert the neurons stay whose rows of gate and up and column of down have the
largest product of norms. The rest of the model is the reference's. All of it is then tuned towards the
reference's distribution on its calibration documents (OUT/log.jsonl), and saved in bfloat16 to OUT/model.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

REFERENCE = Path(__file__).parents[2] / "reference"
BATCH, RATE = 16, 3e-4


def documents():
    lines = (REFERENCE / "generated/calibration.jsonl").read_text().splitlines()
    rows = [json.loads(line)["ids"] for line in lines]
    length = min(map(len, rows))
    return torch.tensor([row[:length] for row in rows])


def chosen(gate, up, down, width):
    """Places of the neurons that stay, `(width,)`, in their order."""
    norms = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return norms.topk(width).indices.sort().values


def narrowed(state, config, width):
    """The reference's tensors with `width` neurons in every expert."""
    made, old = {}, config.moe_intermediate_size
    for name, tensor in state.items():
        if ".mlp.experts.gate_up_proj" in name:
            downs = state[name.replace("gate_up_proj", "down_proj")]
            firsts, lasts = [], []
            for first, down in zip(tensor, downs, strict=True):
                gate, up = first[:old], first[old:]
                stay = chosen(gate, up, down, width)
                firsts.append(torch.cat([gate[stay], up[stay]]))
                lasts.append(down[:, stay])
            made[name] = torch.stack(firsts)
            made[name.replace("gate_up_proj", "down_proj")] = torch.stack(lasts)
        elif ".shared_experts.gate_proj" in name:
            names = [
                name.replace("gate_proj", kind) for kind in ("gate_proj", "up_proj", "down_proj")
            ]
            gate, up, down = (state[n] for n in names)
            stay = chosen(gate, up, down, width * config.n_shared_experts)
            made |= dict(zip(names, (gate[stay], up[stay], down[:, stay]), strict=True))
        elif name not in made and ".shared_experts." not in name and ".mlp.experts." not in name:
            made[name] = tensor
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(REFERENCE / "model", dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(REFERENCE / "model")
    state = narrowed(teacher.state_dict(), config, args.width)
    config.moe_intermediate_size = args.width
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    student.load_state_dict(state)
    student.tie_weights()
    ids = documents()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), RATE, (0.9, 0.95), weight_decay=0.0)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "log.jsonl").open("w") as log:
        for step in range(args.steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 8) * (1 - step / args.steps)
            batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
            with torch.no_grad():
                wanted = torch.log_softmax(teacher(batch).logits, -1)
            own = torch.log_softmax(student(batch).logits, -1)
            loss = (wanted.exp() * (wanted - own)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log.write(json.dumps({"step": step, "kl": round(loss.item(), 4)}) + "\n")
            log.flush()
    student.to(torch.bfloat16).save_pretrained(args.out / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / "model" / name, args.out / "model" / name)


if __name__ == "__main__":
    main()
