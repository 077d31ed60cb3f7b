"""How fast transformers decodes a Llama-3.1-8B-shaped model of random weights in bf16, with torch.compile and a static cache.

The context is not computed, as in Galerne's own measurement: a static cache is read whole in each step, whatever is in it.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

WARM = 4


def config(quick):
    small = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1_000)
    large = dict(hidden_size=4_096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128_256)
    return LlamaConfig(**(small if quick else large), max_position_embeddings=8_192, rms_norm_eps=1e-5,
                       tie_word_embeddings=False)


def decode(model, batch, context, steps, device):
    length = context + WARM + steps
    cache = StaticCache(config=model.config, max_cache_len=length)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
    rate = None

    def step(tokens, position):
        positions = torch.full((batch, 1), position, dtype=torch.long, device=device)
        logits = forward(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True,
                         cache_position=torch.tensor([position], device=device)).logits
        return logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        # Makes the cache; compiled code takes it as it is.
        forward = model
        step(tokens, context)
        forward = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
        for index in range(WARM + steps):
            if index == WARM:
                synchronise(device)
                begin = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            tokens = step(tokens, context + index).clone()
        synchronise(device)
        rate = batch * steps / (time.perf_counter() - begin)
    return rate


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--context", type=int, default=2_048)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise SystemExit("torch sees no GPU")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config(args.quick)).eval()
    for batch in map(int, args.batch.split(",")):
        rate = decode(model, batch, args.context, args.steps, device)
        torch.compiler.reset()
        print(json.dumps({"name": f"transformers bf16 x {batch} at {args.context}", "value": rate, "unit": "tokens/s"}),
              flush=True)


if __name__ == "__main__":
    main()
