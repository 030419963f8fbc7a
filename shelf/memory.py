"""What a GPU's memory holds: the trainer's states, by arithmetic, and vLLM in what they leave."""

import torch
from torch import nn

from rollout import Engine, cache_bytes
from shelf.config import Config
from shelf.ranks import UsageError, say, world_size

GIB = 1 << 30
CONTEXT = 5 << 30  # bytes, calculated: CUDA's context, NCCL's buffers, what a sleeping vLLM keeps
GRAPHS = 3 << 30  # bytes, calculated: vLLM's activations and CUDA graphs


def engine_sizes(config: Config, model: nn.Module) -> dict:
    """Return vLLM's gpu_memory and max_num_seqs beside the trainer, and say them. UsageError if it
    does not fit into the GPU."""
    if not torch.cuda.is_available():
        return dict(max_num_seqs=config.max_num_seqs or 256)
    card = torch.cuda.get_device_properties(0).total_memory
    parameters = sum(parameter.numel() for parameter in model.parameters())  # of all shards
    held, update = states(config, parameters)
    if update + CONTEXT > card:
        raise UsageError(f"it does not fit: weights, Adam and gradients take {update / GIB:.1f} "
                         f"GiB of a GPU's {card / GIB:.0f}, and CUDA needs about 5: take more GPUs "
                         "(--parallel fsdp), --offload or a smaller model")
    kv_bytes = cache_bytes(model.config, 2)
    share, room, sequences = engine_room(config, parameters, kv_bytes, held, card)
    say(f"of a GPU's {card / GIB:.0f} GiB the trainer holds {held / GIB:.1f}, vLLM has {share:.0%} "
        f"with room for {room:,} tokens of {sequences} sequences")
    return dict(gpu_memory=share, max_num_seqs=sequences)


def states(config: Config, parameters: int) -> tuple[int, int]:
    """Return the bytes that a rank's GPU holds all the time, weights, Adam's two averages and the
    reference in float32, and those with gradients. parameters: of the whole model."""
    shards = (config.shard_ranks or world_size()) if config.parallel == "fsdp" else 1
    mine = 0 if config.offload else parameters // shards
    held = (16 if config.kl_coef and not config.proxy_kappa else 12) * mine
    return held, held + 4 * mine


def engine_room(config: Config, parameters: int, kv_bytes: int, held: int, card: int) -> tuple:
    """Return vLLM's share of a GPU of `card` bytes of which the trainer holds `held`, its room in
    tokens, and how many sequences it runs at one time: those given, else what is left, and the
    sequences of a quarter of full length that fit. UsageError if there is no room for one.
    parameters: of the whole model; kv_bytes: keys and values of a token."""
    most = max(0, int(100 * (1 - (held + CONTEXT) / card))) / 100
    share = config.gpu_memory or max(0.01, min(0.9, round(most - 0.03, 2)))
    if share > most:
        raise UsageError(f"it does not fit: --gpu_memory {share:g} leaves no room for weights and "
                         f"Adam: give at most {most:g}")
    room = max(0, int(share * card) - 2 * parameters - GRAPHS) // kv_bytes
    longest = config.max_prompt_length + config.max_response_length
    if room < longest:
        raise UsageError(f"it does not fit: with {share:.0%} of a GPU vLLM has room for {room:,} "
                         f"tokens, and a response may have {longest:,}: take more GPUs")
    return share, room, config.max_num_seqs or min(512, max(64, 4 * room // longest))


def adam(policy, lr: float, beta2: float, weight_decay: float, device: str) -> torch.optim.AdamW:
    """Return the optimiser. On a GPU it is the fused one, for the other has a temporary of 4 bytes
    a parameter, and has its states already, so that vLLM sees what memory they leave."""
    fused = device != "cpu"
    optimizer = torch.optim.AdamW(policy.parameters(), lr, (0.9, beta2), weight_decay=weight_decay,
                                  fused=fused)
    for x in policy.parameters() if fused else ():
        averages = dict(exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x))
        optimizer.state[x] = dict(step=torch.zeros((), device=x.device)) | averages
    optimizer.param_groups[0]["skipped"] = 0  # see step_or_skip
    return optimizer


def preemptions(engine: Engine) -> int:
    """Return how many sequences, since the last call, lost their keys and values for want of room
    and were computed again."""
    before = getattr(engine, "preempted", 0)
    counters = [x for x in engine.llm.get_metrics() if x.name == "vllm:num_preemptions"]
    engine.preempted = sum(counter.value for counter in counters)
    return engine.preempted - before


def trainer_memory() -> float:
    """Return the most GiB of this rank's GPU that the trainer had since the last call: torch's peak
    counts vLLM's pool of weights and cache too, also while that sleeps."""
    from vllm.device_allocator.cumem import CuMemAllocator

    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pool = CuMemAllocator.instance
    return (peak - (pool.get_current_usage() if pool else 0)) / GIB
