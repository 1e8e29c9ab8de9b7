"""The binary interface of libpsoup: its enums, structs, callbacks and functions.

Written by generate_abi.py from include/psoup/*.h; do not edit.
"""

from ctypes import (
    c_char, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t,
    c_uint32, c_uint64, c_void_p, CFUNCTYPE, POINTER, Structure,
)
from enum import IntEnum
from typing import Any, Dict, List, Tuple

# ---- enums -------------------------------------------------------------------------------------


class Status(IntEnum):
    OK = 0
    ERROR_ARGUMENT = 1
    ERROR_MEMORY = 2
    ERROR_IO = 3
    ERROR_FORMAT = 4
    ERROR_UNSUPPORTED = 5
    ERROR_STATE = 6
    ERROR_CANCELLED = 7


class Dtype(IntEnum):
    F32 = 0
    F16 = 1
    BF16 = 2
    F64 = 3
    I8 = 4
    U8 = 5
    I16 = 6
    I32 = 7
    I64 = 8
    BOOL = 9
    F8_E4M3 = 10
    F8_E5M2 = 11
    Q8_0 = 12
    INT8 = 13
    NF4 = 14


class LogLevel(IntEnum):
    INFO = 0
    WARNING = 1


class JsonType(IntEnum):
    NULL = 0
    BOOL = 1
    INTEGER = 2
    REAL = 3
    STRING = 4
    ARRAY = 5
    OBJECT = 6


class FieldType(IntEnum):
    INT = 0
    UINT64 = 1
    FLOAT = 2
    DOUBLE = 3
    BOOL = 4
    STRING = 5
    ENUM = 6
    JSON = 7


PSOUP_ADD_SPECIAL = 1
PSOUP_PLAIN_SPECIAL = 2


class RopeScaling(IntEnum):
    DEFAULT = 0
    LINEAR = 1
    LLAMA3 = 2
    YARN = 3
    DYNAMIC = 4


PSOUP_Q_PROJ = 1
PSOUP_K_PROJ = 2
PSOUP_V_PROJ = 4
PSOUP_O_PROJ = 8
PSOUP_GATE_PROJ = 16
PSOUP_UP_PROJ = 32
PSOUP_DOWN_PROJ = 64
PSOUP_ALL_LINEAR = 127


class MixMethod(IntEnum):
    DELTA = 0
    FACTORS = 1
    LOGITS = 2


PSOUP_GRADIENT_BASE = 1
PSOUP_GRADIENT_ADAPTERS = 2
PSOUP_GRADIENT_MIX = 4


class Finish(IntEnum):
    NONE = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3


PSOUP_A_WINS = 1
PSOUP_TIE = 0
PSOUP_B_WINS = -1
PSOUP_UNPARSED = 2


class MergeMethod(IntEnum):
    DELTA = 0
    FACTORS = 1
    SVD = 2
    LINEAR = 3
    TASK_ARITHMETIC = 4
    TIES = 5
    DARE_LINEAR = 6
    DARE_TIES = 7
    DELLA = 8
    DELLA_LINEAR = 9
    BREADCRUMBS = 10
    BREADCRUMBS_TIES = 11
    SLERP = 12
    NUSLERP = 13
    MODEL_STOCK = 14
    PASSTHROUGH = 15
    MAGNITUDE_PRUNE = 16
    PEFT_LINEAR = 17


class MergePeer(IntEnum):
    PAPER = 0
    MERGEKIT = 1
    PEFT = 2


class MergeFormat(IntEnum):
    AS_SOURCES = 0
    GGUF = 1


class MergePlace(IntEnum):
    HOST = 0
    DEVICE = 1


class Schedule(IntEnum):
    CONSTANT = 0
    LINEAR = 1
    COSINE = 2


class EarlyStop(IntEnum):
    OFF = 0
    ALL = 1
    LAST = 2


class Objective(IntEnum):
    PPO = 0
    RLOO = 1
    GRPO = 2


class KlEstimator(IntEnum):
    DEFAULT = 0
    K1 = 1
    K2 = 2
    K3 = 3


class ScaleRewards(IntEnum):
    GROUP = 0
    NONE = 1
    BATCH = 2


ENUMS = {  # by their C names
    "psoup_status": Status,
    "psoup_dtype": Dtype,
    "psoup_log_level": LogLevel,
    "psoup_json_type": JsonType,
    "psoup_field_type": FieldType,
    "psoup_rope_scaling": RopeScaling,
    "psoup_mix_method": MixMethod,
    "psoup_finish": Finish,
    "psoup_merge_method": MergeMethod,
    "psoup_merge_peer": MergePeer,
    "psoup_merge_format": MergeFormat,
    "psoup_merge_place": MergePlace,
    "psoup_schedule": Schedule,
    "psoup_early_stop": EarlyStop,
    "psoup_objective": Objective,
    "psoup_kl_estimator": KlEstimator,
    "psoup_scale_rewards": ScaleRewards,
}

# ---- structs and callbacks: the names are C's -------------------------------------------------


class psoup_error(Structure):
    pass


class psoup_allocator(Structure):
    pass


class psoup_context(Structure):
    pass


class psoup_context_options(Structure):
    pass


class psoup_comm(Structure):
    pass


class psoup_comm_options(Structure):
    pass


class psoup_json(Structure):
    pass


class psoup_jsonl_reader(Structure):
    pass


class psoup_jsonl_writer(Structure):
    pass


class psoup_named_tensor(Structure):
    pass


class psoup_field(Structure):
    pass


class psoup_tokenizer(Structure):
    pass


class psoup_offset(Structure):
    pass


class psoup_model(Structure):
    pass


class psoup_model_config(Structure):
    pass


class psoup_load_options(Structure):
    pass


class psoup_adapter_options(Structure):
    pass


class psoup_row(Structure):
    pass


class psoup_gradients(Structure):
    pass


class psoup_sampling(Structure):
    pass


class psoup_prompt(Structure):
    pass


class psoup_session(Structure):
    pass


class psoup_session_options(Structure):
    pass


class psoup_generation(Structure):
    pass


class psoup_completion(Structure):
    pass


class psoup_memory(Structure):
    pass


class psoup_preference(Structure):
    pass


class psoup_preferences(Structure):
    pass


class psoup_question(Structure):
    pass


class psoup_judge(Structure):
    pass


class psoup_instruction(Structure):
    pass


class psoup_feedback_options(Structure):
    pass


class psoup_feedback_counts(Structure):
    pass


class psoup_duel(Structure):
    pass


class psoup_rate(Structure):
    pass


class psoup_merger_options(Structure):
    pass


class psoup_merger(Structure):
    pass


class psoup_merge_sink(Structure):
    pass


class psoup_merge_tensors(Structure):
    pass


class psoup_merge_report(Structure):
    pass


class psoup_lora_factors(Structure):
    pass


class psoup_merge_view(Structure):
    pass


class psoup_merge_device(Structure):
    pass


class psoup_merge_module(Structure):
    pass


class psoup_gpu_merge(Structure):
    pass


class psoup_step(Structure):
    pass


class psoup_training(Structure):
    pass


class psoup_example(Structure):
    pass


class psoup_sft_options(Structure):
    pass


class psoup_reward(Structure):
    pass


class psoup_comparison(Structure):
    pass


class psoup_reward_options(Structure):
    pass


class psoup_dpo_pair(Structure):
    pass


class psoup_dpo_options(Structure):
    pass


class psoup_reward_input(Structure):
    pass


class psoup_ppo_prompt(Structure):
    pass


class psoup_rollout(Structure):
    pass


class psoup_reward_source(Structure):
    pass


class psoup_ppo_soup(Structure):
    pass


class psoup_ppo_policy(Structure):
    pass


class psoup_ppo_options(Structure):
    pass


class psoup_ppo(Structure):
    pass


class psoup_ppo_trace(Structure):
    pass


