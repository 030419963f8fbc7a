"""Every knob of training with its default and source; the settings (job sizes), the presets
(methods), the command line, and the values that are refused. Sources: see HELP.
"""

import argparse
import dataclasses
import difflib
from functools import partial
from math import inf
from pathlib import Path

from shelf.ranks import UsageError, explain, world_size

KINDS = ("", "math", "choice", "code")
CELLS = ("low_prob", "high_prob", "low_entropy", "high_entropy")
LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def opt(heading: str, default, help: str, choices: tuple | None = None, *, free: bool = False,
        low: float = 0, above: float = -inf, high: float = inf, below: float = inf):
    """Describe a knob: its heading in --help, default and help; the values it may have, by name or
    low <= value <= high and above < value < below; whether a resumed run may change it (free)."""
    return dataclasses.field(default=default, metadata=dict(
        heading=heading, help=help, choices=choices, free=free, low=low, above=above, high=high,
        below=below))


what = partial(opt, "what to run")
batch = partial(opt, "batch")
rollouts = partial(opt, "rollouts")
adv = partial(opt, "advantages")
loss = partial(opt, "loss")
adam = partial(opt, "optimiser")
device = partial(opt, "devices")
log = partial(opt, "evaluation, checkpoints, logs", free=True)


@dataclasses.dataclass
class Config:
    """Every knob. The defaults are the paper's setting for Qwen3-8B-Base."""

    preset: str = what("a3po", "the method: a set of the fields below; listed at the end")
    setting: str = what("auto", "size of the job: paper, demo, or auto = paper on a GPU, else demo",
                        ("auto", "paper", "demo"), free=True)
    model: str = what("Qwen/Qwen3-8B-Base", "hub name or save_pretrained folder [P]")
    data: str = what("BytedTsinghua-SIA/DAPO-Math-17k", "files or hub data, with commas [P]")
    kind: str = what("", "what all rows of --data are, else each row's own 'kind', or math", KINDS)
    eval_data: str = what("math-ai/aime24,math-ai/aime25", "held-out, with commas [C]", free=True)
    eval_kind: str = what("", "what all rows of --eval_data are", KINDS, free=True)
    unsafe_code: bool = what(False, "run programs even if they could change your files", free=True)
    output_dir: str = what("", "run folder; off: runs/SETTING-PRESET-seedN-TIME", free=True)
    seed: int = what(0, "seed of sampling and shuffling")
    resume: str = what("", "auto: go on from the newest checkpoint there", ("", "auto"), free=True)
    config: str = what("", "a run's config.json, or a part of it: defaults; flags win", free=True)
    resume_changed: bool = what(False, "resume with flags that change method or data", free=True)
    check: bool = what(False, "check flags, data and model without training", free=True)

    steps: int = batch(300, "training steps [P]", free=True)
    prompts_per_step: int = batch(512, "prompts a step, over all ranks [P]", low=1)
    group_size: int = batch(8, "responses per prompt [C]", low=2)  # they are compared
    mini_batches: int = batch(16, "optimiser updates a step [C]", low=1)
    micro_batch_tokens: int = batch(16384, "tokens of a forward, on a rank", low=1, free=True)
    dynamic_sampling: bool = batch(True, "drop all-correct and all-wrong groups, refill [DAPO]")
    max_refills: int = batch(3, "a step draws at most 1 + N times its prompts, in 1 + N rounds")

    template: str = rollouts("auto", "auto (chat if there is one), chat, plain, text of {problem}")
    max_prompt_length: int = rollouts(1024, "tokens; longer prompts are dropped [C]", low=1)
    max_response_length: int = rollouts(8192, "tokens [C]", low=1)
    temperature: float = rollouts(1.0, "of sampling, and of the trainer's log-probs [C]", above=0)
    max_num_seqs: int = rollouts(0, "responses an engine decodes at once, 0: by room", free=True)
    gpu_memory: float = rollouts(0.0, "share of a GPU for vLLM, 0: what is left", high=1, free=True)
    kv_cache_dtype: str = rollouts("auto", "fp8: twice the room, more mismatch", ("auto", "fp8"))

    reward: str = adv("", "module:function(response, problem) instead of the built-in graders")
    advantage: str = adv("group", "group: GRPO's; raw: +1 / -1 (2506.01347)", ("group", "raw"))
    norm_std: bool = adv(True, "divide by the group's standard deviation [C]")
    overlong_buffer: int = adv(0, "soft length penalty over the last N tokens, 0 = off [DAPO]")
    positive_weight: float = adv(1.0, "weight of correct responses [P]")
    negative_weight: float = adv(1.0, "weight of incorrect responses [P]")
    rho_positive: float = adv(2.0, "initial weight of the chosen tokens of correct responses [R]")
    rho_negative: float = adv(2.0, "initial weight of the chosen tokens of incorrect ones [R]")
    positive_cell: str = adv("low_prob", "tokens chosen in correct responses [P]", CELLS)
    negative_cell: str = adv("high_prob", "tokens chosen in incorrect responses [P]", CELLS)
    token_fraction: float = adv(0.2, "share of a response's tokens chosen [C, R]", above=0, high=1)
    decay: str = adv("linear", "how rho falls to 1 [O: the form]", ("linear", "exp", "none"))
    decay_rate: float = adv(0.005, "alpha, per step [P]")

    clip_low: float = loss(0.2, "ratio clipped at 1 - clip_low [C]", high=1)
    clip_high: float = loss(0.28, "ratio clipped at 1 + clip_high [DAPO]")
    dual_clip: float = loss(0.0, "bound on ratio * |A| for A < 0; 0 = off (verl uses 3)")
    loss_agg: str = loss("token-mean", "how token losses are averaged [DAPO]", LOSS_AGGS)
    kl_coef: float = loss(0.0, "weight of the k3 KL to the initial model, or to Lp-Reg's proxy")
    proxy_kappa: float = loss(0.0, "Lp-Reg (2510.03222): proxy keeps p > kappa * max p", below=1)
    proxy_delta: float = loss(0.01, "Lp-Reg: share of the batch, of lowest p", above=0, high=1)
    entropy_fraction: float = loss(1.0, "share of the batch's tokens, those of highest entropy, "
                                   "that have a loss (2506.01939)", above=0, high=1)
    tis_cap: float = loss(2.0, "cap of the vLLM -> trainer importance weight, 0 = off [O]")

    lr: float = adam(1e-6, "AdamW learning rate [P]")
    warmup_steps: int = adam(0, "steps of linear learning-rate warm-up [C]")
    adam_beta2: float = adam(0.999, "AdamW beta2 [C]", below=1)
    weight_decay: float = adam(0.01, "AdamW weight decay [C]")
    max_grad_norm: float = adam(1.0, "gradient clipping [C]", above=0)

    parallel: str = device("fsdp", "how ranks share the model", ("fsdp", "ddp"), free=True)
    shard_ranks: int = device(0, "ranks that share one copy of the states under fsdp, 0 = all")
    precision: str = device("auto", "auto: bf16 on a GPU, fp32 on a CPU; fp16 has a smaller "
                            "mismatch (2510.26788)", ("auto", "bf16", "fp16", "fp32"))
    recompute: int = device(1, "the backward recomputes every N-th layer, 0 = none", free=True)
    compile: bool = device(False, "compile each layer (never run on a GPU)", free=True)
    offload: bool = device(False, "weights and Adam stay on the host, under fsdp", free=True)
    head_chunk: int = device(1024, "tokens whose logits exist at one time", low=1, free=True)

    eval_every: int = log(20, "steps between evaluations, 0 = only before and after")
    eval_n: int = log(8, "responses per held-out problem [C]", low=1)
    eval_limit: int = log(0, "held-out problems, 0 = all")
    eval_temperature: float = log(0.6, "temperature of held-out samples [C]", free=False)
    eval_top_p: float = log(0.95, "top_p of held-out samples [C]", above=0, high=1, free=False)
    save_every: int = log(50, "steps between checkpoints, 0 = only after the last step")
    keep_checkpoints: int = log(0, "the newest N stay on disk, 0 = all")
    log_rollouts: int = log(4, "responses a step written to rollouts.jsonl")
    log_tokens: int = log(0, "responses a step of which tokens.jsonl has all, for eval.py show")
    log_to: str = log("", "also log metrics to any of tensorboard,wandb,trackio")
    grade_timeout: float = log(10.0, "seconds a grader may take for one response", above=0)


