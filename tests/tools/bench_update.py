"""Benchmarks of the update, as ratios against a named peer in the same run.

    python tests/tools/bench_update.py                       log-probs, batching, shaping
    python tests/tools/bench_update.py gpu                   MFU of the update, Qwen3-1.7B's shape
    python tests/tools/bench_update.py trl --trl_python P    one RL step against TRL's trainer;
                                                             P: a Python that has trl==1.16.0

CPU figures are process time at one thread, medians of interleaved rounds; on a GPU, CUDA-event
time and the allocator's peak.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]
import numpy as np  # noqa: E402
import torch  # noqa: E402

import a3po  # noqa: E402
import rollout  # noqa: E402
from model import TokenLogprobs, collate, deal, full_weights, pack, packed_length  # noqa: E402
from rollout import Prompt, Sample  # noqa: E402
from shelf import ranks  # noqa: E402
from verify import Grade  # noqa: E402

GPU = torch.cuda.is_available()


def median_times(functions: dict, rounds: int) -> dict[str, float]:
    """Interleaved: A B A B ...; seconds of CPU (or GPU) time."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if GPU:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end) / 1000)
            else:
                began = time.process_time()
                function()
                times[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- log-probs ----------------------------------------------------------------------------------


def logprob_step(variant: str, T: int = 2048, H: int = 512, V: int = 151_936):
    """A function that runs forward and backward of log-probs and entropy, all gradients."""
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(T, H, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, device=device, dtype=dtype).mul_(H**-0.5).requires_grad_()
    targets = torch.randint(V, (T,), device=device)

    def step():
        hidden.grad = weight.grad = None
        if variant == "full":
            logp = (hidden @ weight.T).float().log_softmax(-1)
            logprobs = logp.gather(1, targets[:, None])[:, 0]
            entropy = -(logp.exp() * logp).sum(-1)
        else:
            chunk = 1024 if GPU else 256
            logprobs, entropy, _ = TokenLogprobs.apply(hidden, weight, targets, 1.0, chunk, 0.0)
        (logprobs.sum() + 0.01 * entropy.sum()).backward()
        return hidden.grad, weight.grad

    return step


def peak_memory(variant: str) -> float:
    """MiB above what inputs and parameters take, of one step in a process of its own."""
    step = logprob_step(variant)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def bench_logprobs(rounds: int) -> None:
    peaks = {}
    for variant in ("full", "chunked"):
        command = [sys.executable, __file__, "peak", variant]
        peaks[variant] = float(subprocess.run(command, capture_output=True, text=True).stdout)
    steps = {variant: logprob_step(variant) for variant in peaks}
    times = median_times(steps, rounds)
    errors = [
        ((a - b).abs().max() / a.abs().max()).item()
        for a, b in zip(steps["full"](), steps["chunked"](), strict=True)
    ]
    print("log-probs and entropy, forward + backward, T 2048, H 512, V 151936")
    for variant in peaks:
        print(f"  {variant:10} peak {peaks[variant]:7.0f} MiB   {times[variant]:6.2f} s")
    print(f"  peak: full / chunked = {peaks['full'] / peaks['chunked']:.1f} (bar 8);  time: "
          f"chunked / full = {times['chunked'] / times['full']:.2f} (bar 1.15);  gradients "
          f"differ by {max(errors):.0e} of their maximum")


# ---- batching and shaping -----------------------------------------------------------------------


def log_normal_samples(n: int, rng) -> list[Sample]:
    """Groups of 8 responses of mean length about 4k tokens, capped at 16k."""
    lengths = np.clip(rng.lognormal(np.log(4000) - 0.32, 0.8, n), 1, 16384).astype(int)
    blank, values = np.zeros(16384, np.int32), np.zeros(16384, np.float32)
    prompts = [Prompt(None, [0] * 100) for _ in range(0, n, 8)]
    return [Sample(prompts[i // 8], blank[:k], values[:k], "stop", grade=Grade(True, None),
                   advantage=1.0) for i, k in enumerate(lengths)]


def bench_batching(ranks: int = 8, budget: int = 32768) -> None:
    rng = np.random.default_rng(0)
    spread, padding = [], []
    for _ in range(16):  # the mini-batches of one step: 256 rollouts over 8 ranks
        shares = deal(log_normal_samples(256, rng), ranks)
        loads = [sum(packed_length([sample]) for sample in share) for share in shares]
        spread.append(max(loads) / np.mean(loads) - 1)
        bins = [chosen for share in shares for chosen in pack(share, budget)]
        used = sum(map(packed_length, bins))
        packed = sum(len(collate(chosen, "cpu", "varlen")["ids"]) for chosen in bins)
        padding.append(1 - used / packed)
    bins = pack(log_normal_samples(512, rng), budget)  # one rank's share of a larger batch
    unused = 1 - sum(map(packed_length, bins)) / (len(bins) * budget)
    print(f"batching, log-normal lengths (mean 4k, cap 16k), {ranks} ranks, {budget}-token bins\n"
          f"  padding {np.mean(padding):.2%} (bar 1 %);  unused budget {unused:.2%} (bar "
          f"3 %);  imbalance of a mini-batch {np.median(spread):.3%} (bar 0.5 %)")


def shape_row_by_row(advantages, correct, logprobs, mask) -> torch.Tensor:
    """The authors' way, step for step: probabilities of the whole batch, each polarity's rows
    apart, and in every row a topk over its non-zero tokens."""
    out, probs = advantages * mask, logprobs.exp() * mask
    for positive in (True, False):
        rows = (correct == positive).nonzero()[:, 0]
        for row, values in zip(rows, probs[rows], strict=True):
            valid = values.nonzero()[:, 0]
            k = max(1, int(0.2 * len(valid)))
            chosen = values[valid].topk(k, largest=not positive).indices
            out[row, valid[chosen]] *= 2.0
    return out


def bench_shaping(rounds: int, B: int = 4096, T: int = 2048) -> None:
    device = "cuda" if GPU else "cpu"
    torch.manual_seed(0)
    logprobs = -torch.rand(B, T, device=device).exp()
    mask = torch.arange(T, device=device) < torch.randint(1, T + 1, (B, 1), device=device)
    correct, advantages = torch.rand(B, device=device) < 0.5, torch.ones(B, T, device=device)
    ours = dict(rho_positive=2.0, rho_negative=2.0, token_fraction=0.2)
    batch = (advantages, correct, logprobs, mask)
    times = median_times(
        {
            "authors": lambda: shape_row_by_row(*batch),
            "ours": lambda: a3po.shape_advantages(*batch, **ours),
        },
        rounds,
    )
    print(f"shaping {B} x {T}, random lengths")
    print(f"  ours {times['ours']:.3f} s, the authors' loop {times['authors']:.3f} s: ratio "
          f"{times['authors'] / times['ours']:.1f}")


# ---- the update on a GPU ------------------------------------------------------------------------

QWEN3_1_7B = dict(vocab_size=151_936, hidden_size=2048, intermediate_size=6144, head_dim=128,
                  num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                  max_position_embeddings=32768, tie_word_embeddings=True)
PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200


def bench_gpu(rounds: int, size: dict = QWEN3_1_7B, responses: int = 64, mean: int = 4000) -> None:
    """Tokens/s, MFU and peak memory of one optimiser update of a random model in bf16."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    device = ranks.init_distributed()
    kernel, precision = ("varlen", torch.bfloat16) if GPU else ("grids", None)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(Qwen3Config(**size), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        config = a3po.parse_args(["--setting=paper", f"--model={folder}", "--parallel=fsdp",
                                  "--mini_batches=1", "--micro_batch_tokens=32768"])
        policy, model, _, optimizer = a3po.build(config, device, kernel, precision)
    rng = np.random.default_rng(0)
    samples = log_normal_samples(responses, rng)
    for i, sample in enumerate(samples):
        n = max(1, len(sample.ids) * mean // 4000)
        sample.ids = rng.integers(100, size["vocab_size"], n).astype(np.int32)
        sample.logprobs, sample.grade = np.full(n, -10, np.float32), Grade(i % 2 == 0, None)
        sample.advantage = 1.0 if sample.correct else -1.0

    def step() -> None:
        mini_batches = a3po.make_batches([samples], config, 0, device, kernel)
        a3po.update(policy, optimizer, mini_batches, config, a3po.rho_at(0, config))

    step()
    seconds = median_times({"update": step}, rounds)["update"]
    bins = pack(samples, config.micro_batch_tokens)
    tokens = sum(map(packed_length, bins))
    body = sum(p.numel() for p in model.parameters())  # the embedding is the head, too
    # 6 FLOPs a parameter and token, and attention's two products over a causal half
    attention = sum(packed_length([s]) ** 2 for s in samples) * 6 * size["num_hidden_layers"]
    attention *= size["num_attention_heads"] * size["head_dim"]
    flops = 6 * tokens * body + attention
    memory = torch.cuda.max_memory_allocated() / 2**30 if GPU else math.nan
    print(f"update of {body / 1e9:.2f} B parameters, {len(samples)} responses, {tokens} tokens: "
          f"{tokens / seconds:.0f} tokens/s, MFU {flops / seconds / PEAK_FLOPS:.1%} (bar 40 %, "
          f"recomputation not counted), peak {memory:.1f} GiB")


# ---- one RL step against TRL --------------------------------------------------------------------


def digits_are_even(response: str, problem=None) -> float:
    """A reward that a random model gets about half the time, so that every group has a signal."""
    return float(sum(int(c) for c in response if c.isdigit()) % 2 == 0)


def make_folder(folder: Path) -> None:
    """A random Qwen3 (hidden 192, 4 layers, 1.6 M parameters, one token a character) and 512
    prompts of about 25 tokens. Random, it ends a response with probability 1/128 a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocab += [f"<{i}>" for i in range(128 - len(vocab))]
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(vocab_size=128, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                num_attention_heads=6, num_key_value_heads=2, head_dim=32, bos_token_id=None,
                max_position_embeddings=1024, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(Qwen3Config(**size, pad_token_id=0, eos_token_id=1))
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for a, b in rng.integers(10 ** rng.integers(1, 7, (512, 2))):
            file.write(json.dumps(dict(prompt=f"Compute {a}+{b}. Answer:", answer="0")) + "\n")


def our_steps(folder: str, tokens: int, steps: int, warmup: int = 2) -> dict[str, float]:
    """tokens per CPU-second of the update, and of the whole step, with vLLM."""
    config = a3po.parse_args([
        "--setting=demo", "--preset=dapo", f"--model={folder}", f"--data={folder}/prompts.jsonl",
        "--eval_data=", "--template={problem}", f"--max_response_length={tokens}", "--lr=1e-4",
        "--mini_batches=1", "--no-dynamic_sampling", "--reward=bench_update:digits_are_even",
        "--tis_cap=0",
    ])
    tokenizer, sampler, *_ = a3po.load_inputs(config)
    device = ranks.init_distributed()
    policy, model, reference, optimizer = a3po.build(config, device, "grids", None)
    longest = config.max_prompt_length + config.max_response_length
    engine = rollout.Engine(folder, tokenizer, max_model_len=longest)
    judge = rollout.judge_by_function(config.reward)
    update_cpu, step_cpu, count = [], [], []
    for step in range(warmup + steps):
        began = time.process_time()
        groups, _ = a3po.sample_groups(engine, tokenizer, judge, sampler, config, {})
        sampled = time.process_time()
        a3po.set_advantages(groups, config)
        mini_batches = a3po.make_batches(groups, config, step, device, "grids")
        a3po.score(policy, reference, mini_batches, config)
        a3po.update(policy, optimizer, mini_batches, config, a3po.rho_at(step, config))
        update_cpu.append(time.process_time() - sampled)
        engine.sync(full_weights(model))
        step_cpu.append(time.process_time() - began)
        count.append(sum(len(sample.ids) for group in groups for sample in group))
    total = sum(count[warmup:])
    return dict(update=total / sum(update_cpu[warmup:]), step=total / sum(step_cpu[warmup:]),
                length=total / steps / 256)


def bench_trl(trl_python: str, rounds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        for tokens in (64, 256):
            results: dict[str, list[dict]] = {"ours": [], "trl": []}
            for _ in range(rounds):
                for name, python, script in (
                    ("ours", sys.executable, [__file__, "our_steps"]),
                    ("trl", trl_python, [str(HERE / "bench_trl.py")]),
                ):
                    command = [python, *script, folder, str(tokens), str(steps)]
                    done = subprocess.run(command, capture_output=True, text=True, cwd=folder,
                                          env=os.environ | dict(HF_HUB_OFFLINE="1"))
                    if done.returncode:
                        sys.exit(done.stderr[-3000:])
                    results[name].append(json.loads(done.stdout.splitlines()[-1]))
            median = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
                      for name, runs in results.items()}
            ours, trl = median["ours"], median["trl"]
            print(f"one RL step, 32 prompts x 8, up to {tokens} tokens (mean ours "
                  f"{ours['length']:.0f}, TRL {trl['length']:.0f}); tokens per CPU-second")
            for key, bar in (("update", 1.5 if tokens == 64 else 2.0), ("step", 1.0)):
                print(f"  {key:7} ours {ours[key]:7.0f}  TRL {trl[key]:7.0f}  ratio "
                      f"{ours[key] / trl[key]:.2f} (bar {bar})", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        return print(peak_memory(sys.argv[2]))
    if sys.argv[1:2] == ["our_steps"]:
        return print(json.dumps(our_steps(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["logprobs", "batching", "shaping"],
                        help="of logprobs, batching, shaping, gpu, trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="RL steps a round (trl)")
    parser.add_argument("--trl_python", default="", help="a Python interpreter that has TRL")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for what in args.what:
        if what == "trl":
            bench_trl(args.trl_python, args.rounds, args.steps)
        elif what == "logprobs":
            bench_logprobs(args.rounds)
        elif what == "shaping":
            bench_shaping(args.rounds)
        elif what == "batching":
            bench_batching()
        elif what == "gpu":
            bench_gpu(args.rounds) if GPU else print("gpu: not run, there is none")
        else:
            parser.error(f"unknown benchmark {what!r}")


if __name__ == "__main__":
    main()
    ranks.leave()
