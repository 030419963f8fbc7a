"""What gpu_check.py asks of a GPU, each in a process of its own, or in one for each rank:

    python tests/tools/gpu_facts.py attention|gradient|train|speed OUT ARGUMENTS

What a function puts into `facts` is in the file OUT at once, whatever comes later.
"""

import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import a3po  # noqa: E402
import model  # noqa: E402
import rollout  # noqa: E402
from rollout import Engine, Prompt, Sample  # noqa: E402
from shelf import memory, ranks  # noqa: E402
from shelf.checkpoints import Checkpoints  # noqa: E402
from verify import Grade  # noqa: E402

GPU = torch.cuda.is_available()
# Answers, tokens that one may have with its prompt, sequences at one time. The room is a tenth of
# what all of these would need, as in the simulation of tests/README.md, whose sizes are the first
SPEED = (921, 1024, 256) if GPU else (64, 256, 48)


class Facts(dict):
    """What was found, and rank 0's in a file: a process can be killed."""

    def __init__(self, path: str):
        self.path = Path(path)

    def __setitem__(self, name: str, value) -> None:
        super().__setitem__(name, value)
        if ranks.rank() == 0:
            partial = self.path.with_suffix(".partial")
            torch.save(dict(self), partial)
            partial.replace(self.path)


def find_attention(facts: Facts) -> None:
    """Compare attention over packed sequences, four query heads to one of keys, with attention over
    each sequence alone: with torch's kernel on a GPU, with grids on a CPU."""
    kernel, device = ("varlen", "cuda") if GPU else ("grids", "cpu")
    dtype = torch.bfloat16 if GPU else torch.float32
    facts["device"] = torch.cuda.get_device_name() if GPU else "CPU"
    prompt, rng = Prompt(None, [1] * 7), np.random.default_rng(0)
    samples = [Sample(prompt, np.ones(n, np.int32), np.zeros(n, np.float32), "stop",
                      grade=Grade(True, None)) for n in rng.integers(1, 300, 8)]
    layout = model.collate(samples, device, kernel)["attention"]
    tokens = 7 + sum(len(sample.ids) for sample in samples)
    query, key, value = (torch.randn(1, heads, tokens, 64, device=device, dtype=dtype)
                         for heads in (8, 2, 2))
    attend = model.varlen_attention if GPU else model.grid_attention
    ours, begin, worst = attend(None, query, key, value, None, **layout)[0][0], 7, 0.0
    for sample in samples:
        end = begin + len(sample.ids)
        at = torch.cat([torch.arange(7), torch.arange(begin, end)]).to(device)
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x.index_select(2, at).float() for x in (query, key, value)), is_causal=True,
            enable_gqa=True)[0].transpose(0, 1)
        worst = max(worst, (ours[at[7:]].float() - alone[7:]).abs().max().item())
        begin = end
    facts["worst"] = worst


def fixed_groups(path: str) -> list[list[Sample]]:
    """Return two prompts' responses of unequal lengths, with the log-probs that the model has in
    float32 on the CPU: so every process chooses the same tokens and has ratios of about 1."""
    rng, groups = np.random.default_rng(0), []
    for lengths in ((1, 9, 40, 77, 150), (30, 64, 65)):
        prompt = Prompt(None, rng.integers(0, 1000, 21).tolist())
        groups.append([
            Sample(prompt, rng.integers(0, 1000, n).astype(np.int32), np.zeros(n, np.float32),
                   "stop", grade=Grade(i % 2 == 0, None), advantage=1.5 if i % 2 == 0 else -1.0)
            for i, n in enumerate(lengths)])
    policy, samples = model.Policy(model.load_model(path, "grids"), 1.0, 1024), [*chain(*groups)]
    with torch.no_grad():
        logprobs = policy(model.collate(samples, "cpu", "grids"))[0].numpy()
    for sample, row in zip(samples, logprobs, strict=True):
        sample.logprobs = row[: len(sample.ids)]
    return groups


