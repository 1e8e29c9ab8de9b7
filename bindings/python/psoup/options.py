"""The options of each call as types, for editors and type checkers.

Written by generate_abi.py from include/psoup/*.h; do not edit.
"""

from __future__ import annotations

from typing import Sequence, TypedDict, Union



class ContextOptions(TypedDict, total=False):
    # "cpu", "cuda" (the first GPU) or "cuda:N"; NULL means "cpu". A GPU is opened by what first
    # uses it, a model or a merger: there it is told why it cannot be; default None
    device: str
    # worker threads; 0 means one per processor that the process may use; default 0
    threads: int
    # "generic", "avx2", "avx512" (x86-64), "neon" (aarch64): the instruction set of the CPU
    # kernels; NULL means the best the machine has. Results carry the same bits for equal input,
    # build and instruction set; default None
    isa: str


class CommOptions(TypedDict, total=False):
    # default 0
    rank: int
    # default 1
    world: int
    # of the ranks on this machine; local_world 0: not known; default 0
    local_rank: int
    # of the ranks on this machine; local_world 0: not known; default 0
    local_world: int
    # default 29500
    port: int
    # seconds in which all have to be there; default 600
    timeout: int
    # rank 0: a socket that listens already, taken over also on failure; −1: none; default -1
    listener: int
    # rank 0's host name or address; default None
    address: str


class ModelConfig(TypedDict, total=False):
    # default 0
    vocab_size: int
    # default 0
    hidden_size: int
    # default 0
    intermediate_size: int
    # default 0
    num_hidden_layers: int
    # default 0
    num_attention_heads: int
    # 0: as many as attention heads; default 0
    num_key_value_heads: int
    # 0: hidden_size / num_attention_heads; default 0
    head_dim: int
    # default 2048
    max_position_embeddings: int
    # default 1e-06
    rms_norm_eps: float
    # default 10000.0
    rope_theta: float
    # psoup_rope_scaling; default 0
    rope_scaling: Union[int, str]
    # default 1.0
    rope_factor: float
    # default 1.0
    rope_low_freq_factor: float
    # default 4.0
    rope_high_freq_factor: float
    # default 0
    rope_original_max_position: int
    # default 32.0
    rope_beta_fast: float
    # default 1.0
    rope_beta_slow: float
    # YaRN; 0: 0.1 ln(factor) + 1; default 0
    rope_attention_factor: float
    # q, k, v and o have biases; default 0
    attention_bias: int
    # q, k, v alone have (Qwen2); default 0
    qkv_bias: int
    # default 0
    mlp_bias: int
    # default 0
    tie_word_embeddings: int
    # −1: none; default -1
    bos_token_id: int
    # −1: none; default -1
    eos_token_id: int
    # −1: none; default -1
    pad_token_id: int
    # psoup_dtype of the stored weights: F32, F16 or BF16; default 0
    torch_dtype: Union[int, str]
    # default 0.02
    initializer_range: float
    # that end a text as eos_token_id does; −1: none; default (-1, -1, -1, -1, -1, -1, -1)
    more_eos_token_ids: Sequence[int]
    # since 0.4: how the layers' linears are kept while frozen: 0: as torch_dtype says; PSOUP_INT8,
    # PSOUP_NF4: in blocks, see below; default 0
    linear_dtype: int


class LoadOptions(TypedDict, total=False):
    # −1: as the files have it. PSOUP_F32, F16, BF16: of all matrices, rounded to nearest.
    # PSOUP_INT8, NF4: of the layers' linears; embedding and head stay as they are; default -1
    dtype: Union[int, str]


class AdapterOptions(TypedDict, total=False):
    # default 16
    rank: int
    # scale = alpha / rank; above 0; default 32.0
    alpha: float
    # scale = alpha / sqrt(rank) instead; default 0
    rslora: int
    # default 5
    targets: Union[int, str, Sequence[str]]
    # A is uniform(−1/√in, 1/√in) (PEFT's kaiming_uniform, a = √5), B is 0; default 0
    seed: int


