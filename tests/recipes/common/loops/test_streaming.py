"""The store of the streamed loop: every form of a matrix comes back as the weight that it stands for."""

import pytest
import torch

from recipes.common.loops.streaming import MatrixStore, Method, Variant
from zoo.kernels.bitmask_linear.reference import pack_bitmask


@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=["unstructured", "2:4"])
def test_a_sparse_matrix_is_rebuilt_from_its_bits(tmp_path, pattern):
    """An unstructured mask does not tell how many columns there are (here 20, in bytes of 8): the store remembers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 20, generator=generator)
    scores = torch.rand(6, 5, 4, generator=generator)
    mask = torch.zeros_like(scores).scatter_(-1, scores.topk(2).indices, 1).flatten(1).bool()
    if pattern is None:
        mask = torch.rand(6, 20, generator=generator) < 0.4
        mask[2] = False
    values, bits, row_offsets = pack_bitmask(weight, mask, **({"per_row": 10} if pattern else {}))
    tensors = {"values": values, "mask": bits} | ({} if pattern else {"row_offsets": row_offsets})
    spec = {"format": "bitmask"} | ({"pattern": list(pattern)} if pattern else {"nnz": int(mask.sum())})
    method, store = Method("sparse", lambda *_: {}, packed=("sparse",)), MatrixStore(tmp_path)
    store.save(method, "layer", {"sparse": Variant(tensors, None, weight * mask, spec)}, {"sparse": {}})
    assert torch.equal(store.weight("sparse", "layer", "sparse"), weight * mask)


def test_a_form_that_is_not_packed_comes_back_in_bfloat16(tmp_path):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    store = MatrixStore(tmp_path)
    store.save(Method("dense", lambda *_: {}), "layer", {"dense": Variant({}, None, weight)}, {"dense": {}})
    assert torch.equal(store.weight("dense", "layer", "dense"), weight.bfloat16())