class psoup_best_options(Structure):
    pass


psoup_error._fields_ = [
    ("status", c_int),
    ("message", c_char * 1020),
]
psoup_allocator._fields_ = [
    ("user", c_void_p),
    ("alloc", CFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t)),
    ("free", CFUNCTYPE(None, c_void_p, c_void_p)),
]
psoup_log_fn = CFUNCTYPE(None, c_void_p, c_int, c_char_p)
psoup_context_options._fields_ = [
    ("size", c_size_t),
    ("device", c_char_p),
    ("threads", c_int32),
    ("reserved", c_int32),
    ("isa", c_char_p),
    ("allocator", psoup_allocator),
    ("log", psoup_log_fn),
    ("log_user", c_void_p),
    ("stream", c_void_p),
]
psoup_progress_fn = CFUNCTYPE(c_int, c_void_p, c_char_p, c_int64, c_int64)
psoup_comm._fields_ = [
    ("size", c_size_t),
    ("user", c_void_p),
    ("rank", c_int32),
    ("world", c_int32),
    ("sum", CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_int, POINTER(psoup_error))),
    ("sum_device", CFUNCTYPE(c_int, c_void_p, POINTER(c_float), c_size_t, POINTER(psoup_error))),
    ("broadcast", CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, POINTER(psoup_error))),
    ("failed", CFUNCTYPE(c_int, c_void_p, POINTER(psoup_error))),
    ("abort", CFUNCTYPE(None, c_void_p, c_char_p)),
    ("free", CFUNCTYPE(None, c_void_p)),
]
psoup_comm_options._fields_ = [
    ("size", c_size_t),
    ("rank", c_int32),
    ("world", c_int32),
    ("local_rank", c_int32),
    ("local_world", c_int32),
    ("port", c_int32),
    ("timeout", c_int32),
    ("listener", c_int32),
    ("reserved", c_int32),
    ("address", c_char * 256),
]
psoup_variable_fn = CFUNCTYPE(c_char_p, c_void_p, c_char_p)
psoup_named_tensor._fields_ = [
    ("name", c_char_p),
    ("dtype", c_int),
    ("rank", c_int32),
    ("shape", POINTER(c_int64)),
    ("data", c_void_p),
]
psoup_field._fields_ = [
    ("name", c_char_p),
    ("type", c_int),
    ("offset", c_size_t),
    ("choices", c_char_p),
    ("help", c_char_p),
]
psoup_offset._fields_ = [
    ("begin", c_size_t),
    ("end", c_size_t),
]
psoup_model_config._fields_ = [
    ("size", c_size_t),
    ("vocab_size", c_int32),
    ("hidden_size", c_int32),
    ("intermediate_size", c_int32),
    ("num_hidden_layers", c_int32),
    ("num_attention_heads", c_int32),
    ("num_key_value_heads", c_int32),
    ("head_dim", c_int32),
    ("max_position_embeddings", c_int32),
    ("rms_norm_eps", c_float),
    ("rope_theta", c_float),
    ("rope_scaling", c_int32),
    ("rope_factor", c_float),
    ("rope_low_freq_factor", c_float),
    ("rope_high_freq_factor", c_float),
    ("rope_original_max_position", c_int32),
    ("rope_beta_fast", c_float),
    ("rope_beta_slow", c_float),
    ("rope_attention_factor", c_float),
    ("attention_bias", c_int32),
    ("qkv_bias", c_int32),
    ("mlp_bias", c_int32),
    ("tie_word_embeddings", c_int32),
    ("bos_token_id", c_int32),
    ("eos_token_id", c_int32),
    ("pad_token_id", c_int32),
    ("torch_dtype", c_int32),
    ("initializer_range", c_float),
    ("more_eos_token_ids", c_int32 * 7),
    ("linear_dtype", c_int32),
    ("reserved", c_int32),
]
psoup_load_options._fields_ = [
    ("size", c_size_t),
    ("dtype", c_int32),
    ("reserved", c_int32),
]
psoup_adapter_options._fields_ = [
    ("size", c_size_t),
    ("rank", c_int32),
    ("alpha", c_float),
    ("rslora", c_int32),
    ("targets", c_uint32),
    ("seed", c_uint64),
]
psoup_row._fields_ = [
    ("tokens", POINTER(c_int32)),
    ("n", c_size_t),
    ("mix", POINTER(c_float)),
]
psoup_sampling._fields_ = [
    ("size", c_size_t),
    ("max_new_tokens", c_int32),
    ("min_new_tokens", c_int32),
    ("temperature", c_float),
    ("top_k", c_int32),
    ("top_p", c_float),
    ("no_repeat_ngram_size", c_int32),
    ("ignore_stop", c_int32),
    ("seed", c_uint64),
    ("stop_tokens", POINTER(c_int32)),
    ("n_stop_tokens", c_size_t),
]
psoup_prompt._fields_ = [
    ("tokens", POINTER(c_int32)),
    ("n", c_size_t),
    ("mix", POINTER(c_float)),
    ("sequence", c_uint64),
    ("sampling", POINTER(psoup_sampling)),
    ("mix_method", c_int32),
    ("mix_strength", c_float),
    ("reserved", c_uint64 * 1),
]
psoup_session_options._fields_ = [
    ("size", c_size_t),
    ("max_sequences", c_int32),
    ("max_tokens", c_int32),
    ("prefill_rows", c_int32),
    ("reserved", c_int32),
    ("cache_tokens", c_int64),
    ("steps", c_int32),
    ("reserved2", c_int32),
]
psoup_token_fn = CFUNCTYPE(c_int, c_void_p, c_int64, c_int32, c_float, c_int)
psoup_completion._fields_ = [
    ("tokens", POINTER(c_int32)),
    ("logprobs", POINTER(c_float)),
    ("n", c_size_t),
    ("finish", c_int),
]
psoup_memory._fields_ = [
    ("size", c_size_t),
    ("base", c_int64),
    ("mapped", c_int64),
    ("adapters", c_int64),
    ("learning", c_int64),
    ("activations", c_int64),
    ("logits", c_int64),
    ("cache", c_int64),
    ("rows", c_int64),
    ("held", c_int64),
    ("host", c_int64),
    ("device", c_int64),
    ("device_free", c_int64),
]
psoup_preference._fields_ = [
    ("symbol", c_char_p),
    ("dimension", c_char_p),
    ("prompt", c_char_p),
    ("criterion", c_char_p),
    ("opposite", c_char_p),
]
psoup_question._fields_ = [
    ("id", c_int64),
    ("prompt", c_char_p),
    ("preference", POINTER(psoup_preference)),
    ("a", c_char_p),
    ("b", c_char_p),
    ("reserved", c_uint64 * 2),
]
psoup_judge_fn = CFUNCTYPE(c_int, c_void_p, POINTER(psoup_question), c_size_t, POINTER(c_int32))
psoup_instruction._fields_ = [
    ("instruction", c_char_p),
    ("input", c_char_p),
    ("id", c_int64),
]
psoup_feedback_options._fields_ = [
    ("size", c_size_t),
    ("prompt_template", c_char_p),
    ("mix", POINTER(c_float)),
    ("sampling", POINTER(psoup_sampling)),
    ("max_sequences", c_int32),
    ("seed", c_uint64),
    ("progress", psoup_progress_fn),
    ("user", c_void_p),
    ("mix_method", c_int32),
    ("reserved", c_int32),
]
psoup_feedback_counts._fields_ = [
    ("size", c_size_t),
    ("written", c_size_t),
    ("ties", c_size_t),
    ("unparsed", c_size_t),
]
psoup_duel._fields_ = [
    ("prompt", c_int64),
    ("user", c_int64),
    ("preferences", POINTER(c_int32)),
    ("verdicts", POINTER(c_int32)),
    ("n", c_size_t),
    ("helpfulness", c_int32),
    ("reserved", c_uint64 * 2),
]
psoup_rate._fields_ = [
    ("rate", c_double),
    ("low", c_double),
    ("high", c_double),
    ("wins", c_int64),
    ("ties", c_int64),
    ("losses", c_int64),
    ("unparsed", c_int64),
    ("reserved", c_double * 4),
]
psoup_merger_options._fields_ = [
    ("size", c_size_t),
    ("method", c_int32),
    ("svd_rank", c_int32),
    ("any_sum", c_int32),
    ("dtype", c_int32),
    ("progress", psoup_progress_fn),
    ("progress_user", c_void_p),
    ("peer", c_int32),
    ("format", c_int32),
    ("shard_size", c_uint64),
    ("density", c_double),
    ("gamma", c_double),
    ("epsilon", c_double),
    ("lambda", c_double),
    ("t", c_double),
    ("normalize", c_int32),
    ("rescale", c_int32),
    ("seed", c_uint64),
    ("sha256", c_int32),
    ("resume", c_int32),
    ("keep_bytes", c_int64),
    ("strength", c_double),
]
psoup_merge_sink._fields_ = [
    ("size", c_size_t),
    ("user", c_void_p),
    ("tensor", CFUNCTYPE(c_int, c_void_p, c_char_p, c_int, c_int32, POINTER(c_int64))),
    ("write", CFUNCTYPE(c_int, c_void_p, c_uint64, c_void_p, c_size_t)),
]
psoup_merge_tensors._fields_ = [
    ("size", c_size_t),
    ("name", c_char_p),
    ("tensors", POINTER(psoup_named_tensor)),
    ("n", c_size_t),
    ("read", CFUNCTYPE(c_int, c_void_p, c_size_t, c_uint64, c_size_t, c_void_p)),
    ("user", c_void_p),
]
psoup_merge_report._fields_ = [
    ("size", c_size_t),
    ("tensors", c_size_t),
    ("worst_error", c_double),
    ("worst_name", c_char * 256),
    ("mean_error", c_double),
]
psoup_lora_factors._fields_ = [
    ("a", POINTER(c_float)),
    ("b", POINTER(c_float)),
    ("rank", c_int32),
    ("scale", c_float),
]
psoup_merge_view._fields_ = [
    ("data", c_void_p),
    ("dtype", c_int32),
    ("place", c_int32),
    ("rows", c_int64),
    ("columns", c_int64),
    ("row_stride", c_int64),
    ("reserved", c_uint64 * 3),
]
psoup_merge_device._fields_ = [
    ("size", c_size_t),
    ("user", c_void_p),
    ("sum", CFUNCTYPE(c_int, c_void_p, POINTER(psoup_merge_view), POINTER(psoup_merge_view), POINTER(c_double), c_size_t, POINTER(psoup_error))),
    ("fold", CFUNCTYPE(c_int, c_void_p, POINTER(psoup_merge_view), POINTER(psoup_merge_view), c_int64, c_int64, c_int64, POINTER(psoup_lora_factors), POINTER(c_double), c_size_t, POINTER(psoup_error))),
    ("copy", CFUNCTYPE(c_int, c_void_p, POINTER(psoup_merge_view), POINTER(psoup_merge_view), POINTER(psoup_error))),
]
psoup_merge_module._fields_ = [
    ("factors", POINTER(psoup_lora_factors)),
    ("weights", POINTER(c_double)),
    ("count", c_size_t),
    ("out_features", c_int64),
    ("in_features", c_int64),
    ("a_out", POINTER(c_float)),
    ("b_out", POINTER(c_float)),
    ("rank", c_int32),
    ("reserved32", c_int32),
    ("relative_error", c_double),
    ("reserved", c_uint64 * 4),
]
psoup_step._fields_ = [
    ("size", c_size_t),
    ("phase", c_char_p),
    ("subject", c_char_p),
    ("step", c_int64),
    ("total", c_int64),
    ("n", c_size_t),
    ("names", POINTER(c_char_p)),
    ("values", POINTER(c_double)),
    ("n_times", c_size_t),
    ("time_names", POINTER(c_char_p)),
    ("times", POINTER(c_double)),
]
psoup_step_fn = CFUNCTYPE(c_int, c_void_p, POINTER(psoup_step))
psoup_example._fields_ = [
    ("tokens", POINTER(c_int32)),
    ("n", c_size_t),
    ("n_prompt", c_size_t),
]
psoup_sft_options._fields_ = [
    ("size", c_size_t),
    ("epochs", c_int32),
    ("max_steps", c_int32),
    ("batch_tokens", c_int32),
    ("accumulation", c_int32),
    ("learning_rate", c_float),
    ("beta1", c_float),
    ("beta2", c_float),
    ("epsilon", c_float),
    ("weight_decay", c_float),
    ("max_grad_norm", c_float),
    ("schedule", c_int32),
    ("warmup_steps", c_int32),
    ("lora_dropout", c_float),
    ("loss_on_prompt", c_int32),
    ("validate_every", c_int32),
    ("keep_best", c_int32),
    ("seed", c_uint64),
    ("metrics", c_char_p),
    ("on_step", psoup_step_fn),
    ("user", c_void_p),
    ("checkpoint_dir", c_char_p),
    ("checkpoint_every", c_int32),
    ("checkpoint_keep", c_int32),
    ("resume", c_int32),
    ("max_grad_value", c_float),
    ("comm", POINTER(psoup_comm)),
    ("gradient_checkpointing", c_int32),
    ("reserved", c_int32),
]
psoup_comparison._fields_ = [
    ("chosen", POINTER(c_int32)),
    ("n_chosen", c_size_t),
    ("rejected", POINTER(c_int32)),
    ("n_rejected", c_size_t),
    ("reward", c_int32),
    ("margin", c_float),
]
psoup_reward_options._fields_ = [
    ("size", c_size_t),
    ("epochs", c_int32),
    ("max_steps", c_int32),
    ("batch_size", c_int32),
    ("accumulation", c_int32),
    ("learning_rate", c_float),
    ("beta1", c_float),
    ("beta2", c_float),
    ("epsilon", c_float),
    ("weight_decay", c_float),
    ("max_grad_norm", c_float),
    ("schedule", c_int32),
    ("warmup_steps", c_int32),
    ("lora_dropout", c_float),
    ("margin", c_float),
    ("centering", c_float),
    ("max_tokens", c_int32),
    ("validate_every", c_int32),
    ("keep_best", c_int32),
    ("seed", c_uint64),
    ("metrics", c_char_p),
    ("on_step", psoup_step_fn),
    ("user", c_void_p),
    ("checkpoint_dir", c_char_p),
    ("checkpoint_every", c_int32),
    ("checkpoint_keep", c_int32),
    ("resume", c_int32),
    ("max_grad_value", c_float),
    ("margins", c_int32),
    ("gradient_checkpointing", c_int32),
    ("comm", POINTER(psoup_comm)),
]
psoup_dpo_pair._fields_ = [
    ("prompt", POINTER(c_int32)),
    ("n_prompt", c_size_t),
    ("chosen", POINTER(c_int32)),
    ("n_chosen", c_size_t),
    ("rejected", POINTER(c_int32)),
    ("n_rejected", c_size_t),
    ("policy", c_int32),
    ("reserved", c_int32 * 3),
]
psoup_dpo_options._fields_ = [
    ("size", c_size_t),
    ("epochs", c_int32),
    ("max_steps", c_int32),
    ("batch_size", c_int32),
    ("accumulation", c_int32),
    ("learning_rate", c_float),
    ("beta1", c_float),
    ("beta2", c_float),
    ("epsilon", c_float),
    ("weight_decay", c_float),
    ("max_grad_norm", c_float),
    ("schedule", c_int32),
    ("warmup_steps", c_int32),
    ("lora_dropout", c_float),
    ("beta", c_float),
    ("label_smoothing", c_float),
    ("max_tokens", c_int32),
    ("validate_every", c_int32),
    ("keep_best", c_int32),
    ("seed", c_uint64),
    ("metrics", c_char_p),
    ("on_step", psoup_step_fn),
    ("user", c_void_p),
    ("checkpoint_dir", c_char_p),
    ("checkpoint_every", c_int32),
    ("checkpoint_keep", c_int32),
    ("resume", c_int32),
    ("max_grad_value", c_float),
    ("comm", POINTER(psoup_comm)),
    ("gradient_checkpointing", c_int32),
    ("length_penalty", c_float),
]
psoup_reward_input._fields_ = [
    ("reward", c_int32),
    ("weight", c_float),
    ("tokens", POINTER(c_int32)),
    ("n", c_size_t),
]
psoup_ppo_prompt._fields_ = [
    ("tokens", POINTER(c_int32)),
    ("n", c_size_t),
    ("inputs", POINTER(psoup_reward_input)),
    ("n_inputs", c_size_t),
    ("id", c_int64),
    ("reserved", c_uint64 * 2),
]
psoup_rollout._fields_ = [
    ("policy", c_char_p),
    ("prompt", POINTER(psoup_ppo_prompt)),
    ("response", POINTER(c_int32)),
    ("n", c_size_t),
    ("finish", c_int),
    ("reserved", c_uint64 * 2),
]
psoup_reward_fn = CFUNCTYPE(c_int, c_void_p, POINTER(psoup_rollout), c_size_t, POINTER(c_float))
psoup_reward_source._fields_ = [
    ("name", c_char_p),
    ("model", POINTER(psoup_reward)),
    ("function", psoup_reward_fn),
    ("user", c_void_p),
    ("weight", c_float),
    ("adapter", c_int32),
    ("reserved2", c_uint64 * 2),
]
psoup_samples_fn = CFUNCTYPE(c_int, c_void_p, c_int64, POINTER(psoup_rollout), POINTER(c_float), c_size_t)
psoup_ppo_soup._fields_ = [
    ("size", c_size_t),
    ("adapters", POINTER(c_char_p)),
    ("n", c_size_t),
    ("concentration", c_float),
    ("reserved", c_int32),
]
psoup_ppo_policy._fields_ = [
    ("adapter", c_char_p),
    ("rewards", POINTER(POINTER(psoup_reward))),
    ("n_rewards", c_size_t),
    ("reward_fn", psoup_reward_fn),
    ("reward_user", c_void_p),
    ("prompts", POINTER(psoup_ppo_prompt)),
    ("n_prompts", c_size_t),
    ("validation", POINTER(psoup_ppo_prompt)),
    ("n_validation", c_size_t),
    ("seed", c_uint64),
    ("soup", POINTER(psoup_ppo_soup)),
    ("sources", POINTER(psoup_reward_source)),
    ("n_sources", c_size_t),
    ("reserved", c_uint64 * 1),
]
psoup_ppo_options._fields_ = [
    ("size", c_size_t),
    ("steps", c_int32),
    ("batch_size", c_int32),
    ("mini_batch_size", c_int32),
    ("loss_group", c_int32),
    ("ppo_epochs", c_int32),
    ("micro_batch_tokens", c_int32),
    ("learning_rate", c_float),
    ("beta1", c_float),
    ("beta2", c_float),
    ("epsilon", c_float),
    ("weight_decay", c_float),
    ("max_grad_norm", c_float),
    ("gamma", c_float),
    ("lambda", c_float),
    ("clip_range", c_float),
    ("clip_range_value", c_float),
    ("value_coefficient", c_float),
    ("early_stop", c_int32),
    ("target_kl", c_float),
    ("kl_coefficient", c_float),
    ("adaptive_kl", c_int32),
    ("kl_target", c_float),
    ("kl_horizon", c_float),
    ("ratio_threshold", c_float),
    ("skipped_step", c_int32),
    ("normalize_reward", c_int32),
    ("whiten_advantages", c_int32),
    ("whiten_groups", c_int32),
    ("lora_dropout", c_float),
    ("head_dropout", c_float),
    ("max_new_tokens", c_int32),
    ("min_new_tokens", c_int32),
    ("draw_new_tokens_from", c_int32),
    ("draw_group", c_int32),
    ("ignore_stop", c_int32),
    ("temperature", c_float),
    ("top_p", c_float),
    ("top_k", c_int32),
    ("truncation_penalty", c_float),
    ("reward_text", c_int32),
    ("reward_max_tokens", c_int32),
    ("max_sequences", c_int32),
    ("validate_every", c_int32),
    ("keep_best", c_int32),
    ("metrics", c_char_p),
    ("on_step", psoup_step_fn),
    ("user", c_void_p),
    ("tokenizer", POINTER(psoup_tokenizer)),
    ("checkpoint_dir", c_char_p),
    ("checkpoint_every", c_int32),
    ("checkpoint_keep", c_int32),
    ("resume", c_int32),
    ("objective", c_int32),
    ("group_size", c_int32),
    ("kl_estimator", c_int32),
    ("samples_every", c_int32),
    ("samples_count", c_int32),
    ("samples", c_char_p),
    ("on_samples", psoup_samples_fn),
    ("scale_rewards", c_int32),
    ("max_grad_value", c_float),
    ("reward_clip", c_float),
    ("join", c_int32),
    ("warn_repetition", c_float),
    ("warn_empty", c_float),
    ("warn_reward_rise", c_float),
    ("warn_kl_growth", c_float),
    ("warn_window", c_int32),
    ("gradient_checkpointing", c_int32),
    ("normalize_apart", c_int32),
    ("length_penalty", c_float),
    ("length_target", c_int32),
    ("length_correction", c_float),
    ("comm", POINTER(psoup_comm)),
]
psoup_ppo_trace._fields_ = [
    ("size", c_size_t),
    ("rollouts", c_size_t),
    ("tokens", c_size_t),
    ("start", POINTER(c_int32)),
    ("response", POINTER(c_int32)),
    ("logprob", POINTER(c_float)),
    ("ref_logprob", POINTER(c_float)),
    ("value", POINTER(c_float)),
    ("reward", POINTER(c_float)),
    ("advantage", POINTER(c_float)),
    ("returns", POINTER(c_float)),
    ("score", POINTER(c_float)),
    ("first_ratio", POINTER(c_float)),
    ("kl_coefficient", c_double),
    ("adapters", c_size_t),
    ("mix", POINTER(c_float)),
]
psoup_best_options._fields_ = [
    ("size", c_size_t),
    ("n", c_int32),
    ("reward_text", c_int32),
    ("rewards", POINTER(POINTER(psoup_reward))),
    ("n_rewards", c_size_t),
    ("reward_fn", psoup_reward_fn),
    ("reward_user", c_void_p),
    ("questions", POINTER(psoup_ppo_prompt)),
    ("tokenizer", POINTER(psoup_tokenizer)),
    ("reward_max_tokens", c_int32),
    ("reserved", c_int32),
    ("sources", POINTER(psoup_reward_source)),
    ("n_sources", c_size_t),
]

