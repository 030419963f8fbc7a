"""The policy: token log-probabilities in chunks, batches and attention without padding, loading,
sharding, checkpoints. Neither an (N, V) tensor of logits nor a padded hidden state ever exists.

Shapes: B responses, T response tokens, N packed tokens (prompts and responses, a shared prompt
once), M tokens of whole sequences, R response tokens, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from rollout import Sample
from shelf.ranks import UsageError, explain, world_size

# ---- token log-probabilities --------------------------------------------------------------------


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities of the target tokens and entropies of their distributions, in chunks.

    hidden (N, H), weight (V, H), targets (N,) -> logprobs, entropy, proxy: each (N,) in float32.
    proxy is Lp-Reg's target for the token (no gradient): its log-probability renormalised over
    the tokens with p > kappa * max p, -inf if it is not one of them (undefined if kappa is 0).
    Logits exist for `chunk` tokens at a time and are computed again in the backward pass, so no
    (N, V) tensor is ever kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, kappa):
        logprobs = torch.empty(len(hidden), device=hidden.device)
        entropy, normaliser, proxy = (torch.empty_like(logprobs) for _ in range(3))
        for s in chunks(len(hidden), chunk):
            logits = compute_logits(hidden[s], weight, temperature)
            sampled = logits.gather(1, targets[s, None])[:, 0]
            peak = logits.amax(-1)
            probs = logits.sub_(peak[:, None]).exp()  # not normalised: the sum comes below
            total = probs.sum(-1)
            log_total = total.log()
            normaliser[s] = peak + log_total
            # not sampled - normaliser: near 0 that resolves no more than the peak does, 2e-6 at 26
            logprobs[s] = (sampled - peak).sub_(log_total)
            # sum of p (log total - logit), as a product of rows that needs no third (chunk, V)
            entropy[s] = log_total - torch.einsum("nv,nv->n", probs, logits) / total
            if kappa:  # the largest of probs is 1
                kept = (probs * (probs > kappa)).sum(-1) / total
                outside = (sampled - peak).exp() <= kappa
                proxy[s] = (logprobs[s] - kept.log()).masked_fill(outside, -torch.inf)
            del logits, probs  # before the next chunk's are made
        ctx.mark_non_differentiable(proxy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropy, proxy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _):
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normaliser)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for s in chunks(len(hidden), ctx.chunk):
            logp = compute_logits(hidden[s], weight, ctx.temperature).sub_(normaliser[s, None])
            up = grad_logprobs[s, None]
            # d logprob / d logit = onehot - p,  d entropy / d logit = -p (log p + entropy)
            if grad_entropy is None:
                grad = logp.exp_().mul_(-up)
            else:
                up_entropy = grad_entropy[s, None]
                grad = logp.exp()
                grad.mul_(logp.mul_(-up_entropy).sub_(up + up_entropy * entropy[s, None]))
            grad.scatter_add_(1, targets[s, None], up)
            if ctx.temperature != 1:
                grad.div_(ctx.temperature)
            grad = grad.to(hidden.dtype)
            grad_hidden[s] = grad @ weight
            add_product(grad_weight, grad.T, hidden[s])
            del logp, grad
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def compute_logits(hidden, weight, temperature):
    """Return hidden @ weight.T / temperature in float32: (N, H), (V, H) -> (N, V). In 16 bits the
    logits would be rounded to 0.1 at 16, by more than an update moves them."""
    if has_wide_products(hidden):
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.T.float()
    return logits if temperature == 1 else logits.div_(temperature)


def add_product(total, a, b):
    """Add a @ b to total, in float32, without a temporary of its size: (V, N), (N, H), (V, H)."""
    if has_wide_products(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def has_wide_products(x: torch.Tensor) -> bool:
    """Tell whether its products with its like, of 16 bits, can have results of 32."""
    return x.dtype != torch.float32 and x.is_cuda


def chunks(n: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, n, size)]


# ---- batches and packed attention ---------------------------------------------------------------
# A batch holds its sequences (prompt + response) without padding, a prompt that several of them
# share once. Attention alone needs whole sequences: it spreads its inputs to them, and takes back
# the first copy of each packed token. All index arrays are made on the host, from lengths.


def collate(samples: list[Sample], device: str, kernel: str) -> dict:
    """Pack samples end to end, a prompt that several share once, into a batch on the device.

    A batch holds ids and positions (N,) and "attention", see attention_layout; for each response
    token (R,) the packed token that predicts it (predictors), its id (targets) and its place in
    (B, T), counted row by row; correct (B,); and padded on the right to (B, T) mask, loss_mask,
    advantage, rollout_logprobs. Masks come from lengths, never from token ids.
    """
    ids, index, begins = [], [], {}
    for sample in samples:
        begin = begins.setdefault(id(sample.prompt), len(ids))
        if begin == len(ids):  # the first of its group
            ids += sample.prompt.ids
        index += range(begin, begin + len(sample.prompt.ids))
        index += range(len(ids), len(ids) + len(sample.ids))
        ids += sample.ids.tolist()
    ids, index = np.array(ids), np.array(index)  # (N,), (M,)
    first = np.unique(index, return_index=True)[1]  # (N,)
    prompt_lengths = np.array([len(sample.prompt.ids) for sample in samples])
    lengths = np.array([len(sample.ids) for sample in samples])
    bounds = np.concatenate([[0], (prompt_lengths + lengths).cumsum()])
    starts = np.repeat(bounds[:-1], np.diff(bounds))  # (M,)
    mask = np.arange(max(1, lengths.max())) < lengths[:, None]  # (B, T)
    row, t = mask.nonzero()
    at = bounds[row] + prompt_lengths[row] + t  # (R,), in index
    rollout_logprobs = np.zeros(mask.shape, np.float32)
    rollout_logprobs[mask] = np.concatenate([sample.logprobs for sample in samples])
    advantage = np.array([sample.advantage for sample in samples], np.float32)
    arrays = dict(
        ids=ids, positions=(np.arange(len(index)) - starts)[first],
        predictors=index[at - 1], targets=ids[index[at]], places=mask.ravel().nonzero()[0],
        correct=np.array([sample.correct for sample in samples]), mask=mask, loss_mask=mask,
        advantage=np.repeat(advantage[:, None], mask.shape[1], 1),
        rollout_logprobs=rollout_logprobs,
    )
    batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return batch | dict(attention=attention_layout(index, first, bounds, kernel, device))


def deal(samples: list[Sample], ranks: int) -> list[list[Sample]]:
    """Balance the samples' tokens over the ranks, longest first to the least loaded."""
    shares: list[list[Sample]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for sample in sorted(samples, key=lambda sample: packed_length([sample]), reverse=True):
        least = loads.index(min(loads))
        shares[least].append(sample)
        loads[least] += packed_length([sample])
    return shares


def packed_length(samples: list[Sample]) -> int:
    """Return the tokens of a batch of these samples, where a prompt that several share is once."""
    prompts = {id(sample.prompt): len(sample.prompt.ids) for sample in samples}
    return sum(prompts.values()) + sum(len(sample.ids) for sample in samples)


def pack(samples: list[Sample], token_budget: int) -> list[list[Sample]]:
    """Fill bins of at most token_budget tokens, first-fit decreasing (a longer one has its own).
    Samples of one group that fit into a bin stay together and share their prompt."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(id(sample.prompt), []).append(sample)
    items = []
    for group in groups.values():
        whole = packed_length(group) <= token_budget
        items += [group] if whole else [[sample] for sample in group]
    bins, free = [], []  # and the room in each
    for item in sorted(items, key=packed_length, reverse=True):
        size = packed_length(item)
        i = next((i for i, room in enumerate(free) if room >= size), len(bins))
        if i == len(bins):
            bins.append([])
            free.append(token_budget)
        bins[i] += item
        free[i] -= size
    return bins


def attention_layout(
    index: np.ndarray, first: np.ndarray, bounds: np.ndarray, kernel: str, device: str
) -> dict:
    """Return what the attention `kernel` ("varlen" or "grids") needs to know of a packed batch.

    index (M,) is the packed token at each place of the sequences laid end to end, of which sequence
    i takes the places bounds[i] to bounds[i + 1]; first (N,) is where each packed token comes
    first. "grids" are index arrays (sequences, length) of sequences of similar length, padded on
    the right, where causal attention needs no mask.
    """
    lengths = np.diff(bounds)
    if kernel == "varlen":
        arrays = dict(index=index, first=first, bounds=bounds.astype(np.int32))
        layout = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        return layout | dict(longest=int(lengths.max()))
    grids, place, size = [], np.empty_like(index), 0  # place: of each index in the grids end to end
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        longest = lengths[order[0]]
        similar = order[lengths[order] > 0.75 * longest]
        order = order[len(similar) :]
        inside = np.arange(longest) < lengths[similar, None]
        source = np.minimum(bounds[similar, None] + np.arange(longest), len(index) - 1)
        grids.append(torch.from_numpy(index[source]).to(device))
        place[source[inside]] = size + np.flatnonzero(inside)
        size += inside.size
    return dict(grids=grids, first=torch.from_numpy(place[first]).to(device))


def varlen_attention(module, query, key, value, attention_mask, scaling=None, *, index, first,
                     bounds, longest, **_):
    """Attend within each sequence, with torch's kernel for packed sequences (GPU). The form is
    transformers': query (1, heads, N, d), key, value (1, kv_heads, N, d) -> (1, N, heads, d). Under
    autocast, rope leaves query and key in float32: they take the dtype of value."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if len(index) > len(first):  # prompts are shared
        query, key, value = (x.index_select(0, index) for x in (query, key, value))
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling,
                      window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1])
    return out.index_select(0, first)[None], None


