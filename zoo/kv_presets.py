"""Tables of KV-cache widths that the authors of KVTuner ship with their code (arXiv 2502.04420), for other models.

A table holds for its model and its mode only:

    cache = KVTunerCache.from_config(model.config, kv_preset("llama-3.1-8b-kivi-3.25"))
"""

from .errors import UserError

# name: (model, mode, mean width that the paper prints, key digit and value digit of every layer)
PRESETS = {
    "llama-3.1-8b-per-token-3.59": (
        "meta-llama/Llama-3.1-8B-Instruct",
        "per_token",
        3.59,
        "48 42 42 42 42 44 44 42 44 44 44 44 44 42 44 44 44 44 42 42 44 44 42 42 42 42 44 42 44 42 44 42",
    ),
    "llama-3.1-8b-kivi-3.25": (
        "meta-llama/Llama-3.1-8B-Instruct",
        "kivi",
        3.25,
        "22 44 44 44 22 42 42 44 42 42 42 42 42 84 42 42 42 84 42 42 42 42 42 42 42 22 42 22 42 44 42 44",
    ),
    "qwen2.5-7b-per-token-4.00": (
        "Qwen/Qwen2.5-7B-Instruct",
        "per_token",
        4.00,
        "88 42 42 82 42 42 44 44 42 44 44 44 44 82 44 44 44 44 44 44 44 44 44 44 42 42 44 82",
    ),
    "qwen2.5-7b-per-token-5.00": (
        "Qwen/Qwen2.5-7B-Instruct",
        "per_token",
        5.00,
        "82 44 44 82 44 44 44 44 84 84 44 44 84 82 84 44 84 84 84 44 84 84 84 44 84 44 84 82",
    ),
    "qwen2.5-3b-per-token-3.64": (
        "Qwen/Qwen2.5-3B-Instruct",
        "per_token",
        3.64,
        "84 42 42 42 42 42 42 42 42 42 44 42 42 42 42 42 42 42 88 44 42 42 42 42 44 42 44 88 42 88 42 42 42 44 42 42",
    ),
    "qwen2.5-3b-kivi-3.17": (
        "Qwen/Qwen2.5-3B-Instruct",
        "kivi",
        3.17,
        "48 48 24 42 24 42 42 42 42 42 42 42 22 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 22 42 42 42 42 42 44 44",
    ),
    "mistral-7b-v0.3-per-token-3.78": (
        "mistralai/Mistral-7B-Instruct-v0.3",
        "per_token",
        3.78,
        "48 42 42 84 84 88 88 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 42 84 42 42 42 42 42 42 42 84",
    ),
}


def kv_preset(name: str) -> dict:
    """The table as `kv_cache_quantization` of a config. Raises: UserError, naming the presets, for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"KV preset {name!r}: one of {', '.join(PRESETS)} is needed.")
    _, mode, _, digits = PRESETS[name]
    group, residual = (32, 32) if mode == "kivi" else (-1, 0)
    layers = [[int(pair[0]), int(pair[1])] for pair in digits.split()]
    return {
        "method": "kvtuner",
        "version": 1,
        "mode": mode,
        "group_size": group,
        "residual_length": residual,
        "layers": layers,
    }