STRUCTS = (
    psoup_error,
    psoup_allocator,
    psoup_context_options,
    psoup_comm,
    psoup_comm_options,
    psoup_named_tensor,
    psoup_field,
    psoup_offset,
    psoup_model_config,
    psoup_load_options,
    psoup_adapter_options,
    psoup_row,
    psoup_sampling,
    psoup_prompt,
    psoup_session_options,
    psoup_completion,
    psoup_memory,
    psoup_preference,
    psoup_question,
    psoup_instruction,
    psoup_feedback_options,
    psoup_feedback_counts,
    psoup_duel,
    psoup_rate,
    psoup_merger_options,
    psoup_merge_sink,
    psoup_merge_tensors,
    psoup_merge_report,
    psoup_lora_factors,
    psoup_merge_view,
    psoup_merge_device,
    psoup_merge_module,
    psoup_step,
    psoup_example,
    psoup_sft_options,
    psoup_comparison,
    psoup_reward_options,
    psoup_dpo_pair,
    psoup_dpo_options,
    psoup_reward_input,
    psoup_ppo_prompt,
    psoup_rollout,
    psoup_reward_source,
    psoup_ppo_soup,
    psoup_ppo_policy,
    psoup_ppo_options,
    psoup_ppo_trace,
    psoup_best_options,
)
OPAQUE = (
    psoup_context,
    psoup_json,
    psoup_jsonl_reader,
    psoup_jsonl_writer,
    psoup_tokenizer,
    psoup_model,
    psoup_gradients,
    psoup_session,
    psoup_generation,
    psoup_preferences,
    psoup_judge,
    psoup_merger,
    psoup_gpu_merge,
    psoup_training,
    psoup_reward,
    psoup_ppo,
)

