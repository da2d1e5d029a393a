"""What compressed causal language models add to `packed.py`: a KV cache with widths of its own for each layer."""

from ..cache import ATTENTION, CACHE, KVTunerCache, check_table, give_cache
from .packed import PackedConfigMixin, PackedModelMixin


class CausalConfigMixin(PackedConfigMixin):
    """Mixed in before a stock config class, beside the fields `compression_config` and `kv_cache_quantization: dict | None`
    (see cache.py).
    """

    auto_classes = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}


class CausalModelMixin(PackedModelMixin):
    """Mixed in before a stock model class whose config is a CausalConfigMixin."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.kv_cache_quantization:
            check_table(config, config.kv_cache_quantization)
            if config._attn_implementation == "sdpa":
                self.set_attn_implementation(ATTENTION)
            self.base_model.register_forward_pre_hook(give_cache, with_kwargs=True)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers, but where that would make a DynamicCache, a config with a table gets its own cache."""
        if (
            self.config.kv_cache_quantization
            and model_kwargs.get(CACHE) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation is None
        ):
            model_kwargs[CACHE] = KVTunerCache.from_config(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
