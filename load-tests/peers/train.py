"""Training steps beside PyTorch and transformers: the same shapes, tokens per step and optimiser, each program in turn.

Needs torch, transformers and (for --lora) peft in the Python that runs this, and a built `potstill`:
    python3 load-tests/peers/train.py target/release/potstill [--shapes 10m,135m] [--threads 1,2] [--lora]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

SHAPES = {
    "10m": dict(vocab_size=16_384, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
                num_attention_heads=4, num_key_value_heads=2),
    "135m": dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3),
}


def peer(shape: str, dtype: str, threads: int, lora: bool, rounds: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(1)
    config = Qwen2Config(**SHAPES[shape], head_dim=64, max_position_embeddings=1 << 14, tie_word_embeddings=True)
    config._attn_implementation = "sdpa"
    model = Qwen2ForCausalLM(config).float().train()
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=1e-4, weight_decay=0.05, fused=True)
    ids = torch.randint(0, config.vocab_size, (4, 512))
    best = [float("inf")] * 2
    for step in range(rounds + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step:
            best = [min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - cpu)]
    print(json.dumps({
        "tokens_per_s": ids.numel() / best[0],
        "tokens_per_cpu_s": ids.numel() / best[1],
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--shapes", default="10m,135m")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--types", default="f32,bf16", help="of the products; PyTorch's bf16 takes very long without instructions for it")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", nargs=2)
    args = parser.parse_args()
    if args.peer:
        peer(args.shapes, args.peer[0], int(args.peer[1]), args.lora, args.rounds)
        return
    lora = ["--lora"] if args.lora else []
    # Threads that spin while they wait would be charged for it.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    for key in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        environment.pop(key, None)
    for shape in args.shapes.split(","):
        for threads in args.threads.split(","):
            rounds = ["--rounds", str(args.rounds)]
            ours = [args.program, "bench", "train", "--shape", shape, "--threads", threads, "--json", *rounds, *lora]
            theirs = [sys.executable, __file__, args.program, "--shapes", shape, *rounds, *lora, "--peer"]
            commands = {f"PyTorch {kind}": [*theirs, kind, threads] for kind in args.types.split(",")}
            for kind in args.types.split(","):
                typed = [*ours, "--dtype", kind]
                commands |= {f"Potstill {kind}": typed, f"Potstill {kind}, recompute": [*typed, "--recompute"]}
            for name, command in commands.items():
                out = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout
                found = json.loads(out.splitlines()[-1] if "PyTorch" in name else out)
                print(f"{shape:5} {'LoRA ' if lora else ''}{threads} threads  {name:24}"
                      f" {found['tokens_per_cpu_s']:8.0f} tokens/CPU s {found['tokens_per_s']:8.0f} tokens/s"
                      f" {found['peak_memory'] / 2**30:6.2f} GiB", flush=True)


main()
