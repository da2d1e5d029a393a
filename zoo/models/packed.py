"""What every compressed model class adds to its stock transformers class: packed layers, a strict load, a full save."""

from pathlib import Path

from safetensors import SafetensorError

from ..bundle import bundle_stem, write_bundle
from ..errors import UserError
from ..layers.packed_linear import REBUILD, PackedLinear
from ..layers.packing import pack_linears

FORMAT_VERSION = 1


def packed_modules(config) -> dict[str, dict]:
    """{module name in the causal language model: weight format} of a config; UserError if a newer slimzoo wrote it."""
    compression = config.compression_config or {}
    version = compression.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"compression_config.format_version {version} is unknown, {FORMAT_VERSION} is needed: update slimzoo."
        )
    return compression.get("modules", {})


def auto_map(model_class: type) -> dict[str, str]:
    """The `auto_map` entry of config.json: where a loader without slimzoo finds the classes of this family."""
    config_class = model_class.config_class
    prefix = f"{bundle_stem(config_class)}.{config_class.__name__.removesuffix('Config')}"
    return {
        "AutoConfig": f"{prefix}Config",
        "AutoModel": f"{prefix}Model",
        "AutoModelForCausalLM": f"{prefix}ForCausalLM",
    }


class PackedModelMixin:
    """Mixed in before a stock model class; its config has a field `compression_config`.

    Loading refuses whatever does not fit: stock transformers fills missing tensors with random numbers and only
    prints a table, which for packed weights is never what anybody wants.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        modules = packed_modules(config)
        if self.base_model is self:  # the names are those in the causal language model
            prefix = f"{self.base_model_prefix}."
            modules = {name.removeprefix(prefix): spec for name, spec in modules.items() if name.startswith(prefix)}
        pack_linears(self, modules)

    def _init_weights(self, module):
        if not isinstance(module, PackedLinear):  # those start as a valid zero matrix
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As PreTrainedModel.from_pretrained, but a checkpoint with missing, unknown, wrongly shaped or contradictory
        tensors raises UserError. The packed tensors come back frozen: adapters train on top, they do not.
        """
        kwargs["ignore_mismatched_sizes"] = True  # reaches our own check, which is stricter and speaks one sentence
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise UserError(f"{pretrained_model_name_or_path}: a weights file cannot be read ({error}); {REBUILD}.") from None
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model.__dict__.pop("_checked_complete", False):
            raise RuntimeError("this transformers loads without reporting missing tensors: install 5.20 up to 5.23.")
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear):
                layer.requires_grad_(False)
                if layer.device.type != "meta":  # offloaded to disk: read layer by layer, later
                    layer.validate(name)
        return loaded

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        unexpected = loading_info.unexpected_keys
        if self.base_model is self:  # loaded without its head
            unexpected = {name for name in unexpected if name.startswith(f"{self.base_model_prefix}.")}
        shapes = {
            f"{name} has shape {tuple(found)} instead of {tuple(wanted)}"
            for name, found, wanted in loading_info.mismatched_keys
        }
        missing = {f"{name} is missing" for name in loading_info.missing_keys}
        problems = sorted(missing) + sorted(shapes) + sorted(f"{name} is unknown" for name in unexpected)
        if problems:
            more = f" and {len(problems) - 1} more tensors are wrong" if len(problems) > 1 else ""
            raise UserError(f"{self.name_or_path}: {problems[0]}{more}; {REBUILD}.")
        self._checked_complete = True

    def save_pretrained(self, save_directory, *args, max_shard_size="5GB", push_to_hub=False, **kwargs):
        """As PreTrainedModel.save_pretrained, and the folder also carries the code that loads it without slimzoo."""
        hub_arguments = {key: kwargs.pop(key) for key in HUB_ARGUMENTS & kwargs.keys()}
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        self.config.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory, *args, max_shard_size=max_shard_size, **kwargs)
        if kwargs.get("is_main_process", True) and not adapter_only:
            write_bundle(Path(save_directory), type(self).config_class)
        if push_to_hub:  # after the code is there; the stock path would upload before
            self.push_to_hub(hub_arguments.pop("repo_id", Path(save_directory).name), **hub_arguments)
        return None


HUB_ARGUMENTS = {"repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags"}
