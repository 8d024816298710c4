"""Options of vLLM that have no counterpart, on the command line and in Python."""

from __future__ import annotations

import re
from collections.abc import Callable

_PROXY = "A proxy in front of the server ends TLS."
_TEXT_ONLY = "The models read text only."
_EVERY_MODEL = "Every model generates and embeds; leave this out."
_LLGUIDANCE = "llguidance compiles all grammars; leave this out."
LEFT_OUT = {
    "gpu_memory_utilization": "The KV pool takes a quarter of the free memory, 2 GiB at most; `num_blocks` sets its pages.",
    "kv_cache_memory_bytes": "`num_blocks` sets the number of KV pages.",
    "num_gpu_blocks_override": "`num_blocks` sets the number of KV pages.",
    "enforce_eager": "`compile` is off unless it is set; leave this out.",
    "compilation_config": "`compile` turns compilation on; it has no further settings.",
    "swap_space": "A preempted request keeps its tokens and is recomputed; there is no swap space.",
    "cpu_offload_gb": "Weights stay on the device of the engine.",
    "trust_remote_code": "The code of a checkpoint never runs.",
    "logits_processors": "The engine runs no code of others; logit_bias, bad_words and structured_outputs change the logits.",
    "quantization": "A GGUF file brings its encoding; weights are expanded to `dtype` at load.",
    "load_format": "The files of a checkpoint decide: safetensors or GGUF.",
    "config_format": "The files of a checkpoint decide: safetensors or GGUF.",
    "tokenizer_mode": "The files of a checkpoint decide; leave this out.",
    "skip_tokenizer_init": "The tokenizer is always loaded; prompt_token_ids and detokenize=False avoid its use.",
    "revision": "A hub id loads the default revision; download another one and give its path.",
    "tokenizer_revision": "A hub id loads the default revision; download another one and give its path.",
    "hf_overrides": "Edit the config.json of a copy of the checkpoint, and give its path.",
    "hf_token": "The environment variable HF_TOKEN holds the token.",
    "pooler_config": "Each call of embed names its pooling.",
    "override_generation_config": "`generation_config` takes a directory with a generation_config.json.",
    "distributed_executor_backend": "JAX drives the devices of one process; PyTorch starts one process per rank.",
    "disable_custom_all_reduce": "The backend chooses how ranks add up; leave this out.",
    "enable_expert_parallel": "The models have no experts.",
    "disable_log_requests": "The log has no prompts unless a server runs with --log-prompts; leave this out.",
    "disable_log_stats": "The log has no statistics; /metrics of a server has them. Leave this out.",
    "enable_log_requests": "A server logs prompts with --log-prompts.",
    "enable_lora": "Adapters are not supported yet.",
    "speculative_config": "Speculative decoding is not supported yet.",
    "task": _EVERY_MODEL,
    "runner": _EVERY_MODEL,
    "convert": _EVERY_MODEL,
    "structured_outputs_config": _LLGUIDANCE,
    "guided_decoding_backend": _LLGUIDANCE,
    "ssl_keyfile": _PROXY,
    "ssl_certfile": _PROXY,
    "root_path": "A proxy in front of the server changes paths.",
    "middleware": "The server runs no code of others; put a proxy in front of it.",
    "uvicorn_log_level": "Every request has one line in the log; --log-json writes it as JSON.",
    "limit_mm_per_prompt": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "allowed_local_media_path": _TEXT_ONLY,
}
"""Name in vLLM → the reason, or the option to use, with names of options in backquotes."""


def why_left_out(name: str, spell: Callable[[str], str] = str) -> str | None:
    """Return why Tandem lacks this option of vLLM, or None for any other name. `spell` writes the names of options."""
    reason = LEFT_OUT.get(name)
    return reason and re.sub(r"`(\w+)`", lambda found: spell(found[1]), reason)