FREE = {f.name for f in dataclasses.fields(Config) if f.metadata["free"]}

# The demo: the same job at laptop size. Every other field keeps its default.
DEMO_DIR = Path(__file__).resolve().parent.parent / "demo"
SETTINGS = {
    "paper": {},
    "demo": dict(
        model=str(DEMO_DIR / "model"), data=str(DEMO_DIR / "train.jsonl"),
        eval_data=str(DEMO_DIR / "test.jsonl"), steps=100, prompts_per_step=32, group_size=8,
        mini_batches=8, max_prompt_length=64, max_response_length=64, lr=1.5e-4, warmup_steps=5,
        adam_beta2=0.95, weight_decay=0.0, head_chunk=256, micro_batch_tokens=2048,
        eval_every=20, eval_n=4, eval_temperature=1.0, eval_top_p=1.0, save_every=0,
        recompute=0, decay_rate=0.015, log_tokens=8,
    ),
}

# Each method is the same loss with other weights: name -> (what it is, fields).
NO_SHAPING = dict(rho_positive=1.0, rho_negative=1.0)
GRPO = dict(clip_high=0.2, dynamic_sampling=False, kl_coef=0.001, loss_agg="seq-mean-token-mean")
RAW = NO_SHAPING | dict(advantage="raw", dynamic_sampling=False, clip_high=0.2)
PRESETS = {
    "a3po": ("the paper's token-level shaping on DAPO's surrogate [O]", {}),
    "a3po_exp": ("A3PO with rho decaying exponentially", dict(decay="exp")),
    "a3po_constant": ("A3PO without decay, the ablation", dict(decay="none")),
    "a3po_grpo": ("A3PO's shaping on GRPO's surrogate", GRPO),
    "grpo": ("sequence mean, symmetric clip, k3 KL to the initial model", NO_SHAPING | GRPO),
    "dr_grpo": ("GRPO without length and deviation normalisation, no KL", NO_SHAPING | GRPO | dict(
        norm_std=False, loss_agg="seq-mean-token-sum-norm", kl_coef=0.0)),
    "dapo": ("clip-higher, token mean, dynamic sampling, no KL", NO_SHAPING),
    "fork_tokens": ("DAPO on the 20 % of highest entropy", NO_SHAPING | dict(entropy_fraction=0.2)),
    "psr": ("DAPO on positive samples only", NO_SHAPING | dict(negative_weight=0.0)),
    "nsr": ("DAPO on negative samples only", NO_SHAPING | dict(positive_weight=0.0)),
    "psr_raw": ("advantage +1, correct ones only (2506.01347)", RAW | dict(negative_weight=0.0)),
    "nsr_raw": ("advantage -1, incorrect ones only (2506.01347)", RAW | dict(positive_weight=0.0)),
    "w_reinforce": ("advantage +0.1 / -1 (2506.01347)", RAW | dict(positive_weight=0.1)),
    "lp_reg": ("ratio clipped to [0, 10], k3 to a proxy on unlikely tokens with A < 0", NO_SHAPING
               | dict(clip_low=1.0, clip_high=9.0, dual_clip=10.0, proxy_kappa=0.02, kl_coef=1.0)),
    "polarity": ("A * w_pos or w_neg, the paper's best", NO_SHAPING | dict(positive_weight=0.5)),
    "token_cell": ("one cell, constant weight (--*_cell)", dict(rho_negative=1.0, decay="none")),
    "symmetric": ("control: unlikely tokens for both polarities", dict(negative_cell="low_prob")),
}