class Sampling(TypedDict, total=False):
    # default 128
    max_new_tokens: int
    # until then stop tokens have probability 0; default 0
    min_new_tokens: int
    # 0: greedy; default 1.0
    temperature: float
    # 0: off; default 0
    top_k: int
    # 1: off; default 1.0
    top_p: float
    # 0: off; over prompt and output, as transformers has it; default 0
    no_repeat_ngram_size: int
    # sample on past stop tokens, to max_new_tokens; default 0
    ignore_stop: int
    # default 0
    seed: int


class SessionOptions(TypedDict, total=False):
    # places; 0: 32. A sequence takes one, by PSOUP_MIX_LOGITS one for each policy; default 0
    max_sequences: int
    # tokens a place can hold; 0: max_position_embeddings; default 0
    max_tokens: int
    # prompt tokens taken in one step at most; 0: 512; default 0
    prefill_rows: int
    # since 0.3: tokens that the cache holds of all sequences together, as keys and values; one
    # waits until there is room for its prompt and longest answer. 0: max_sequences · max_tokens. At
    # least one sequence of max_tokens always fits; default 0
    cache_tokens: int
    # since 0.3: tokens that a GPU decodes of every sequence before the host looks again, 1 to 1024;
    # 0: 8. Callbacks come that late, results are the same. The CPU takes one; default 0
    steps: int


class FeedbackOptions(TypedDict, total=False):
    # see psoup_template_fill; default None
    prompt_template: str
    # decoding together; 0: 64; default 0
    max_sequences: int
    # of the sampling and of which positive meets whom; default 0
    seed: int
    # since 0.5: psoup_mix_method, how the mix weighs; default 0
    mix_method: Union[int, str]


class MergerOptions(TypedDict, total=False):
    # psoup_merge_method. The three of factors, and peft_linear, are of adapters; PSOUP_MERGE_DELTA
    # of full models is their weighted sum; default 0
    method: Union[int, str]
    # for PSOUP_MERGE_SVD, and for methods of whole tensors that make one adapter of adapters;
    # default 0
    svd_rank: int
    # accept weights that do not sum to 1 within 1e-6; methods of task vectors, and those that
    # normalise, always do; default 0
    any_sum: int
    # psoup_dtype of the output; −1: that of the base or first source; default -1
    dtype: Union[int, str]
    # psoup_merge_peer; default 0
    peer: Union[int, str]
    # psoup_merge_format; default 0
    format: Union[int, str]
    # most bytes of tensors in one safetensors file; 0: one file; default 0
    shard_size: int
    # the part of a task vector that stays, 0 to 1; default 1.0
    density: float
    # breadcrumbs: the part that is cut off as the largest; default 0.01
    gamma: float
    # della: the half width of the densities around density; default 0.15
    epsilon: float
    # multiplies the merged task vector; default 1.0
    lambda_: float
    # slerp: 0 is the first, 1 the second; PSOUP_MERGE_UNSAID, which slerp refuses; default -1e+308
    t: float
    # 0, 1, or −1: as the peer has it; default -1
    normalize: int
    # 0, 1, or −1: as the peer has it; default -1
    rescale: int
    # of DARE and DELLA; default 0
    seed: int
    # put the SHA-256 of every source file into the certificate: reads them once more; default 0
    sha256: int
    # continue from the shards that a killed run of the same merge has finished, and keep finished
    # shards where this run fails; of tensors that the caller holds, which may be others now, none
    # is taken over; default 0
    resume: int
    # most bytes of adapters' factors (f32) that stay in memory from one run to the next; 0: none.
    # −1: 64 MiB, and 1 GiB from the first psoup_merger_set_weights on. Since 0.4; default -1
    keep_bytes: int
    # of delta, factors, svd and peft_linear of adapters: multiplies the weights, whose sum is
    # checked before. What a scalar head (score) is merged by it leaves alone. Methods of task
    # vectors have `lambda`. Since 0.4; default 1.0
    strength: float