# What the INIT macros set; other fields are zero, and size is the struct's.
DEFAULTS: Dict[Any, Dict[str, Any]] = {
    psoup_context_options: {
    },
    psoup_comm_options: {
        "world": 1,
        "port": 29500,
        "timeout": 600,
        "listener": -1,
    },
    psoup_model_config: {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_factor": 1.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "bos_token_id": -1,
        "eos_token_id": -1,
        "pad_token_id": -1,
        "initializer_range": 0.02,
        "more_eos_token_ids": (-1, -1, -1, -1, -1, -1, -1),
    },
    psoup_load_options: {
        "dtype": -1,
    },
    psoup_adapter_options: {
        "rank": 16,
        "alpha": 32.0,
        "targets": 5,
    },
    psoup_sampling: {
        "max_new_tokens": 128,
        "temperature": 1.0,
        "top_p": 1.0,
    },
    psoup_session_options: {
    },
    psoup_feedback_options: {
    },
    psoup_merger_options: {
        "dtype": -1,
        "density": 1.0,
        "gamma": 0.01,
        "epsilon": 0.15,
        "lambda": 1.0,
        "t": -1e+308,
        "normalize": -1,
        "rescale": -1,
        "keep_bytes": -1,
        "strength": 1.0,
    },
    psoup_merge_sink: {
    },
    psoup_merge_tensors: {
    },
    psoup_sft_options: {
        "epochs": 1,
        "batch_tokens": 1024,
        "accumulation": 1,
        "learning_rate": 1e-05,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-08,
        "max_grad_norm": 1.0,
        "keep_best": 1,
        "checkpoint_every": 100,
        "checkpoint_keep": 3,
    },
    psoup_reward_options: {
        "epochs": 1,
        "batch_size": 8,
        "accumulation": 1,
        "learning_rate": 2e-05,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-08,
        "weight_decay": 0.001,
        "schedule": 1,
        "max_tokens": 512,
        "keep_best": 1,
        "checkpoint_every": 100,
        "checkpoint_keep": 3,
    },
    psoup_dpo_options: {
        "epochs": 1,
        "batch_size": 8,
        "accumulation": 1,
        "learning_rate": 1e-05,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-08,
        "max_grad_norm": 1.0,
        "schedule": 1,
        "beta": 0.1,
        "max_tokens": 1024,
        "keep_best": 1,
        "checkpoint_every": 100,
        "checkpoint_keep": 3,
    },
    psoup_ppo_soup: {
        "concentration": 1.0,
    },
    psoup_ppo_options: {
        "batch_size": 64,
        "ppo_epochs": 8,
        "micro_batch_tokens": 4096,
        "learning_rate": 1.4e-05,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-08,
        "max_grad_norm": 1.0,
        "gamma": 1.0,
        "lambda": 0.95,
        "clip_range": 0.2,
        "clip_range_value": 0.2,
        "value_coefficient": 0.1,
        "early_stop": 1,
        "target_kl": 0.1,
        "kl_coefficient": 0.2,
        "adaptive_kl": 1,
        "kl_target": 6.0,
        "kl_horizon": 10000.0,
        "ratio_threshold": 10.0,
        "normalize_reward": 1,
        "whiten_advantages": 1,
        "whiten_groups": 1,
        "max_new_tokens": 511,
        "draw_group": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "reward_max_tokens": 512,
        "keep_best": 1,
        "checkpoint_every": 10,
        "checkpoint_keep": 3,
        "group_size": 4,
        "samples_count": 4,
        "warn_repetition": 0.5,
        "warn_empty": 0.25,
        "warn_reward_rise": 1.0,
        "warn_kl_growth": 2.0,
        "warn_window": 16,
    },
    psoup_best_options: {
        "n": 4,
        "reward_max_tokens": 512,
    },
}

