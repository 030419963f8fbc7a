"""Run by test_models.py: a tiny random model of each family through load, generate, score, one
update and sync; prints a line {family: report} in JSON. A family that fails has the traceback.

usage: model_worker.py FOLDER FAMILY...
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gradient_worker import fixed_samples, one_mini_batch  # noqa: E402

import a3po  # noqa: E402
import rollout  # noqa: E402
from model import full_weights  # noqa: E402
from shelf import ranks  # noqa: E402
from shelf.metrics import token_metrics  # noqa: E402
from verify import Grade  # noqa: E402

SIZE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256)
WIDE = SIZE | dict(head_dim=32)
GPT = dict(n_embd=64, n_layer=2, n_head=2, n_positions=256, tie_word_embeddings=True)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
FAMILIES = {  # name: (the start of its classes' names, configuration)
    "llama": ("Llama", WIDE),
    "llama_tied": ("Llama", WIDE | dict(tie_word_embeddings=True)),  # SmolLM2, Llama 3.2
    "qwen2": ("Qwen2", SIZE),
    "qwen3": ("Qwen3", WIDE),
    "gemma": ("Gemma", WIDE),
    "phi3": ("Phi3", SIZE),
    "gpt2": ("GPT2", GPT),
    "mistral": ("Mistral", WIDE | dict(sliding_window=None)),
    "mistral_window": ("Mistral", WIDE | dict(sliding_window=16)),
    "smollm3": ("SmolLM3", SIZE | dict(no_rope_layers=[1, 0])),
    "olmo2": ("Olmo2", SIZE),
    "gpt_neox": ("GPTNeoX", SIZE | dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "granite": ("Granite", SIZE | dict(logits_scaling=4.0)),
    "opt": ("OPT", SIZE | dict(ffn_dim=128, word_embed_proj_dim=64)),
    "starcoder2": ("Starcoder2", SIZE | dict(sliding_window=None)),
    "gemma2": ("Gemma2", WIDE | dict(sliding_window=16)),
    "gemma3": ("Gemma3", WIDE | dict(sliding_window=16)),
    "glm4": ("Glm4", WIDE),
    "cohere": ("Cohere", SIZE),
    "mixtral": ("Mixtral", WIDE | EXPERTS),
    "qwen3_moe": ("Qwen3Moe", WIDE | EXPERTS),
    "mamba": ("Mamba", dict(hidden_size=64, state_size=8, num_hidden_layers=2)),
}


def make(family: str, folder: Path) -> str:
    """Write a random model with the demo's tokenizer, sharper than its initialisation."""
    prefix, size = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    torch.manual_seed(0)
    kind = prefix + ("Text" if family == "gemma3" else "")
    config = getattr(transformers, kind + "Config")(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **size)
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    model = getattr(transformers, prefix + head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def follow(family: str, folder: Path, device: str) -> dict:
    """Return how far vLLM and the trainer are apart before and after an update that moves them."""
    model = make(family, folder)
    config = a3po.parse_args(["--setting=demo", f"--model={model}", "--lr=0.02",
                              "--max_prompt_length=160", "--max_response_length=48"])
    tokenizer, *_ = a3po.load_inputs(config)
    policy, inner, _, optimizer = a3po.build(config, device, "grids", None)
    engine = rollout.Engine(model, tokenizer, max_model_len=80)
    prompts = [sample.prompt for sample in fixed_samples()]
    report, old = {}, None
    for when in ("before", "after"):
        found = dict(engine.generate(prompts, 1, [9 * i for i in range(10)], max_tokens=24))
        responses = [found[i] for i in range(10)]
        for i, response in enumerate(responses):
            response.grade, response.advantage = Grade(i % 3 == 0, None), 1.0
            response.prompt = prompts[i]
        if old:  # the same tokens again: have the weights moved?
            mini_batches = one_mini_batch(old, config)
            a3po.score(policy, None, mini_batches, config)
            report["moved"] = token_metrics(mini_batches)["mismatch_mean"]
        mini_batches, old = one_mini_batch(responses, config), responses
        a3po.score(policy, None, mini_batches, config)
        report[when] = token_metrics(mini_batches)["mismatch_max"]
        if when == "before":
            metrics = a3po.update(policy, optimizer, mini_batches, config, a3po.rho_at(0, config))
            report["ratio"] = metrics["ratio_max_deviation"]
            engine.sync(full_weights(inner))
    return report


def main(folder: str, *families: str) -> None:
    device, reports = ranks.init_distributed(), {}
    for family in families:
        try:
            reports[family] = follow(family, Path(folder) / family, device)
        except Exception:
            reports[family] = traceback.format_exc()
    print(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
    ranks.leave()