class SftOptions(TypedDict, total=False):
    # default 1
    epochs: int
    # optimiser steps; 0: epochs decide; default 0
    max_steps: int
    # tokens of one micro-batch at most: examples are packed without padding, and never attend to
    # one another; default 1024
    batch_tokens: int
    # micro-batches of one optimiser step; default 1
    accumulation: int
    # default 1e-05
    learning_rate: float
    # default 0.9
    beta1: float
    # default 0.999
    beta2: float
    # default 1e-08
    epsilon: float
    # default 0
    weight_decay: float
    # 0: not clipped; default 1.0
    max_grad_norm: float
    # psoup_schedule; default 0
    schedule: Union[int, str]
    # default 0
    warmup_steps: int
    # default 0
    lora_dropout: float
    # 1: every token counts; default 0
    loss_on_prompt: int
    # steps; 0: at the end only; default 0
    validate_every: int
    # 1: end with the weights of the lowest validation loss; default 1
    keep_best: int
    # default 0
    seed: int
    # JSON Lines file that every report is appended to; NULL: none; default None
    metrics: str
    # where the run is kept, so that it can go on; NULL: nowhere; default None
    checkpoint_dir: str
    # optimiser steps between checkpoints; 0: when it is stopped only; default 100
    checkpoint_every: int
    # so many stay; default 3
    checkpoint_keep: int
    # 1: continue from the newest checkpoint in checkpoint_dir, where there is one; default 0
    resume: int
    # elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not; default
    # 0
    max_grad_value: float
    # since 0.4; 1: keep each layer's input alone, and run the layer again in the backward. Less
    # memory, more time, the same bits: docs/training.md; default 0
    gradient_checkpointing: int


class RewardOptions(TypedDict, total=False):
    # default 1
    epochs: int
    # default 0
    max_steps: int
    # comparisons of one micro-batch, per reward model; default 8
    batch_size: int
    # default 1
    accumulation: int
    # default 2e-05
    learning_rate: float
    # default 0.9
    beta1: float
    # default 0.999
    beta2: float
    # default 1e-08
    epsilon: float
    # default 0.001
    weight_decay: float
    # default 0
    max_grad_norm: float
    # default 1
    schedule: Union[int, str]
    # default 0
    warmup_steps: int
    # default 0
    lora_dropout: float
    # loss −log σ(r_w − r_l − margin); default 0
    margin: float
    # adds centering · mean((r_w + r_l)²); default 0
    centering: float
    # longer rows keep their first tokens; 0: max_position_embeddings; default 512
    max_tokens: int
    # default 0
    validate_every: int
    # by validation accuracy, then loss; default 1
    keep_best: int
    # default 0
    seed: int
    # default None
    metrics: str
    # where the run is kept, so that it can go on; NULL: nowhere; default None
    checkpoint_dir: str
    # optimiser steps between checkpoints; 0: when it is stopped only; default 100
    checkpoint_every: int
    # so many stay; default 3
    checkpoint_keep: int
    # 1: continue from the newest checkpoint in checkpoint_dir, where there is one; default 0
    resume: int
    # elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not; default
    # 0
    max_grad_value: float
    # 1: each comparison's own margin is added to `margin`; default 0
    margins: int
    # since 0.4; 1: keep each layer's input alone, and run the layer again in the backward. Less
    # memory, more time, the same bits: docs/training.md; default 0
    gradient_checkpointing: int


