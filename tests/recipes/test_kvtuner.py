"""KVTuner's acceptance checks (section 9 of its sheet): tables, pruning, clustering, search, errors, the whole command on a
tiny model. What needs a real model is in test_kvtuner_smollm2.py; the cache itself is tested in tests/zoo."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
from tiny_models import Packing, make_base

import zoo  # noqa: F401
from recipes.common.kv_allocation import (
    Group,
    cluster,
    depth_table,
    knapsack,
    ladder,
    pareto_pairs,
    random_table,
    table_of,
    uniform_genome,
)
from recipes.common.kv_search import best, search
from recipes.common.kv_simulation import (
    first_divergence,
    greedy,
    log_probabilities,
    mean_kl,
    measure_errors,
    quantised_cache,
    round_keys,
    round_values,
)
from recipes.common.kv_tables import (
    FORMATS,
    PAIRS,
    bytes_per_token,
    effective_bits,
    equivalent_bits,
    official_yaml,
    pair_bits,
    parse_pairs,
    presets,
    read_table,
)
from recipes.common.nsga2 import constrained_dominates, hypervolume, nsga2, pareto_front
from recipes.common.retrieval import hidden_codes
from recipes.common.runner import parse
from zoo.cache import KVTunerCache
from zoo.errors import UserError

IDS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
PER_TOKEN, KIVI = FORMATS["per_token"], FORMATS["kivi"]


# --------------------------------------------------------------------------------------------------------------- tables


def test_11_published_tables_have_the_bits_on_their_labels():
    known = presets()
    assert len(known) >= 6
    for name, preset in known.items():
        assert equivalent_bits(preset["layers"]) == pytest.approx(preset["equivalent_bits"], abs=0.01), name
        assert set(preset["layers"]) <= set(PAIRS)
        assert read_table(name) == (preset["mode"], preset["layers"])


def test_11_tables_go_through_the_official_form_and_ours(tmp_path):
    table = ((8, 4), (4, 2), (2, 2), (16, 16))
    (tmp_path / "official.yaml").write_text(official_yaml(table))
    assert read_table(str(tmp_path / "official.yaml")) == (None, table)
    assert yaml.safe_load(official_yaml(table))[1] == {"nbits_key": 4, "nbits_value": 2}
    (tmp_path / "config.json").write_text(json.dumps({"kv_cache_quantization": {"mode": "kivi", "layers": table}}))
    assert read_table(str(tmp_path / "config.json")) == ("kivi", table)


@pytest.mark.parametrize(
    (
        "form",
        "table",
        "expected",
    ),  # section 4: bytes a token of Llama-3.1-8B (8 KV heads of 128, 32 layers) and SmolLM2
    [
        (PER_TOKEN, ((16, 16),) * 32, 131072),
        (PER_TOKEN, ((8, 8),) * 32, 67584),
        (PER_TOKEN, ((4, 4),) * 32, 34816),
        (PER_TOKEN, presets()["llama-3.1-8b-per-token-3.59"]["layers"], 31457),
        (KIVI, ((8, 8),) * 32, 73728),
        (KIVI, ((4, 4),) * 32, 40960),
        (KIVI, presets()["llama-3.1-8b-kivi-3.25"]["layers"], 34816),
        (KIVI, ((2, 2),) * 32, 24576),
    ],
)
def test_bytes_a_token(form, table, expected):
    assert bytes_per_token(table, form, 8, 128) == pytest.approx(expected, rel=2e-3)


def test_bytes_a_token_of_smollm2():
    assert bytes_per_token(((8, 8),) * 30, PER_TOKEN, 3, 64) == 12240
    assert bytes_per_token(((4, 4),) * 30, PER_TOKEN, 3, 64) == 6480
    assert effective_bits(((4, 4),) * 30, KIVI, 64) == 5 and effective_bits(((4, 4),), PER_TOKEN, 128) == 4.25


# --------------------------------------------------------------------------------------------------- pruning, clustering


@given(st.lists(st.integers(0, 6), min_size=9, max_size=9))
def test_pruning_keeps_what_nothing_beats(errors):
    row = {pair: float(error) for pair, error in zip(PAIRS, errors, strict=True)}

    def beaten(pair):
        for other in PAIRS:
            no_worse = pair_bits(other) <= pair_bits(pair) and row[other] <= row[pair]
            strictly = pair_bits(other) < pair_bits(pair) or row[other] < row[pair]
            tie = not strictly and no_worse and other[0] > pair[0]
            if no_worse and (strictly or tie):
                return True
        return False

    assert set(pareto_pairs(row)) == {pair for pair in PAIRS if not beaten(pair)}
    bits = [pair_bits(pair) for pair in pareto_pairs(row)]
    assert bits == sorted(bits, reverse=True)


def random_errors(layers, seed):
    """Errors that fall with the bits, in layers of three kinds of sensitivity."""
    rng = random.Random(seed)
    kinds = [rng.choice((0.05, 0.3, 1.0)) for _ in range(layers)]
    return [{(k, v): kind * (2.0**-k + 0.3 * 2.0**-v) * rng.uniform(0.95, 1.05) for k, v in PAIRS} for kind in kinds]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [2, 4, 8, 30])
def test_clusters_partition_the_layers_and_share_their_candidates(seed, most):
    errors = random_errors(24, seed)
    candidates = [pareto_pairs(row) for row in errors]
    groups = cluster(errors, candidates, 0.05, 2, most)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(24))
    assert all(candidates[layer] == group.candidates for group in groups for layer in group.layers)
    assert len(groups) <= max(most, len(set(candidates)))


def test_layers_far_from_all_others_stay_alone():
    base = dict.fromkeys(PAIRS, 0.1) | {(8, 8): 0.01}
    errors = [dict(base), {**base, (8, 8): 0.012}, {**base, (8, 8): 0.09, (4, 4): 0.0999}]
    candidates = [((8, 8), (4, 4))] * 3
    assert [g.layers for g in cluster(errors, candidates, 0.01, 2, 8)] == [(0, 1), (2,)]


# ---------------------------------------------------------------------------------------------------- search and rivals


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=n, max_size=n),
            st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=n, max_size=n),
            st.integers(n, 5 * n),
        )
    )
)
@settings(deadline=None)
def test_knapsack_is_the_optimum(case):
    costs, weights, capacity = case
    choices = [
        c
        for c in itertools.product(range(3), repeat=len(costs))
        if sum(w[i] for w, i in zip(weights, c, strict=True)) <= capacity
    ]
    if not choices:
        with pytest.raises(ValueError, match="capacity"):
            knapsack(costs, weights, capacity)
        return
    total = lambda c: sum(cost[i] for cost, i in zip(costs, c, strict=True))  # noqa: E731
    found = knapsack(costs, weights, capacity)
    assert found in choices and total(found) == min(map(total, choices))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_front_and_hypervolume_by_counting(points):
    points = [(float(a), float(b)) for a, b in points]
    kept = {points[i] for i in pareto_front(points)}
    beaten = {p for p in points if any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}
    assert kept == set(points) - beaten
    cells = sum(any(p[0] <= x and p[1] <= y for p in points) for x in range(10) for y in range(10))
    assert hypervolume(points, (10.0, 10.0)) == cells


def test_constraint_domination():
    assert constrained_dominates((9, 3), (1, 5), limit=4)  # within the limit beats what is over it
    assert constrained_dominates((9, 5), (1, 6), limit=4)  # less over
    assert constrained_dominates((1, 3), (2, 3), limit=4) and not constrained_dominates((1, 4), (2, 3), limit=4)


def additive(groups, seed):
    """A loss that adds up over layers, with weights of their own."""
    rng = random.Random(seed)
    weight = [rng.uniform(0.1, 3) for _ in range(sum(len(g.layers) for g in groups))]

    def evaluate(tables):
        return [
            (sum(w * (2.0**-k + 0.3 * 2.0**-v) for w, (k, v) in zip(weight, t, strict=True)), equivalent_bits(t))
            for t in tables
        ]

    return evaluate


GROUPS = [Group((i, i + 6), ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))) for i in range(6)]
SEARCH = {"menu": PAIRS, "max_bits": 4.0, "evals": 150, "population": 20}


def test_9_the_same_seed_gives_the_same_search():
    errors = random_errors(12, 0)
    first, again, other = (search(GROUPS, errors, additive(GROUPS, 1), **SEARCH, seed=seed) for seed in (0, 0, 1))
    assert list(first.items()) == list(again.items()) and list(first) != list(other)
    assert len(first) <= 150


def test_9_the_front_covers_every_uniform_table_and_beats_the_same_number_of_random_ones():
    errors = random_errors(12, 0)
    evaluate = additive(GROUPS, 1)
    archive = search(GROUPS, errors, evaluate, **SEARCH, seed=0)
    front = [list(archive.values())[i] for i in pareto_front(list(archive.values()))]
    for pair in PAIRS:
        loss, bits = evaluate([(pair,) * 12])[0]
        assert any(a <= loss and b <= bits for a, b in front)
    exact = min(
        point[0]
        for genome in itertools.product(range(5), repeat=6)
        for point in evaluate([table_of(genome, GROUPS)])
        if point[1] <= 4
    )
    chosen = best(archive, 4.0)[0]
    assert archive[chosen][0] <= 1.1 * exact and equivalent_bits(chosen) <= 4
    rng = random.Random(0)
    drawn = evaluate([table_of(tuple(rng.randrange(5) for _ in range(6)), GROUPS) for _ in range(150)])
    corner = (max(loss for loss, _ in drawn), 5.0)
    assert hypervolume(list(archive.values()), corner) > hypervolume(drawn, corner)


def test_9_grouping_pays_at_a_small_budget():
    """Hypervolume of 60 evaluations with groups of like layers against every layer alone; mean of three seeds."""
    layers = 24
    rng = random.Random(3)
    kinds = [0.05, 0.4, 2.0]
    kind = [rng.randrange(3) for _ in range(layers)]
    menu = ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
    errors = [{(k, v): kinds[i] * (2.0**-k + 0.3 * 2.0**-v) for k, v in menu} for i in kind]

    def evaluate(tables):
        return [
            (sum(kinds[i] * (2.0**-k + 0.3 * 2.0**-v) for i, (k, v) in zip(kind, t, strict=True)), equivalent_bits(t))
            for t in tables
        ]

    together = [Group(tuple(i for i in range(layers) if kind[i] == which), menu) for which in range(3)]
    alone = [Group((i,), menu) for i in range(layers)]
    options = {"menu": menu, "max_bits": 4.0, "evals": 60, "population": 20}
    volumes = [
        sum(
            hypervolume(list(search(groups, errors, evaluate, **options, seed=seed).values()), (5.0, 5.0))
            for seed in range(3)
        )
        for groups in (together, alone)
    ]
    assert volumes[0] >= volumes[1]


def test_nsga2_never_evaluates_twice_and_stops():
    seen = []

    def evaluate(genomes):
        seen.extend(genomes)
        return [(float(sum(g)), float(9 - sum(g))) for g in genomes]

    options = {"seeds": [(0, 0, 0)], "population": 8, "limit": 9.0, "reference": (10.0, 10.0), "seed": 0}
    archive = nsga2([4, 4, 4], evaluate, budget=500, patience=10**6, **options)
    assert len(seen) == len(set(seen)) == 64 and set(seen) == set(archive)  # the space is exhausted, then it stops
    seen.clear()
    nsga2([9] * 6, lambda g: [(1.0, 1.0)] * len(g), budget=5000, patience=60, **options | {"seeds": []})
    few = nsga2([9] * 6, lambda g: [(1.0, 1.0)] * len(g), budget=5000, patience=60, **options | {"seeds": []})
    assert len(few) <= 8 + 60 + 8


def test_rules_to_hold_the_search_against():
    errors = random_errors(12, 2)
    candidates = [pareto_pairs(row) for row in errors]
    alone = [Group((i,), kept) for i, kept in enumerate(candidates)]
    for reverse in (False, True):
        steps = [equivalent_bits(table_of(genome, alone)) for genome in ladder(alone, errors, reverse)]
        assert steps[0] == 8 and steps[-1] == 2 and all(a > b for a, b in itertools.pairwise(steps))
    first = {reverse: ladder(alone, errors, reverse)[1] for reverse in (False, True)}
    worst = [max(row.values()) for row in errors]
    demoted = {reverse: next(i for i, gene in enumerate(genome) if gene) for reverse, genome in first.items()}
    assert worst[demoted[False]] < worst[demoted[True]]
    for bits in (3.0, 4.0, 5.5):
        tables = {random_table(candidates, bits, seed) for seed in range(5)}
        assert len(tables) > 1 and all(abs(equivalent_bits(t) - bits) <= 0.1 for t in tables)
    assert depth_table(30, 4.0)[0] == depth_table(30, 4.0)[-1] == (8, 8) and depth_table(30, 4.0)[15] == (4, 2)
    assert equivalent_bits(depth_table(30, 4.0)) <= 4
    assert uniform_genome((4, 4), GROUPS) == (2,) * 6


# ------------------------------------------------------------------------------------------------- errors and objectives


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("base") / "llama", "llama", head_dim=32, max_position_embeddings=512)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_rounding_is_that_of_the_cache(model):
    """The model with the simulation's hook is the model with the real cache that quantises its prompt."""
    for form in (PER_TOKEN, KIVI):
        table = ((4, 2), (8, 4))
        cache = KVTunerCache.from_config(
            model.config,
            {
                "method": "kvtuner",
                "version": 1,
                "mode": form.mode,
                "group_size": form.group_size,
                "residual_length": form.residual_length,
                "prefill": "quantized",
                "layers": table,
            },
        )
        with torch.no_grad():
            wanted = model(IDS, past_key_values=cache).logits
            with quantised_cache(model, table, form):
                found = model(IDS, use_cache=False).logits
            plain = model(IDS, use_cache=False).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - plain).abs().max() > 0.01