def make_model(path: str, tied: bool) -> str:
    """Write a random Qwen3 of two layers, four query heads to one of keys; return the path."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        tie_word_embeddings=tied)).save_pretrained(path)
    return path


def find_gradient(facts: Facts, *jobs: str) -> None:
    """Find grad_norm and each parameter's gradient in an update of a3po's, in one micro-batch a
    rank, for each job: a head (tied or untied), device (cpu or this one), precision, --parallel."""
    here = ranks.init_distributed()
    for job in jobs:
        head, where, precision, parallel = job.split()
        with tempfile.TemporaryDirectory() as mine:
            path = ranks.on_rank_0(partial(make_model, mine, head == "tied"))
            config = a3po.parse_args([
                "--setting=demo", f"--model={path}", f"--parallel={parallel}", "--mini_batches=1",
                "--micro_batch_tokens=16384", "--max_grad_norm=1e9", "--recompute=1"])
            facts[job] = one_update(config, where if where == "cpu" else here, precision)


def one_update(config: a3po.Config, device: str, precision: str) -> dict:
    kernel, groups = "grids" if device == "cpu" else "varlen", fixed_groups(config.model)
    policy, inner, _, optimizer = a3po.build(config, device, kernel,
                                             a3po.precision_of(precision, device))
    batches, gradient = a3po.make_batches(groups, config, 0, device, kernel), {}
    for batch in chain(*batches):
        old = batch["rollout_logprobs"]
        batch |= dict(old_logprobs=old, entropy=torch.zeros_like(old))
    optimizer.register_step_pre_hook(partial(keep_gradient, inner, gradient))
    off_policy = replace(config, mini_batches=2)  # old_logprobs are those of the batch
    scaler = torch.amp.GradScaler(device.partition(":")[0], 1024, enabled=precision == "fp16")
    found = a3po.update(policy, optimizer, batches, off_policy, a3po.rho_at(0, config), scaler)
    return dict(grad_norm=found["grad_norm"], gradient=gradient)


def keep_gradient(inner: torch.nn.Module, gradient: dict, *_) -> None:
    for name, parameter in inner.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        gradient[name] = grad.float().cpu()


def find_train(facts: Facts, save: str, *flags: str) -> None:
    """Train, and find vLLM's room after its start and the device's memory whenever it sleeps.
    Without `save` a checkpoint is an empty folder."""
    start, sleep, facts["asleep"] = a3po.start_engine, Engine.sleep, []

    def watched_start(config, tokenizer, inner, precision, *rest):
        engine = start(config, tokenizer, inner, precision, *rest)
        cache = engine.llm.llm_engine.vllm_config.cache_config
        parameters = sum(parameter.numel() for parameter in inner.parameters())
        facts["held"] = memory.states(config, parameters)[0]
        facts["sequences"] = memory.engine_sizes(config, inner)["max_num_seqs"]
        facts["kv_tokens"] = cache.num_gpu_blocks * cache.block_size
        itemsize = (precision or torch.float32).itemsize
        kv_bytes = rollout.cache_bytes(inner.config, itemsize)
        facts["planned"] = cache.kv_cache_memory_bytes // kv_bytes if not GPU else (
            memory.engine_room(config, parameters, kv_bytes, facts["held"],
                               torch.cuda.get_device_properties(0).total_memory)[1])
        return engine

    def watched_sleep(engine):
        sleep(engine)
        if GPU:
            from vllm.device_allocator.cumem import CuMemAllocator

            free, total = torch.cuda.mem_get_info()
            # torch counts vLLM's pool as reserved while it sleeps, see memory.trainer_memory
            ours = torch.cuda.memory_reserved() - CuMemAllocator.instance.get_current_usage()
            now = dict(used=total - free, outside=total - free - ours)
            facts["asleep"] = [*facts["asleep"], now]

    def no_save(self, step: int, state: dict) -> None:
        (self.folder / f"step_{step}").mkdir(parents=True, exist_ok=True)

    with (patch.object(a3po, "start_engine", watched_start),
          patch.object(Engine, "sleep", watched_sleep),
          patch.object(Checkpoints, "save", Checkpoints.save if save else no_save)):
        a3po.main([*flags])


def find_speed(facts: Facts, watermark: str, *flags: str) -> None:
    """Generate answers of fixed log-normal lengths where they have little room."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    config, (answers, longest, sequences) = a3po.parse_args(a3po.with_config([*flags])), SPEED
    ranks.init_distributed()
    rng, prompt = np.random.default_rng(0), longest // 24
    lengths = rng.lognormal(np.log(0.23 * longest), 0.7, answers).astype(int)
    lengths = lengths.clip(1, longest - prompt)
    tokenizer, about = rollout.load_tokenizer(config.model, prompt, longest - prompt, "plain")
    room = sequences * longest // 10 * rollout.cache_bytes(about, 2 if GPU else 4)
    engine = Engine(config.model, tokenizer, max_model_len=longest, max_num_seqs=sequences,
                    sleeps=False, watermark=float(watermark), kv_cache_memory_bytes=room,
                    **({} if GPU else dict(block_size=32)))
    common = dict(logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True,
                  output_kind=RequestOutputKind.FINAL_ONLY)
    requests = [dict(prompt_token_ids=ids) for ids in
                rng.integers(0, len(tokenizer), (answers, prompt)).tolist()]
    params = [SamplingParams(seed=i, max_tokens=int(n), **common) for i, n in enumerate(lengths)]
    engine.llm.generate(requests[:8], SamplingParams(seed=0, max_tokens=8, **common),
                        use_tqdm=False)  # to warm up
    memory.preemptions(engine)
    began = time.perf_counter()
    engine.llm.generate(requests, params, use_tqdm=False)
    facts["seconds"] = time.perf_counter() - began
    facts["answers"], facts["tokens"] = answers, int(lengths.sum())
    facts["preemptions"] = memory.preemptions(engine)


FIND = dict(attention=find_attention, gradient=find_gradient, train=find_train, speed=find_speed)


def main(name: str, out: str, *args: str) -> None:
    FIND[name](Facts(out), *args)
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