def grid_attention(module, query, key, value, attention_mask, scaling=None, *, grids, first, **_):
    """Attend within each sequence, one grid after the other; else like varlen_attention."""
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    outputs = []
    for grid in grids:
        q, k, v = (spread(x, grid).transpose(1, 2) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, first)[None], None


def spread(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Return x[grid]; index_select has the faster gradient."""
    return x.index_select(0, grid.flatten()).unflatten(0, grid.shape)


# ---- the policy ---------------------------------------------------------------------------------


class Policy(nn.Module):
    """A causal language model whose forward returns token log-probabilities and entropies. The
    head is applied here, inside the module that FSDP unshards, to response tokens only.

    autocast: the dtype to compute in where the weights are float32 and nothing else casts them.
    """

    def __init__(self, model: nn.Module, temperature: float, head_chunk: int,
                 proxy_kappa: float = 0.0, autocast: torch.dtype | None = None):
        super().__init__()
        self.model, self.autocast = model, autocast
        self.head = temperature, head_chunk, proxy_kappa

    def forward(self, batch: dict) -> list[torch.Tensor]:
        """Return log-probs, entropies and Lp-Reg's proxies of the batch's response tokens under
        the model, each (B, T) and 0 in the padding. batch: see collate."""
        with torch.autocast(batch["ids"].device.type, self.autocast, self.autocast is not None):
            hidden = self.model.get_decoder()(
                input_ids=batch["ids"][None], position_ids=batch["positions"][None],
                use_cache=False, **batch["attention"],
            ).last_hidden_state[0]  # (N, H)
        hidden = hidden.index_select(0, batch["predictors"]).to(self.autocast or hidden.dtype)
        weight = self.model.get_output_embeddings().weight.to(hidden.dtype)
        outputs = TokenLogprobs.apply(hidden, weight, batch["targets"], *self.head)
        blank = torch.zeros(batch["mask"].numel(), device=hidden.device)
        padded = [blank.scatter(0, batch["places"], x).view_as(batch["mask"]) for x in outputs]
        return [x.clone() for x in padded]  # FSDP warns of views


def load_model(path: str, kernel: str, recompute: int = 0) -> nn.Module:
    """Return the model on the CPU, in the dtype of its files. Dropout is off, so that the ratio of
    an unchanged policy is 1. kernel: see attention_layout; recompute: the backward pass computes
    every N-th layer again, 0 none. Raises UsageError for what Policy would compute wrongly, and for
    files that lack something."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    # For a name that has no mask function transformers makes no mask, and reads no positions back
    AttentionInterface.register("varlen", varlen_attention)
    AttentionInterface.register("grids", grid_attention)
    with explain(f"model {path!r}: its weights do not load", "get its files again"):
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", attn_implementation=kernel, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise UsageError(f"model {path!r}: {len(missing)} weights are not in its files, "
                         f"{', '.join(missing[:3])} for example: get them again")
    make_valid(model.generation_config)
    # Where vLLM has no model of its own for a family it decorates this one's class, after this
    model.get_decoder().do_not_compile = True
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UsageError(f"model {path!r}: an output layer with a bias is not supported")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if recompute:
        model.gradient_checkpointing_enable(every_n_layers=recompute)
    return model.train()


