"""Fidelity: KL against torch's own in float64, what a file of predictions keeps, quantiles and their errors, and bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.common.metrics import fidelity as module
from recipes.common.metrics.fidelity import Reference, compared_windows, divergence, fidelity, quantile_of


def logits(rows=7, vocabulary=13, seed=0, scale=3.0):
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def exact(reference, own):
    p, q = reference.double().log_softmax(-1), own.double().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
def test_kl_is_torchs_in_float64_with_the_reference_first(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    reference, own = logits(), logits(seed=1)
    found = divergence(reference, own)
    assert found.dtype == torch.float64 and found.shape == (7,)
    torch.testing.assert_close(found, exact(reference, own), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(divergence(reference.log_softmax(-1), own + 5), found, rtol=1e-5, atol=1e-6)
    assert (found - divergence(own, reference)).abs().max() > 0.1, "KL has a direction"
    assert divergence(reference, reference).abs().max() < 1e-6


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert divergence(p, q).item() == pytest.approx(math.log(2))  # what p never says adds nothing


def test_a_reference_on_file_is_nearly_the_logits_themselves(tmp_path):
    dense, own = logits(50, 101), logits(50, 101) + 0.2 * logits(50, 101, seed=2)
    tied = dense.clone()
    tied[0, :2] = tied[0].max() + torch.tensor([1.0, 1.00001])  # equal once they are rounded to float16
    kl, same = Reference(tmp_path / "new", writing=True).compare("A-0", tied)
    assert not kl.any() and same.all(), "the dense model is itself"
    kl, same = Reference(tmp_path / "new").compare("A-0", tied)
    assert same.all() and kl.max() < 2e-6
    kl, same = Reference(tmp_path / "new").compare("A-0", own)
    torch.testing.assert_close(kl, exact(tied, own), rtol=5e-3, atol=1e-5)
    assert same.tolist() == (tied.argmax(-1) == own.argmax(-1)).tolist() and not same.all()
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size == pytest.approx(2 * 50 * 101 + 4 * 50, abs=256)


def test_impossible_predictions_stay_numbers(tmp_path):
    dense = logits()
    dense[:, 3] = -torch.inf
    Reference(tmp_path, writing=True).compare("test", dense)
    kl, same = Reference(tmp_path).compare("test", dense)
    assert kl.isfinite().all() and kl.max() < 1e-5 and same.all()


def test_metrics_of_windows_by_hand():
    kl = [torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([4.0, 4.0, 4.0, 0.0])]
    agrees = [torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 1, 1, 1]).bool()]
    found = fidelity(kl, agrees, "windows")
    assert found.keys() == {"kl", "kl_median", "kl_p99", "agreement"}
    assert (found["kl"]["value"], found["kl"]["raw"]) == (2.5, [[2, 3]])
    assert found["kl"]["spread"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    assert (found["agreement"]["value"], found["agreement"]["raw"]) == (0.75, [[0.5, 1]])
    assert found["kl_median"]["value"] == 3.0  # of 0 0 1 2 4 4 4 5
    assert found["kl_p99"]["value"] == pytest.approx(4.93)
    assert {m["n"] for m in found.values()} == {2} and {m["n_of"] for m in found.values()} == {"windows"}
    assert [found[key]["higher_is_better"] for key in ("kl", "agreement")] == [False, True]


def test_metrics_of_items_have_a_value_an_item():
    kl, agrees = torch.arange(103) / 100, torch.arange(103) % 2 == 0
    found = fidelity([kl], [agrees], "items")
    assert len(found["kl"]["raw"][0]) == len(found["agreement"]["raw"][0]) == found["kl_p99"]["n"] == 103
    assert found["kl_median"]["value"] == pytest.approx(0.51) and len(found["kl_median"]["raw"][0]) == module.GROUPS


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.sampled_from((0.5, 0.99))
)
def test_a_quantile_is_that_of_all_and_the_mean_of_its_raw_values(rows, q):
    found = quantile_of([torch.tensor(row) for row in rows], q, len(rows), "windows")
    everything = torch.tensor([x for row in rows for x in row]).double()
    assert found["value"] == pytest.approx(everything.quantile(q).item(), abs=1e-6)
    if len(rows) > 1:
        (raw,) = found["raw"]
        assert sum(raw) / len(raw) == pytest.approx(found["value"], abs=1e-5)
        without = [torch.tensor([x for r in rows[:g] + rows[g + 1 :] for x in r]).quantile(q) for g in range(len(rows))]
        squares = sum((t.item() - sum(without).item() / len(rows)) ** 2 for t in without)
        assert found["spread"] == pytest.approx(math.sqrt((len(rows) - 1) / len(rows) * squares), abs=1e-5)
    else:
        assert found["spread"] is None and "raw" not in found


def test_dense_predictions_have_a_bounded_size():
    windows = {name: torch.zeros(12, 512) for name in "ABC"}
    assert compared_windows(windows, 49_152) == 12  # the offline default
    assert compared_windows({name: torch.zeros(128, 2048) for name in "ABC"}, 151_936) == 1
    few = compared_windows(windows, 151_936)
    assert 1 < few < 12 and few * 3 * 2 * 511 * 151_936 <= module.MOST_BYTES < (few + 1) * 3 * 2 * 511 * 151_936
