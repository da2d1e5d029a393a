"""What every compressed model class adds to its stock transformers class: packed layers, a strict load, a full save."""

from pathlib import Path

from safetensors import SafetensorError

from ..bundle import bundle_stem, write_bundle
from ..cache import ATTENTION, CACHE, KVTunerCache, check_table, give_cache
from ..errors import UserError
from ..layers.packed_linear import REBUILD, PackedLinear
from ..layers.packing import pack_linears

FORMAT_VERSION = 1


class PackedConfigMixin:
    """Mixed in before a stock config class, beside the fields `compression_config: dict | None` (what is packed)
    and `kv_cache_quantization: dict | None` (see cache.py).

    Wherever the config is saved, alone or with its model, the code that reads it goes along.
    """

    base_model_tp_plan = None  # the stock plans slice dense weights

    def save_pretrained(self, save_directory, *args, **kwargs):
        stem, prefix = bundle_stem(type(self).__module__), type(self).__name__.removesuffix("Config")
        self.auto_map = {
            "AutoConfig": f"{stem}.{prefix}Config",
            "AutoModel": f"{stem}.{prefix}Model",
            "AutoModelForCausalLM": f"{stem}.{prefix}ForCausalLM",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        write_bundle(Path(save_directory), type(self).__module__)

    def packed_modules(self) -> dict[str, dict]:
        """{module name in the causal language model: weight format}; UserError if a newer slimzoo wrote it."""
        compression = self.compression_config or {}
        version = compression.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise UserError(
                f"compression_config.format_version {version} is unknown, {FORMAT_VERSION} is needed: update slimzoo."
            )
        return compression.get("modules", {})


class PackedModelMixin:
    """Mixed in before a stock model class whose config is a PackedConfigMixin.

    Loading refuses whatever does not fit: stock transformers fills missing tensors with random numbers and only
    prints a table, which for packed weights is never what anybody wants.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        modules = config.packed_modules()
        if self.base_model is self:  # the names are those in the causal language model
            prefix = f"{self.base_model_prefix}."
            modules = {name.removeprefix(prefix): spec for name, spec in modules.items() if name.startswith(prefix)}
        pack_linears(self, modules)
        if config.kv_cache_quantization:
            check_table(config, config.kv_cache_quantization)
            if config._attn_implementation == "sdpa":
                self.set_attn_implementation(ATTENTION)
            self.base_model.register_forward_pre_hook(give_cache, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As PreTrainedModel.from_pretrained, but a checkpoint with missing, unknown, wrongly shaped or contradictory
        tensors raises UserError. The packed tensors come back frozen: adapters train on top, they do not.
        """
        kwargs["ignore_mismatched_sizes"] = True  # reaches our own check, which is stricter and speaks one sentence
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise UserError(
                f"{pretrained_model_name_or_path}: a weights file cannot be read ({error}); {REBUILD}."
            ) from None
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with output_loading_info=True
        if not model.__dict__.pop("_all_tensors_fit", False):
            raise RuntimeError(
                "this transformers does not say which tensors are missing: install one from 5.20 to 5.24."
            )
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear):
                layer.requires_grad_(False)
                if layer.device.type != "meta":  # offloaded to disk: read later, layer by layer
                    layer.validate(name)
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        # Not in the report of output_loading_info, because that describes the adapter when there is one on top.
        super()._adjust_missing_and_unexpected_keys(loading_info)
        unexpected = loading_info.unexpected_keys
        if self.base_model is self:  # loaded without its head
            unexpected = {name for name in unexpected if name.startswith(f"{self.base_model_prefix}.")}
        problems = [f"{name} is missing" for name in sorted(loading_info.missing_keys)]
        problems += [
            f"{name} has shape {tuple(found)} instead of {tuple(wanted)}"
            for name, found, wanted in sorted(loading_info.mismatched_keys)
        ]
        problems += [f"{name} is unknown" for name in sorted(unexpected)]
        if problems:
            more = f" and {len(problems) - 1} more tensors are wrong" if problems[1:] else ""
            raise UserError(f"{self.name_or_path}: tensor {problems[0]}{more}; {REBUILD}.")
        self._all_tensors_fit = True

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

    def save_pretrained(self, save_directory, *args, max_shard_size="5GB", **kwargs):
        """As PreTrainedModel.save_pretrained, with smaller shards."""
        super().save_pretrained(save_directory, *args, max_shard_size=max_shard_size, **kwargs)