def make_valid(generation) -> None:
    """Make a GenerationConfig one that transformers agrees to write: Vicuna's has a temperature
    without do_sample. Where more is wrong BOS and EOS alone stay; nothing here uses the rest."""
    others = [name for name in vars(generation) if name not in ("bos_token_id", "eos_token_id")]
    for change in ({}, dict(do_sample=True), dict.fromkeys(others)):
        vars(generation).update(change)
        with contextlib.suppress(ValueError):
            return generation.validate(strict=True)


def distribute(policy: Policy, parallel: str, device: str, precision: torch.dtype | None = None,
               shard_ranks: int = 0, compiled: bool = False, offload: bool = False):
    """Move the policy to the device, in float32 (bf16 weights would lose updates of 1e-6), and
    share it among the ranks: "fsdp" shards every layer (FSDP2), "ddp" replicates.

    precision: the dtype that FSDP computes in; its gradients are reduced in float32. shard_ranks:
    how many ranks in a row hold one copy, those of a machine for example; 0 is all. compiled: each
    layer is. offload: weights, gradients and Adam stay on the host, under fsdp.
    """
    decoder = policy.model.get_decoder()
    layers = next(child for child in decoder.children() if isinstance(child, nn.ModuleList))
    for layer in layers if compiled else ():
        layer.compile()
    if parallel == "fsdp" and (world_size() > 1 or device != "cpu" or precision or offload):
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        shards = shard_ranks or world_size()
        shape, names = (world_size() // shards, shards), ("replicate", "shard")
        if shape[0] == 1:
            shape, names = shape[1:], names[1:]
        mesh = dist.init_device_mesh(device.partition(":")[0], shape, mesh_dim_names=names)
        options: dict = dict(mesh=mesh)
        if precision:
            options["mp_policy"] = MixedPrecisionPolicy(precision, reduce_dtype=torch.float32)
        if offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device != "cpu")
        for layer in layers:
            fully_shard(layer.float(), **options)  # moves a layer at a time: 32B is 131 GB
        return fully_shard(policy.float(), **options)
    policy = policy.to(device).float()
    if world_size() > 1:
        return nn.parallel.DistributedDataParallel(policy)
    return policy


def full_weights(model: nn.Module, dtype=None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) in layer order; every rank must iterate: gathering a shard is a
    collective. A tied head is not listed."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.to(dtype or tensor.dtype)  # before it is gathered: half the bytes
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