def test_keys_by_channel_never_mix_channels():
    """A channel of outliers costs its neighbours nothing, whatever the number of tokens (section 7)."""
    k = torch.randn(1, 1, 77, 32, generator=torch.Generator().manual_seed(0))
    calm = round_keys(k, 4, KIVI)
    k[..., 5] *= 1000
    wild = round_keys(k, 4, KIVI)
    others = [i for i in range(32) if i != 5]
    assert torch.equal(calm[..., others], wild[..., others])
    assert torch.equal(wild[:, :, 64:], k[:, :, 64:]) and torch.equal(round_values(k, 2, KIVI)[:, :, 64:], k[:, :, 64:])


def test_errors_are_norm_ratios_of_one_layer_at_a_time(model):
    """e_o against a loop in double on the keys, values and queries that hooks see."""
    prompt, pairs = 24, ((4, 2), (8, 8))
    found = measure_errors(model, IDS, prompt, pairs, PER_TOKEN)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn

        def remember(module, args, kwargs, index=index):
            x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            shape = (*x.shape[:2], -1, module.head_dim)
            q, k, v = (p(x).view(shape).transpose(1, 2).double() for p in (module.q_proj, module.k_proj, module.v_proj))

            def turn(y):
                a, b = y.chunk(2, -1)
                return y * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

            seen[index] = turn(q), turn(k), v

        attention.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        model(IDS, use_cache=False)
    for layer, (q, k, v) in seen.items():
        for place, (bits_k, bits_v) in enumerate(pairs):
            ratios = []
            for row in range(len(IDS)):
                outputs = []
                for kk, vv in (
                    (k, v),
                    (round_keys(k.float(), bits_k, PER_TOKEN), round_values(v.float(), bits_v, PER_TOKEN)),
                ):
                    heads = []
                    for h in range(q.shape[1]):
                        for t in range(prompt, q.shape[2]):
                            score = (kk[row, h // 2, : t + 1].double() @ q[row, h, t]) / q.shape[-1] ** 0.5
                            heads.append(score.softmax(-1) @ vv[row, h // 2, : t + 1].double())
                    outputs.append(torch.stack(heads))
                ratios.append(((outputs[0] - outputs[1]).norm() / outputs[0].norm()).item())
            assert found.output[layer][place] == pytest.approx(sum(ratios) / len(ratios), rel=2e-3)
    assert found.mean()["KV8"] < found.mean()["K4V2"]


def test_kl_and_divergence(model):
    reference = log_probabilities(model, IDS)
    assert mean_kl(model, IDS, reference) < 1e-7
    with quantised_cache(model, ((2, 2), (2, 2)), PER_TOKEN):
        found = mean_kl(model, IDS, reference)
        with torch.no_grad():
            q = model(IDS, use_cache=False).logits.double().log_softmax(-1)
    p = torch.cat(reference).double()
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    answers = greedy(model, IDS[:, :20], 10)
    assert answers.shape == (3, 30) and first_divergence(model, answers, 20) == 10
    assert torch.equal(answers, model.generate(IDS[:, :20], max_new_tokens=10, min_new_tokens=10, do_sample=False))
    answers = answers.clone()
    answers[0, 20] = (answers[0, 20] + 1) % 256
    assert first_divergence(model, answers[:1], 20) == 0


def test_codes_are_hidden_where_they_can_be_found(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_base(tmp_path / "base"))
    items = hidden_codes(tokenizer, 4, 5000, seed=1)
    assert items == hidden_codes(tokenizer, 4, 5000, seed=1) != hidden_codes(tokenizer, 4, 5000, seed=2)
    for prompt, answer in items:
        text, code = tokenizer.decode(prompt), tokenizer.decode(answer)
        assert 3000 < len(prompt) + len(answer) <= 5000 and code.strip().isdigit()
        subject = text.rpartition("The code of ")[2].removesuffix(" is")
        assert f"The code of {subject} is{code}." in text and text.count("The code of ") == 5
    with pytest.raises(UserError, match="--retrieval-tokens 50"):
        hidden_codes(tokenizer, 1, 50)


# --------------------------------------------------------------------------------------------------- the whole command

WORDS = "a quick test of how the recipe runs from start to end with some plain words "
SMALL = {
    "--nsamples": 2,
    "--calib_samples": 2,
    "--seqlen": 48,
    "--eval_windows": 1,
    "--eval_seqlen": 64,
    "--retrieval_items": 0,
    "--speed_tokens": 0,
    "--evals": 24,
    "--population": 8,
    "--max_bits": 4,
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "calibration.txt").write_text(WORDS * 60)
    return make_base(folder / "model", "qwen2", num_hidden_layers=4, head_dim=32)


def command(base, output, *more, **changes):
    flags = SMALL | {"--model": base, "--calibration": base.parent / "calibration.txt", "--output": output}
    flags |= {f"--{key}": value for key, value in changes.items()}
    arguments = [str(x) for pair in flags.items() for x in pair]
    return [sys.executable, "-m", "recipes", "kvtuner", *arguments, *more]


def run(arguments):
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "kv"
    process = run(command(base, output))
    assert process.returncode == 0, process.stderr
    return output, json.loads((output / "report.json").read_text())


def test_end_to_end(base, finished):
    output, report = finished
    table = json.loads((output / "config.json").read_text())["kv_cache_quantization"]
    assert table["layers"] == report["cache"]["layers"] and table["equivalent_bits"] <= 4
    assert {"KV8", "KV4", "kivi-4", "ladder", "reversed", "depth", "random", "knapsack"} <= set(report["baselines"])
    bits = {point["bits"]: point["loss"] for point in report["cache"]["searched"]}
    within = min(loss for b, loss in bits.items() if b <= 4)
    uniform = report["cache"]["uniform"]["KV4"]
    assert within <= uniform["loss"]
    assert table["search"]["evals"] == len(report["cache"]["searched"]) <= 24
    assert report["size"]["compressed_bytes"] == report["size"]["dense_bytes"]
    assert read_table(str(next(output.glob("kv_table_4_0.yaml"))))[1] == tuple(map(tuple, table["layers"]))
    card = (output / "README.md").read_text()
    assert "plots/cache_bits.png" in card and (output / "plots" / "cache_front.png").exists()
    honest = run([sys.executable, "-m", "recipes", "verify", str(output)])
    assert honest.returncode == 0, honest.stdout + honest.stderr
    config = json.loads((output / "config.json").read_text())
    for changed, said in (({"layers": [[8, 8]] * 4}, "layers is"), ({"mode": "kivi"}, "mode is")):
        wrong = config | {"kv_cache_quantization": table | changed}
        (output / "config.json").write_text(json.dumps(wrong))
        caught = run([sys.executable, "-m", "recipes", "verify", "--static", str(output)])
        assert caught.returncode == 1 and said in caught.stdout
    (output / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    out = model.generate(IDS[:, :8], max_new_tokens=4, return_dict_in_generate=True)
    assert [[layer.key_bits, layer.value_bits] for layer in out.past_key_values.layers] == table["layers"]
    assert out.past_key_values.nbytes / 3 / 11 == pytest.approx(
        report["cache"]["models"]["kvtuner"]["bytes_per_token"], rel=0.01
    )


def test_packed_weights_and_packed_cache_stack(tmp_path_factory, tmp_path):
    """From a checkpoint with packed bits: its weights stay packed, byte for byte, and the cache comes on top."""
    root = tmp_path_factory.mktemp("stack")
    (root / "calibration.txt").write_text(WORDS * 60)
    packed = Packing(make_base(root / "dense", "llama", head_dim=32), (4, 3)).write(root / "packed")
    output = tmp_path / "kv"
    process = run(command(packed, output, "--baselines", "KV4"))
    assert process.returncode == 0, process.stderr
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (output, packed))
    assert config["compression_config"] == before["compression_config"] and config["kv_cache_quantization"]["layers"]
    tensors = [load_file(folder / "model.safetensors") for folder in (output, packed)]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    model = AutoModelForCausalLM.from_pretrained(output)
    out = model.generate(IDS[:, :8], max_new_tokens=4, return_dict_in_generate=True)
    assert type(out.past_key_values).__name__ == "KVTunerCache" and "qweight" in str(list(tensors[0]))
    honest = run([sys.executable, "-m", "recipes", "verify", str(output)])
    assert honest.returncode == 0, honest.stdout + honest.stderr


def test_killed_and_resumed_gives_the_same_table(base, finished, tmp_path):
    output, state = tmp_path / "kv", tmp_path / "kv.state"
    for files in (3, 8):
        process = subprocess.Popen(
            command(base, output, *(["--resume"] if state.exists() else [])), env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        lines = 0
        while process.poll() is None and lines < 4 * files:
            time.sleep(0.02)
            lines = sum(path.read_text().count("\n") for path in state.rglob("evaluations-*.jsonl"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    resumed = run(command(base, output, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    first, again = (json.loads((folder / "report.json").read_text()) for folder in (finished[0], output))
    for key in ("layers", "searched", "models"):
        assert first["cache"][key] == again["cache"][key], key
    assert first["compressed"] == again["compressed"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "K8V3"], "--pairs: pair 0 has 3 bits; one of 2, 4, 8, 16"),
        (["--pairs", "banana"], "--pairs banana"),
        (["--max_bits", "1.5"], "--max-bits 1.5: from 2"),
        (["--max_bits", "17"], "--max-bits 17"),
        (["--evals", "10"], "--evals 10"),
        (["--eps", "0"], "--eps 0"),
        (["--objective", "luck"], "--objective luck"),
        (["--group_size", "32"], "--mode per_token"),
        (["--mode", "kivi", "--group_size", "-1"], "--group-size -1"),
        (["--mode", "kivi", "--group_size", "20"], "--group-size 20"),
        (["--mode", "kivi", "--residual_length", "48"], "--residual-length 48"),
        (["--load_table", "llama-3.1-8b-kivi-3.25"], "it is for mode kivi, not per_token"),
        (["--load_table", "missing.yaml"], "neither a file that can be read"),
        (["--baselines", "KV3"], "--baselines KV3"),
        (["--export", "gguf"], "--export"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message):
    with pytest.raises(UserError) as caught:
        parse("kvtuner", flags).check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_table": "llama-3.1-8b-per-token-3.59"}, "it has 32 layers"),
        ({"eval_seqlen": "4096"}, "takes 128 tokens at most"),
        ({"mode": "kivi", "group_size": "24", "residual_length": "24"}, "head size 32"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(base, tmp_path, changes, said):
    process = run(command(base, tmp_path / "out", **changes))
    assert process.returncode == 2, process.stderr
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not list(tmp_path.iterdir())


def test_pairs_are_parsed():
    assert parse_pairs(["K8V4", "KV2", "KV16", "KV2"]) == ((8, 4), (2, 2), (16, 16))