# Fields that hold an enum.
ENUM_FIELDS: Dict[Any, Dict[str, Any]] = {
    psoup_error: {"status": Status},
    psoup_named_tensor: {"dtype": Dtype},
    psoup_field: {"type": FieldType},
    psoup_model_config: {"rope_scaling": RopeScaling, "torch_dtype": Dtype},
    psoup_load_options: {"dtype": Dtype},
    psoup_prompt: {"mix_method": MixMethod},
    psoup_completion: {"finish": Finish},
    psoup_feedback_options: {"mix_method": MixMethod},
    psoup_merger_options: {"method": MergeMethod, "dtype": Dtype, "peer": MergePeer, "format": MergeFormat},
    psoup_merge_view: {"dtype": Dtype, "place": MergePlace},
    psoup_sft_options: {"schedule": Schedule},
    psoup_reward_options: {"schedule": Schedule},
    psoup_dpo_options: {"schedule": Schedule},
    psoup_rollout: {"finish": Finish},
    psoup_ppo_options: {"early_stop": EarlyStop, "objective": Objective, "kl_estimator": KlEstimator, "scale_rewards": ScaleRewards},
}

# ---- functions: name: (result, [parameters]) ----------------------------------------------------

FUNCTIONS: Dict[str, Tuple[Any, List[Any]]] = {
    "psoup_version": (c_char_p, []),
    "psoup_status_name": (c_char_p, [c_int]),
    "psoup_dtype_size": (c_size_t, [c_int]),
    "psoup_dtype_name": (c_char_p, [c_int]),
    "psoup_dtype_parse": (c_int, [c_char_p, POINTER(c_int), POINTER(psoup_error)]),
    "psoup_context_create": (c_int, [POINTER(psoup_context_options), POINTER(POINTER(psoup_context)), POINTER(psoup_error)]),
    "psoup_context_free": (None, [POINTER(psoup_context)]),
    "psoup_context_threads": (c_int32, [POINTER(psoup_context)]),
    "psoup_context_isa": (c_char_p, [POINTER(psoup_context)]),
    "psoup_comm_launch": (c_int, [psoup_variable_fn, c_void_p, POINTER(psoup_comm_options), POINTER(psoup_error)]),
    "psoup_comm_tcp_create": (c_int, [POINTER(psoup_context), POINTER(psoup_comm_options), POINTER(POINTER(psoup_comm)), POINTER(psoup_error)]),
    "psoup_comm_nccl_create": (c_int, [POINTER(psoup_context), POINTER(psoup_comm), POINTER(POINTER(psoup_comm)), POINTER(psoup_error)]),
    "psoup_comm_free": (None, [POINTER(psoup_comm)]),
    "psoup_json_parse": (c_int, [c_char_p, c_size_t, c_char_p, POINTER(POINTER(psoup_json)), POINTER(psoup_error)]),
    "psoup_json_read": (c_int, [POINTER(psoup_context), c_char_p, POINTER(POINTER(psoup_json)), POINTER(psoup_error)]),
    "psoup_json_write": (c_int, [POINTER(psoup_context), c_char_p, POINTER(psoup_json), POINTER(psoup_error)]),
    "psoup_json_text": (c_void_p, [POINTER(psoup_json), c_int]),
    "psoup_text_free": (None, [c_void_p]),
    "psoup_json_free": (None, [POINTER(psoup_json)]),
    "psoup_json_kind": (c_int, [POINTER(psoup_json)]),
    "psoup_json_get": (POINTER(psoup_json), [POINTER(psoup_json), c_char_p]),
    "psoup_json_at": (POINTER(psoup_json), [POINTER(psoup_json), c_size_t]),
    "psoup_json_size": (c_size_t, [POINTER(psoup_json)]),
    "psoup_json_next": (POINTER(psoup_json), [POINTER(psoup_json), POINTER(c_char_p)]),
    "psoup_json_integer": (c_int64, [POINTER(psoup_json), c_int64]),
    "psoup_json_real": (c_double, [POINTER(psoup_json), c_double]),
    "psoup_json_string": (c_char_p, [POINTER(psoup_json), c_char_p]),
    "psoup_json_bool": (c_int, [POINTER(psoup_json), c_int]),
    "psoup_json_new_object": (POINTER(psoup_json), []),
    "psoup_json_new_array": (POINTER(psoup_json), []),
    "psoup_json_new_string": (POINTER(psoup_json), [c_char_p]),
    "psoup_json_new_integer": (POINTER(psoup_json), [c_int64]),
    "psoup_json_new_real": (POINTER(psoup_json), [c_double]),
    "psoup_json_new_bool": (POINTER(psoup_json), [c_int]),
    "psoup_json_new_null": (POINTER(psoup_json), []),
    "psoup_json_copy": (POINTER(psoup_json), [POINTER(psoup_json)]),
    "psoup_json_set": (c_int, [POINTER(psoup_json), c_char_p, POINTER(psoup_json)]),
    "psoup_json_append": (c_int, [POINTER(psoup_json), POINTER(psoup_json)]),
    "psoup_jsonl_open": (c_int, [POINTER(psoup_context), c_char_p, POINTER(POINTER(psoup_jsonl_reader)), POINTER(psoup_error)]),
    "psoup_jsonl_next": (c_int, [POINTER(psoup_jsonl_reader), POINTER(POINTER(psoup_json)), POINTER(psoup_error)]),
    "psoup_jsonl_line": (c_int64, [POINTER(psoup_jsonl_reader)]),
    "psoup_jsonl_reader_free": (None, [POINTER(psoup_jsonl_reader)]),
    "psoup_jsonl_create": (c_int, [POINTER(psoup_context), c_char_p, c_int, POINTER(POINTER(psoup_jsonl_writer)), POINTER(psoup_error)]),
    "psoup_jsonl_write": (c_int, [POINTER(psoup_jsonl_writer), POINTER(psoup_json), POINTER(psoup_error)]),
    "psoup_jsonl_close": (c_int, [POINTER(psoup_jsonl_writer), POINTER(psoup_error)]),
    "psoup_jsonl_writer_free": (None, [POINTER(psoup_jsonl_writer)]),
    "psoup_safetensors_write": (c_int, [POINTER(psoup_context), c_char_p, POINTER(psoup_named_tensor), c_size_t, POINTER(psoup_error)]),
    "psoup_fields_read": (c_int, [POINTER(psoup_field), POINTER(psoup_json), c_char_p, c_void_p, POINTER(psoup_error)]),
    "psoup_fields_check": (c_int, [POINTER(POINTER(psoup_field)), c_size_t, POINTER(psoup_json), c_char_p, POINTER(psoup_error)]),
    "psoup_fields_json": (POINTER(psoup_json), [POINTER(psoup_field), c_void_p]),
    "psoup_tokenizer_load": (c_int, [POINTER(psoup_context), c_char_p, POINTER(POINTER(psoup_tokenizer)), POINTER(psoup_error)]),
    "psoup_tokenizer_save": (c_int, [POINTER(psoup_tokenizer), c_char_p, POINTER(psoup_error)]),
    "psoup_tokenizer_free": (None, [POINTER(psoup_tokenizer)]),
    "psoup_tokenizer_train": (c_int, [POINTER(psoup_context), POINTER(c_char_p), c_size_t, c_int32, POINTER(c_char_p), c_size_t, c_char_p, POINTER(POINTER(psoup_tokenizer)), POINTER(psoup_error)]),
    "psoup_tokenizer_vocab_size": (c_int32, [POINTER(psoup_tokenizer)]),
    "psoup_tokenizer_token_id": (c_int32, [POINTER(psoup_tokenizer), c_char_p]),
    "psoup_tokenizer_token": (c_char_p, [POINTER(psoup_tokenizer), c_int32]),
    "psoup_tokenizer_encode": (c_int, [POINTER(psoup_tokenizer), c_char_p, c_size_t, c_uint32, POINTER(c_int32), POINTER(psoup_offset), c_size_t, POINTER(c_size_t), POINTER(psoup_error)]),
    "psoup_tokenizer_decode": (c_int, [POINTER(psoup_tokenizer), POINTER(c_int32), c_size_t, c_int, c_void_p, c_size_t, POINTER(c_size_t), POINTER(psoup_error)]),
    "psoup_model_load": (c_int, [POINTER(psoup_context), c_char_p, POINTER(POINTER(psoup_model)), POINTER(psoup_error)]),
    "psoup_model_load_with": (c_int, [POINTER(psoup_context), c_char_p, POINTER(psoup_load_options), POINTER(POINTER(psoup_model)), POINTER(psoup_error)]),
    "psoup_model_create": (c_int, [POINTER(psoup_context), POINTER(psoup_model_config), c_uint64, POINTER(POINTER(psoup_model)), POINTER(psoup_error)]),
    "psoup_model_save": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_tokenizer), POINTER(psoup_error)]),
    "psoup_model_free": (None, [POINTER(psoup_model)]),
    "psoup_model_get_config": (c_int, [POINTER(psoup_model), POINTER(psoup_model_config), POINTER(psoup_error)]),
    "psoup_model_parameters": (c_int64, [POINTER(psoup_model)]),
    "psoup_model_context": (POINTER(psoup_context), [POINTER(psoup_model)]),
    "psoup_model_add_adapter": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_adapter_options), POINTER(psoup_error)]),
    "psoup_model_load_adapter": (c_int, [POINTER(psoup_model), c_char_p, c_char_p, POINTER(psoup_error)]),
    "psoup_model_save_adapter": (c_int, [POINTER(psoup_model), c_char_p, c_char_p, c_char_p, POINTER(psoup_error)]),
    "psoup_model_remove_adapter": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_error)]),
    "psoup_model_adapters": (c_int32, [POINTER(psoup_model)]),
    "psoup_model_find_adapter": (c_int32, [POINTER(psoup_model), c_char_p]),
    "psoup_model_adapter_name": (c_char_p, [POINTER(psoup_model), c_int32]),
    "psoup_model_adapter_data": (c_int, [POINTER(psoup_model), c_char_p, POINTER(POINTER(c_float)), POINTER(c_size_t), POINTER(psoup_error)]),
    "psoup_model_parse_mix": (c_int, [POINTER(psoup_model), c_char_p, c_int, POINTER(c_float), POINTER(psoup_error)]),
    "psoup_mix_method_name": (c_char_p, [c_int32]),
    "psoup_mix_method_parse": (c_int, [c_char_p, POINTER(c_int32), POINTER(psoup_error)]),
    "psoup_model_logprobs": (c_int, [POINTER(psoup_model), POINTER(psoup_row), c_size_t, POINTER(c_float), POINTER(psoup_error)]),
    "psoup_model_logits": (c_int, [POINTER(psoup_model), POINTER(psoup_row), c_size_t, POINTER(c_float), POINTER(psoup_error)]),
    "psoup_model_logprobs_mixed": (c_int, [POINTER(psoup_model), POINTER(psoup_row), POINTER(c_int32), c_size_t, POINTER(c_float), POINTER(psoup_error)]),
    "psoup_model_logits_mixed": (c_int, [POINTER(psoup_model), POINTER(psoup_row), POINTER(c_int32), c_size_t, POINTER(c_float), POINTER(psoup_error)]),
    "psoup_model_gradients": (c_int, [POINTER(psoup_model), POINTER(psoup_row), c_size_t, POINTER(c_float), c_uint32, POINTER(POINTER(psoup_gradients)), POINTER(psoup_error)]),
    "psoup_model_gradients_mixed": (c_int, [POINTER(psoup_model), POINTER(psoup_row), POINTER(c_int32), c_size_t, POINTER(c_float), c_uint32, POINTER(POINTER(psoup_gradients)), POINTER(psoup_error)]),
    "psoup_gradients_get": (POINTER(c_float), [POINTER(psoup_gradients), c_char_p, POINTER(c_size_t)]),
    "psoup_gradients_free": (None, [POINTER(psoup_gradients)]),
    "psoup_session_create": (c_int, [POINTER(psoup_model), POINTER(psoup_session_options), POINTER(POINTER(psoup_session)), POINTER(psoup_error)]),
    "psoup_session_submit": (c_int, [POINTER(psoup_session), c_int64, POINTER(psoup_prompt), POINTER(psoup_error)]),
    "psoup_session_step": (c_int, [POINTER(psoup_session), psoup_token_fn, c_void_p, POINTER(c_size_t), POINTER(psoup_error)]),
    "psoup_session_free": (None, [POINTER(psoup_session)]),
    "psoup_generate": (c_int, [POINTER(psoup_model), POINTER(psoup_prompt), c_size_t, POINTER(psoup_sampling), POINTER(psoup_session_options), psoup_token_fn, c_void_p, POINTER(POINTER(psoup_generation)), POINTER(psoup_error)]),
    "psoup_generate_memory": (c_int, [POINTER(psoup_model), POINTER(psoup_prompt), c_size_t, POINTER(psoup_sampling), POINTER(psoup_session_options), POINTER(psoup_memory), POINTER(psoup_error)]),
    "psoup_generation_get": (POINTER(psoup_completion), [POINTER(psoup_generation), c_size_t]),
    "psoup_generation_free": (None, [POINTER(psoup_generation)]),
    "psoup_preferences_default": (c_int, [POINTER(psoup_context), c_int, POINTER(POINTER(psoup_preferences)), POINTER(psoup_error)]),
    "psoup_preferences_load": (c_int, [POINTER(psoup_context), c_char_p, POINTER(POINTER(psoup_preferences)), POINTER(psoup_error)]),
    "psoup_preferences_free": (None, [POINTER(psoup_preferences)]),
    "psoup_preferences_count": (c_size_t, [POINTER(psoup_preferences)]),
    "psoup_preferences_get": (POINTER(psoup_preference), [POINTER(psoup_preferences), c_size_t]),
    "psoup_preferences_find": (c_int32, [POINTER(psoup_preferences), c_char_p]),
    "psoup_users_count": (c_size_t, [POINTER(psoup_preferences)]),
    "psoup_user_size": (c_size_t, [POINTER(psoup_preferences)]),
    "psoup_user_get": (c_int, [POINTER(psoup_preferences), c_size_t, POINTER(c_int32), c_void_p, c_size_t, POINTER(psoup_error)]),
    "psoup_template_fill": (c_int, [c_char_p, c_char_p, c_char_p, c_char_p, POINTER(c_void_p), POINTER(psoup_error)]),
    "psoup_judge_create": (c_int, [POINTER(psoup_context), psoup_judge_fn, c_void_p, POINTER(POINTER(psoup_judge)), POINTER(psoup_error)]),
    "psoup_judge_command": (c_int, [POINTER(psoup_context), POINTER(c_char_p), POINTER(POINTER(psoup_judge)), POINTER(psoup_error)]),
    "psoup_judge_set_patience": (c_int, [POINTER(psoup_judge), c_double, POINTER(psoup_error)]),
    "psoup_judge_ask": (c_int, [POINTER(psoup_judge), POINTER(psoup_question), c_size_t, POINTER(c_int32), POINTER(psoup_error)]),
    "psoup_judge_free": (None, [POINTER(psoup_judge)]),
    "psoup_feedback": (c_int, [POINTER(psoup_model), POINTER(psoup_tokenizer), POINTER(psoup_preferences), POINTER(psoup_instruction), c_size_t, POINTER(psoup_judge), POINTER(psoup_feedback_options), c_char_p, POINTER(psoup_feedback_counts), POINTER(psoup_error)]),
    "psoup_winrate_aggregate": (c_int, [POINTER(psoup_context), POINTER(psoup_duel), c_size_t, c_uint64, POINTER(psoup_rate), POINTER(psoup_error)]),
    "psoup_winrate_criterion": (c_int, [POINTER(psoup_context), POINTER(psoup_duel), c_size_t, c_int32, c_uint64, POINTER(psoup_rate), POINTER(psoup_error)]),
    "psoup_winrate_helpfulness": (c_int, [POINTER(psoup_context), POINTER(psoup_duel), c_size_t, c_uint64, POINTER(psoup_rate), POINTER(psoup_error)]),
    "psoup_judge_duels": (c_int, [POINTER(psoup_judge), POINTER(psoup_preferences), POINTER(c_char_p), POINTER(c_char_p), POINTER(c_char_p), POINTER(psoup_duel), c_size_t, c_int, POINTER(c_int32), POINTER(c_int32), POINTER(psoup_error)]),
    "psoup_merge_method_name": (c_char_p, [c_int32]),
    "psoup_merge_method_parse": (c_int, [c_char_p, POINTER(c_int32), POINTER(psoup_error)]),
    "psoup_merger_create": (c_int, [POINTER(psoup_context), POINTER(psoup_merger_options), POINTER(POINTER(psoup_merger)), POINTER(psoup_error)]),
    "psoup_merger_free": (None, [POINTER(psoup_merger)]),
    "psoup_merger_set_base": (c_int, [POINTER(psoup_merger), c_char_p, POINTER(psoup_error)]),
    "psoup_merger_add": (c_int, [POINTER(psoup_merger), c_char_p, c_double, POINTER(psoup_error)]),
    "psoup_merger_set_reference": (c_int, [POINTER(psoup_merger), c_char_p, POINTER(psoup_error)]),
    "psoup_merger_set_weights": (c_int, [POINTER(psoup_merger), POINTER(c_double), c_size_t, POINTER(psoup_error)]),
    "psoup_merger_set_parameter": (c_int, [POINTER(psoup_merger), c_int64, c_char_p, c_char_p, POINTER(c_double), c_size_t, POINTER(psoup_error)]),
    "psoup_merger_write": (c_int, [POINTER(psoup_merger), c_char_p, POINTER(psoup_error)]),
    "psoup_merger_run": (c_int, [POINTER(psoup_merger), POINTER(psoup_merge_sink), POINTER(psoup_error)]),
    "psoup_merger_add_tensors": (c_int, [POINTER(psoup_merger), POINTER(psoup_merge_tensors), c_double, POINTER(psoup_error)]),
    "psoup_merger_set_base_tensors": (c_int, [POINTER(psoup_merger), POINTER(psoup_merge_tensors), POINTER(psoup_error)]),
    "psoup_merger_load_recipe": (c_int, [POINTER(psoup_merger), c_char_p, POINTER(psoup_error)]),
    "psoup_merger_load_certificate": (c_int, [POINTER(psoup_merger), c_char_p, POINTER(psoup_error)]),
    "psoup_merge_verify": (c_int, [POINTER(psoup_context), c_char_p, POINTER(c_size_t), POINTER(psoup_error)]),
    "psoup_merger_report": (c_int, [POINTER(psoup_merger), POINTER(psoup_merge_report), POINTER(psoup_error)]),
    "psoup_merge_sum": (c_int, [POINTER(psoup_context), c_void_p, c_int, POINTER(c_void_p), c_int, POINTER(c_double), c_size_t, c_size_t, POINTER(psoup_error)]),
    "psoup_merge_fold": (c_int, [POINTER(psoup_context), c_void_p, c_void_p, c_int, c_int64, c_int64, POINTER(psoup_lora_factors), POINTER(c_double), c_size_t, POINTER(psoup_error)]),
    "psoup_merge_factors": (c_int, [POINTER(psoup_context), c_int, POINTER(c_float), POINTER(c_float), c_int32, c_int64, c_int64, POINTER(psoup_lora_factors), POINTER(c_double), c_size_t, POINTER(c_double), POINTER(psoup_error)]),
    "psoup_merge_views": (c_int, [POINTER(psoup_context), POINTER(psoup_merge_view), POINTER(psoup_merge_view), POINTER(c_double), c_size_t, POINTER(psoup_error)]),
    "psoup_merge_fold_view": (c_int, [POINTER(psoup_context), POINTER(psoup_merge_view), POINTER(psoup_merge_view), c_int64, c_int64, c_int64, c_int64, POINTER(psoup_lora_factors), POINTER(c_double), c_size_t, POINTER(psoup_error)]),
    "psoup_merge_copy": (c_int, [POINTER(psoup_context), POINTER(psoup_merge_view), POINTER(psoup_merge_view), POINTER(psoup_error)]),
    "psoup_merge_set_device": (c_int, [POINTER(psoup_context), POINTER(psoup_merge_device), POINTER(psoup_error)]),
    "psoup_merge_factors_batch": (c_int, [POINTER(psoup_context), c_int, POINTER(psoup_merge_module), c_size_t, c_int32, POINTER(psoup_error)]),
    "psoup_merge_inspect": (c_int, [POINTER(psoup_context), POINTER(c_char_p), c_size_t, POINTER(c_double), POINTER(POINTER(psoup_json)), POINTER(psoup_error)]),
    "psoup_merge_inspect_plot": (c_int, [POINTER(psoup_context), POINTER(psoup_json), POINTER(c_char_p), c_char_p, POINTER(psoup_error)]),
    "psoup_gpu_merge_create": (c_int, [POINTER(psoup_context), POINTER(POINTER(psoup_gpu_merge)), POINTER(psoup_error)]),
    "psoup_gpu_merge_free": (None, [POINTER(psoup_gpu_merge)]),
    "psoup_training_step": (c_int, [POINTER(psoup_training), POINTER(c_int64), POINTER(psoup_error)]),
    "psoup_training_run": (c_int, [POINTER(psoup_training), POINTER(psoup_error)]),
    "psoup_training_free": (None, [POINTER(psoup_training)]),
    "psoup_sft_fields": (POINTER(psoup_field), []),
    "psoup_sft": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_example), c_size_t, POINTER(psoup_example), c_size_t, POINTER(psoup_sft_options), POINTER(psoup_error)]),
    "psoup_sft_create": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_example), c_size_t, POINTER(psoup_example), c_size_t, POINTER(psoup_sft_options), POINTER(POINTER(psoup_training)), POINTER(psoup_error)]),
    "psoup_reward_create": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_adapter_options), POINTER(POINTER(psoup_reward)), POINTER(psoup_error)]),
    "psoup_reward_load": (c_int, [POINTER(psoup_model), c_char_p, c_char_p, POINTER(POINTER(psoup_reward)), POINTER(psoup_error)]),
    "psoup_reward_save": (c_int, [POINTER(psoup_reward), c_char_p, c_char_p, POINTER(psoup_error)]),
    "psoup_reward_name": (c_char_p, [POINTER(psoup_reward)]),
    "psoup_reward_free": (None, [POINTER(psoup_reward)]),
    "psoup_reward_score": (c_int, [POINTER(psoup_reward), POINTER(psoup_row), c_size_t, POINTER(c_float), POINTER(psoup_error)]),
    "psoup_reward_fields": (POINTER(psoup_field), []),
    "psoup_reward_train": (c_int, [POINTER(POINTER(psoup_reward)), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(psoup_reward_options), POINTER(psoup_error)]),
    "psoup_reward_train_create": (c_int, [POINTER(POINTER(psoup_reward)), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(psoup_reward_options), POINTER(POINTER(psoup_training)), POINTER(psoup_error)]),
    "psoup_reward_accuracy": (c_int, [POINTER(POINTER(psoup_reward)), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(c_double), POINTER(c_double), POINTER(psoup_error)]),
    "psoup_dpo_fields": (POINTER(psoup_field), []),
    "psoup_dpo": (c_int, [POINTER(psoup_model), POINTER(c_char_p), c_size_t, POINTER(psoup_dpo_pair), c_size_t, POINTER(psoup_dpo_pair), c_size_t, POINTER(psoup_dpo_options), POINTER(psoup_error)]),
    "psoup_dpo_create": (c_int, [POINTER(psoup_model), POINTER(c_char_p), c_size_t, POINTER(psoup_dpo_pair), c_size_t, POINTER(psoup_dpo_pair), c_size_t, POINTER(psoup_dpo_options), POINTER(POINTER(psoup_training)), POINTER(psoup_error)]),
    "psoup_sft_memory": (c_int, [POINTER(psoup_model), c_char_p, POINTER(psoup_example), c_size_t, POINTER(psoup_example), c_size_t, POINTER(psoup_sft_options), POINTER(psoup_memory), POINTER(psoup_error)]),
    "psoup_reward_memory": (c_int, [POINTER(POINTER(psoup_reward)), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(psoup_comparison), c_size_t, POINTER(psoup_reward_options), POINTER(psoup_memory), POINTER(psoup_error)]),
    "psoup_dpo_memory": (c_int, [POINTER(psoup_model), POINTER(c_char_p), c_size_t, POINTER(psoup_dpo_pair), c_size_t, POINTER(psoup_dpo_pair), c_size_t, POINTER(psoup_dpo_options), POINTER(psoup_memory), POINTER(psoup_error)]),
    "psoup_ppo_fields": (POINTER(psoup_field), []),
    "psoup_ppo_preset": (c_int, [c_char_p, POINTER(psoup_ppo_options), POINTER(psoup_error)]),
    "psoup_ppo_create": (c_int, [POINTER(psoup_model), POINTER(psoup_ppo_policy), c_size_t, POINTER(psoup_ppo_options), POINTER(POINTER(psoup_ppo)), POINTER(psoup_error)]),
    "psoup_ppo_step": (c_int, [POINTER(psoup_ppo), POINTER(c_int64), POINTER(psoup_error)]),
    "psoup_ppo_diverged": (c_int, [POINTER(psoup_ppo), c_size_t]),
    "psoup_ppo_run": (c_int, [POINTER(psoup_ppo), POINTER(psoup_error)]),
    "psoup_ppo_free": (None, [POINTER(psoup_ppo)]),
    "psoup_ppo_get_trace": (c_int, [POINTER(psoup_ppo), c_size_t, POINTER(psoup_ppo_trace), POINTER(psoup_error)]),
    "psoup_ppo_memory": (c_int, [POINTER(psoup_model), POINTER(psoup_ppo_policy), c_size_t, POINTER(psoup_ppo_options), POINTER(psoup_memory), POINTER(psoup_error)]),
    "psoup_best_of_n": (c_int, [POINTER(psoup_model), POINTER(psoup_prompt), c_size_t, POINTER(psoup_sampling), POINTER(psoup_session_options), POINTER(psoup_best_options), POINTER(POINTER(psoup_generation)), POINTER(c_int32), POINTER(c_float), POINTER(psoup_error)]),
}
