"""A masked network as a checkpoint holds it: its kept values, with their positions as a seed, as bits or as zeros."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from recipes.common.loops.training import Masks, apply_masks
from zoo.kernels.bitmask_linear.reference import pack_bitmask
from zoo.random_mask import GENERATOR, digest

NUMBER_BYTES = 4  # checkpoints are fp32
STORAGES = ("seed", "bitmask", "dense")


def pack_masked(
    model: PreTrainedModel, masks: Masks, storage: str, seed: int, about: dict, drawn: bool = True
) -> PreTrainedModel:
    """The model with its masked layers packed where that takes fewer bytes, its config saying how.

    Args:
        masks: {weight: bool}, in the order of the layers' places, which with `seed` and their counts name them.
        storage: of STORAGES; dense means zeros in place. about: what else `compression_config` says.
        drawn: whether the masks are those that the seed names; only then can they be stored as it.
    """
    assert drawn or storage != "seed"
    apply_masks(model, masks)
    state, modules = model.state_dict(), {}
    for index, (name, mask) in enumerate(masks.items()):
        module, weight = name.removesuffix(".weight"), state[name]
        values, bits, row_offsets = pack_bitmask(weight.flatten(1), mask.flatten(1))
        tensors = {"values": values}
        if storage == "seed":
            spec = {"seed": seed, "layer": index, "generator": GENERATOR, "sha256": digest(bits)}
            spec = {"format": "seeded_bitmask", "nnz": len(values), **spec}
        else:
            tensors |= {"mask": bits, "row_offsets": row_offsets}
            spec = {"format": "bitmask", "nnz": len(values)}
        if storage == "dense" or sum(tensor.nbytes for tensor in tensors.values()) >= weight.nbytes:
            continue
        del state[name]
        state |= {f"{module}.{key}": tensor for key, tensor in tensors.items()}
        modules[module] = spec
    config = copy.deepcopy(model.config)
    config.compression_config = {"format_version": 1, **about, "modules": modules}
    packed = type(model)(config)
    packed.load_state_dict(state)
    for name in modules:
        packed.get_submodule(name).validate(name)
    return packed.eval()


def storage_table(model: PreTrainedModel, masks: Masks, seed: int) -> dict:
    """What the pruned weights take in each storage, and would take as compressed rows (CSR)."""
    modules, rows = {name.removesuffix(".weight") for name in masks}, []
    for storage in STORAGES[::-1]:
        state = pack_masked(model, masks, storage, seed, {}).state_dict().items()
        used = [t.nbytes for n, t in state if n.rpartition(".")[0] in modules and not n.endswith(".bias")]
        rows.append([storage, f"{sum(used):,}"])
    columns = sum(int(mask.sum()) * (NUMBER_BYTES + 2) + 4 * (len(mask) + 1) for mask in masks.values())
    rows.insert(2, ["compressed rows, 16-bit columns (not offered)", f"{columns:,}"])
    return {"header": ["storage", "bytes"], "rows": rows}