HELP = """Train a language model with A3PO, or with a method it is compared with.

Sources: [P] the paper, [R] two public reading notes of it, [C] its authors' code, [O] our reading
where none says, [DAPO] 2503.14476. Defaults are those of --setting {setting} --preset {preset}:
name others beside --help to see theirs. --dry_run [--gpus N] [--nodes N] [--gpu_gb N] measures
what a run needs, without a GPU: see shelf/plan.py. No LoRA, multi-turn, asynchronous rollouts."""


def defaults(setting: str = "auto", preset: str = "a3po") -> Config:
    """Return the configuration without further flags; of an unknown setting or preset, Config's."""
    if setting == "auto":
        import torch

        setting = "paper" if torch.cuda.is_available() else "demo"
    fields = SETTINGS.get(setting, {}) | PRESETS.get(preset, ("", {}))[1]
    return Config(**fields, setting=setting, preset=preset)


@explain("a flag is wrong", "--help has all", argparse.ArgumentError)
def parse_args(argv: list[str] | None = None) -> Config:
    """Read the flags: defaults < setting < preset < flags. Unknown ones are an error."""
    flags: dict = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS, exit_on_error=False)
    first = argparse.ArgumentParser(add_help=False, **flags)  # what the defaults depend on
    first.add_argument("--setting")
    first.add_argument("--preset")
    base = defaults(**vars(first.parse_known_args(argv)[0]))
    parser = argparse.ArgumentParser(
        "a3po.py", usage="a3po.py [--FLAG VALUE ...]",
        description=HELP.format(setting=base.setting, preset=base.preset),
        epilog="presets:\n" + "\n".join(f"  {k:15}{text}" for k, (text, _) in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter, **flags,
    )
    headings = {f.metadata["heading"]: None for f in dataclasses.fields(Config)}
    for name in headings:
        headings[name] = parser.add_argument_group(name)
    for f in dataclasses.fields(Config):
        value, choices = getattr(base, f.name), f.metadata["choices"]
        text = f"{f.metadata['help']} (default: {'off' if value == '' else value})"
        kind = dict(type=type(value), metavar="TEXT" if type(value) is str else "N")
        if type(value) is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif choices:
            kind = dict(choices=choices, metavar="|".join(filter(None, choices)))
        elif f.name == "preset":
            kind = dict(choices=PRESETS, metavar="NAME")
        headings[f.metadata["heading"]].add_argument(
            f"--{f.name}", help=text.replace("%", "%%"), **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        helps = {f.name: f.metadata["help"] for f in dataclasses.fields(Config)}
        raise UsageError(f"{unknown[0]}: no such flag{suggestion(unknown[0], helps)}")
    return dataclasses.replace(base, **vars(given) | dict(setting=base.setting))


def suggestion(word: str, helps: dict[str, str]) -> str:
    """Say which of the known words an unknown one may mean, by its parts in a help or by itself."""
    word, dashes = word.partition("=")[0].lstrip("-"), "--" * word.startswith("-")
    parts, known = {*word.split("_")}, sorted(helps, key=lambda name: len(helps[name]))
    near = [name for name in known if parts <= {*helps[name].split()}]
    near += difflib.get_close_matches(word, known, 1)
    return f", did you mean {dashes}{near[0]}?" if near else "; --help has all"


def check_config(config: Config) -> None:
    """Refuse impossible values and combinations before any work starts."""
    c = config
    for f in dataclasses.fields(c):
        low, above, high, below = (f.metadata[name] for name in ("low", "above", "high", "below"))
        value = getattr(c, f.name)
        if type(value) in (int, float) and not (low <= value <= high and above < value < below):
            left = f"({above:g}" if above >= low else f"[{low:g}"
            right = f"{high:g}]" if high < below else f"{below:g})"
            raise UsageError(f"--{f.name} {value}: give a value in {left}, {right}")
    for ok, sentence in (
        (c.prompts_per_step % world_size() == 0, f"--prompts_per_step {c.prompts_per_step} is not "
         f"divisible by the {world_size()} ranks: change one of them"),
        (world_size() % (c.shard_ranks or 1) == 0, f"--shard_ranks {c.shard_ranks} does not divide "
         f"the {world_size()} ranks"),
        (c.mini_batches <= c.prompts_per_step, f"--mini_batches {c.mini_batches}: give at most "
         f"--prompts_per_step ({c.prompts_per_step})"),
        (c.parallel == "fsdp" or not c.offload, "--offload needs --parallel fsdp"),
        (c.kl_coef or not c.proxy_kappa, "--proxy_kappa needs a --kl_coef above 0"),
        (c.overlong_buffer < c.max_response_length, f"--overlong_buffer {c.overlong_buffer}: "
         f"give less than --max_response_length ({c.max_response_length})"),
    ):
        if not ok:
            raise UsageError(sentence)