class DpoOptions(TypedDict, total=False):
    # default 1
    epochs: int
    # default 0
    max_steps: int
    # pairs of one micro-batch, per policy; default 8
    batch_size: int
    # default 1
    accumulation: int
    # default 1e-05
    learning_rate: float
    # default 0.9
    beta1: float
    # default 0.999
    beta2: float
    # default 1e-08
    epsilon: float
    # default 0
    weight_decay: float
    # default 1.0
    max_grad_norm: float
    # default 1
    schedule: Union[int, str]
    # default 0
    warmup_steps: int
    # default 0
    lora_dropout: float
    # how dearly the policy pays for leaving the reference; default 0.1
    beta: float
    # the share of pairs taken to be the wrong way round; 0 to 0.5; default 0
    label_smoothing: float
    # longer rows keep their first tokens; 0: max_position_embeddings; default 1024
    max_tokens: int
    # default 0
    validate_every: int
    # by validation accuracy, then loss; default 1
    keep_best: int
    # default 0
    seed: int
    # default None
    metrics: str
    # where the run is kept, so that it can go on; NULL: nowhere; default None
    checkpoint_dir: str
    # optimiser steps between checkpoints; 0: when it is stopped only; default 100
    checkpoint_every: int
    # so many stay; default 3
    checkpoint_keep: int
    # 1: continue from the newest checkpoint in checkpoint_dir, where there is one; default 0
    resume: int
    # elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not; default
    # 0
    max_grad_value: float
    # since 0.4; 1: keep each layer's input alone, and run the layer again in the backward. Less
    # memory, more time, the same bits: docs/training.md; default 0
    gradient_checkpointing: int
    # what each token of a response costs the policy: below. Since 0.5; default 0
    length_penalty: float


class PpoSoup(TypedDict, total=False):
    # 1 to 64; default 0
    n: int
    # 1 and equal weights: uniform over the simplex; large: ever closer to the weights' own shares,
    # which INFINITY gives; 0: always one adapter, drawn by the weights; default 1.0
    concentration: float


