"""How fast transformers decodes a Llama-3.1-8B-shaped model of random weights, with torch.compile and a static cache.

In bf16, or with the linear maps of its layers in 8-bit floats: a scale per output, and one per row of activations, which are made as
they come.

The context is not computed, as in Galerne's own measurement: a static cache is read whole in each step, whatever is in it.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

# Compiles, records graphs, and replays a few.
WARM = 6


def config(quick):
    small = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1_000)
    large = dict(hidden_size=4_096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128_256)
    return LlamaConfig(**(small if quick else large), max_position_embeddings=8_192, rms_norm_eps=1e-5,
                       tie_word_embeddings=False)


class Fp8Linear(torch.nn.Module):
    LARGEST = 448.0

    def __init__(self, linear):
        super().__init__()
        codes, scale = self.rounded(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.t().contiguous())

    @classmethod
    def rounded(cls, rows):
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / cls.LARGEST
        return (rows.float() / scale).to(torch.float8_e4m3fn), scale

    def forward(self, x):
        codes, scale = self.rounded(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(codes, self.codes.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        return out.reshape(*x.shape[:-1], -1)


def to_fp8(module):
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Fp8Linear(child))
        else:
            to_fp8(child)


def decode(model, batch, context, steps, device):
    length = context + WARM + steps
    cache = StaticCache(config=model.config, max_cache_len=length)
    rate = None

    def step(tokens, position):
        positions = torch.full((batch, 1), position, dtype=torch.long, device=device)
        logits = forward(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True,
                         cache_position=torch.tensor([position], device=device)).logits
        return logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        # Within inference mode, as all later ones are: otherwise the model is compiled twice.
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
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
    parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise SystemExit("torch sees no GPU")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config(args.quick)).eval()
    if args.dtype == "fp8":
        to_fp8(model.model.layers)
    for batch in map(int, args.batch.split(",")):
        rate = decode(model, batch, args.context, args.steps, device)
        torch.compiler.reset()
        print(json.dumps({"name": f"transformers {args.dtype} x {batch} at {args.context}", "value": rate, "unit": "tokens/s"}),
              flush=True)


if __name__ == "__main__":
    main()