class PpoOptions(TypedDict, total=False):
    # 0: one epoch over the prompts; default 0
    steps: int
    # rollouts of one step, per policy; default 64
    batch_size: int
    # rollouts of one optimiser step; 0: the whole batch; default 0
    mini_batch_size: int
    # > 0: the loss is the mean over the tokens of each so many rollouts, averaged over these groups
    # (the paper's code: micro-batches of 2); 0: over all tokens of the mini-batch. With RLOO read
    # responses for tokens; default 0
    loss_group: int
    # default 8
    ppo_epochs: int
    # tokens of one packed pass; changes memory, not results' meaning; default 4096
    micro_batch_tokens: int
    # default 1.4e-05
    learning_rate: float
    # default 0.9
    beta1: float
    # default 0.999
    beta2: float
    # default 1e-08
    epsilon: float
    # default 0
    weight_decay: float
    # 0: not clipped; default 1.0
    max_grad_norm: float
    # default 1.0
    gamma: float
    # default 0.95
    lambda_: float
    # default 0.2
    clip_range: float
    # default 0.2
    clip_range_value: float
    # default 0.1
    value_coefficient: float
    # psoup_early_stop: after an epoch with mean(log π_old − log π) > 1.5 ·; default 1
    early_stop: Union[int, str]
    # target_kl; default 0.1
    target_kl: float
    # β at the start; default 0.2
    kl_coefficient: float
    # default 1
    adaptive_kl: int
    # default 6.0
    kl_target: float
    # default 10000.0
    kl_horizon: float
    # a mini-batch whose mean ratio exceeds it is skipped; default 10.0
    ratio_threshold: float
    # 1: a skipped mini-batch still steps the optimiser, with zero gradient; default 0
    skipped_step: int
    # the first: scores in deviations from their running mean; default 1
    normalize_reward: int
    # the first: scores in deviations from their running mean; default 1
    whiten_advantages: int
    # whiten in this many equal parts of the batch; the code had one a rank; default 1
    whiten_groups: int
    # in updates only; default 0
    lora_dropout: float
    # in updates only; default 0
    head_dropout: float
    # default 511
    max_new_tokens: int
    # default 0
    min_new_tokens: int
    # > 0: each group's limit is uniform on from … max_new_tokens; default 0
    draw_new_tokens_from: int
    # prompts that share a drawn limit; default 4
    draw_group: int
    # 1: sample past end tokens, cut after the first; default 0
    ignore_stop: int
    # default 1.0
    temperature: float
    # default 1.0
    top_p: float
    # default 0
    top_k: int
    # subtracted from the score of a response without an end token, in training: "reward" and what
    # keep_best compares have no penalties in them; default 0
    truncation_penalty: float
    # 1: rewards read the decoded text, tokenised again (needs tokenizer); default 0
    reward_text: int
    # longer reward inputs keep their first tokens; default 512
    reward_max_tokens: int
    # decoding together; 0: all of a step, on the CPU 256 of them; default 0
    max_sequences: int
    # steps; 0: at the end only; default 0
    validate_every: int
    # default 1
    keep_best: int
    # default None
    metrics: str
    # where the run is kept, so that it can go on; NULL: nowhere; default None
    checkpoint_dir: str
    # PPO steps between checkpoints; 0: when it is stopped, or samples for long, only; default 10
    checkpoint_every: int
    # so many stay; default 3
    checkpoint_keep: int
    # 1: continue from the newest checkpoint in checkpoint_dir, where there is one; default 0
    resume: int
    # psoup_objective; default 0
    objective: Union[int, str]
    # responses to each prompt with RLOO and GRPO; divides batch_size; default 4
    group_size: int
    # psoup_kl_estimator; default 0
    kl_estimator: Union[int, str]
    # 0: never; default 0
    samples_every: int
    # how many prompts: the first ones; default 4
    samples_count: int
    # JSON Lines file of "step", "policy", "id", "prompt", "response" (texts where there is a
    # tokenizer, ids otherwise), "score" and "finish"; NULL: none. A run that goes on repeats its
    # bytes, as with metrics; default None
    samples: str
    # psoup_scale_rewards, of GRPO; default 0
    scale_rewards: Union[int, str]
    # elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not; default
    # 0
    max_grad_value: float
    # a normalised score is kept within ± this; 0: not; default 0
    reward_clip: float
    # 1: as resume; and policies at the list's end that the checkpoint has not yet begin now, also
    # where the others are done, whose weights keep their bytes. On the CPU a policy ends with the
    # bytes that it would have if it had been there from the start; default 0
    join: int
    # of the 4-grams of a step's responses more than this share repeat one before; default 0.5
    warn_repetition: float
    # more than this share of a step's responses are an end token and nothing else; default 0.25
    warn_empty: float
    # from one half of the last warn_window steps to the other the mean reward rose by more
    # deviations than this, at a KL that cannot buy such a rise; default 1.0
    warn_reward_rise: float
    # KL grew by more than this factor, and above 1, while the mean reward fell; default 2.0
    warn_kl_growth: float
    # steps, 4 to 64; default 16
    warn_window: int
    # 1: as in psoup_sft_options, in updates; default 0
    gradient_checkpointing: int
    # 1: each of several rewards is normalised by its own moments, and then weighted; 0: their
    # weighted sum is. A soup's are apart in any case; default 0
    normalize_apart: int
    # subtracted from the reward for each token of a response beyond length_target, in; default 0
    length_penalty: float
    # units of the normalised score; default 0
    length_target: int
    # 0 to 1: so much of the linear trend of a reward's scores with the response's length is taken
    # out of them: docs/method.md. Since 0.5; default 0
    length_correction: float


class BestOptions(TypedDict, total=False):
    # answers to each prompt; default 4
    n: int
    # 1: rewards read the decoded text, tokenised again (needs tokenizer); default 0
    reward_text: int
    # default 0
    n_rewards: int
    # longer reward inputs keep their first tokens; 0: what the model can hold; default 512
    reward_max_tokens: int
    # default 0
    n_sources: int
