"""KVTuner without a model: tables, pruning, clustering, NSGA-II, the baselines, and results kept on file."""

import itertools
import json
import math
import random
from contextlib import contextmanager

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.common.core.cli import RECIPES
from recipes.common.core.state import World
from recipes.kvtuner import KVTuner
from recipes.kvtuner import genetic as nsga2_module
from recipes.kvtuner import searching as kv_search
from recipes.kvtuner.allocation import (
    Group,
    cluster,
    depth_table,
    isolated_losses,
    knapsack,
    knapsack_genome,
    ladder,
    pareto_pairs,
    random_table,
    singles,
    table_of,
    uniform_genome,
)
from recipes.kvtuner.baselines import RANDOM_TABLES, baseline_tables
from recipes.kvtuner.evidence import same_tables
from recipes.kvtuner.genetic import constrained_dominates, crowding, hypervolume, nsga2, pareto_front, rank
from recipes.kvtuner.searching import Evaluations, best, best_uniform, held_out_scores, search
from recipes.kvtuner.tables import (
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
    table_text,
)
from zoo.errors import UserError

PER_TOKEN, KIVI = FORMATS["per_token"], FORMATS["kivi"]


# --------------------------------------------------------------------------------------------------------------- tables


def test_published_tables_have_the_bits_on_their_labels():
    known = presets()
    assert len(known) >= 6
    for name, preset in known.items():
        assert equivalent_bits(preset["layers"]) == pytest.approx(preset["equivalent_bits"], abs=0.01), name
        assert set(preset["layers"]) <= set(PAIRS)
        assert read_table(name) == (preset["mode"], preset["layers"])


def test_tables_go_through_the_official_form_and_ours(tmp_path):
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
    ),  # bytes a token of Llama-3.1-8B (8 KV heads of 128, 32 layers) and SmolLM2
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


@settings(deadline=None)
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


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None)
def test_clusters_are_the_chains_of_near_layers_with_the_same_candidates(layers):
    """While there are few enough groups: connected components, by hand, of 'nearer than eps'."""
    menus = (((8, 8), (4, 4)), ((8, 8), (4, 2)))
    candidates = [menus[kind] for _, _, kind in layers]
    errors = [dict(zip(menus[kind], (a / 10, b / 10), strict=True)) for a, b, kind in layers]
    found = cluster(errors, candidates, 0.1501, 2, len(layers))
    group_of = list(range(len(layers)))
    for _ in layers:
        for (i, a), (j, b) in itertools.permutations(enumerate(layers), 2):
            if a[2] == b[2] and math.dist(a[:2], b[:2]) <= 1.501:
                group_of[i] = group_of[j] = min(group_of[i], group_of[j])
    expected = {tuple(i for i in range(len(layers)) if group_of[i] == g) for g in set(group_of)}
    assert {group.layers for group in found} == expected


def test_too_many_groups_are_merged_nearest_first():
    errors = [{(8, 8): 0.0, (4, 4): x} for x in (0.0, 0.5, 0.52, 1.5, 3.0)]
    candidates = [((8, 8), (4, 4))] * 5
    for most, expected in ((4, [(0,), (1, 2), (3,), (4,)]), (3, [(0, 1, 2), (3,), (4,)]), (1, [(0, 1, 2, 3, 4)])):
        assert [group.layers for group in cluster(errors, candidates, 0.001, 2, most)] == expected
    even = [{(8, 8): 0.0, (4, 4): x} for x in (0.0, 3.0, 3.5, 4.0)]  # no eps leaves three
    assert [group.layers for group in cluster(even, candidates[:4], 0.001, 2, 3)] == [(0,), (1, 2), (3,)]
    apart = [*candidates[:4], ((8, 8), (2, 2))]  # other candidates are never merged, whatever the number allowed
    errors[4] = {(8, 8): 0.0, (2, 2): 0.0}
    assert [group.layers for group in cluster(errors, apart, 0.001, 2, 1)] == [(0, 1, 2, 3), (4,)]


def test_layers_far_from_all_others_stay_alone():
    base = dict.fromkeys(PAIRS, 0.1) | {(8, 8): 0.01}
    errors = [dict(base), {**base, (8, 8): 0.012}, {**base, (8, 8): 0.09, (4, 4): 0.0999}]
    candidates = [((8, 8), (4, 4))] * 3
    assert [g.layers for g in cluster(errors, candidates, 0.01, 2, 8)] == [(0, 1), (2,)]


# ---------------------------------------------------------------------------------------------------- search and baselines


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


@settings(deadline=None)
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
SEARCH = {"menu": PAIRS, "max_bits": 4.0, "evals": 150, "population": 20, "isolated": False}


def test_the_same_seed_gives_the_same_search():
    errors = random_errors(12, 0)
    first, again, other = (search(GROUPS, errors, additive(GROUPS, 1), **SEARCH, seed=seed) for seed in (0, 0, 1))
    assert list(first.items()) == list(again.items()) and list(first) != list(other)
    assert len(first) <= 150


def test_the_front_covers_every_uniform_table_and_beats_the_same_number_of_random_ones():
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


def test_pruning_and_grouping_pay_at_a_small_budget():
    """Hypervolume of 60 evaluations, with both against every pair for every layer alone; mean of three seeds."""
    errors = random_errors(24, 3)

    def evaluate(tables):
        return [(sum(row[pair] for row, pair in zip(errors, t, strict=True)), equivalent_bits(t)) for t in tables]

    candidates = [pareto_pairs(row) for row in errors]
    grouped = cluster(errors, candidates, 0.05, 2, 8)
    assert len(grouped) <= 8 and any(len(kept) < len(PAIRS) for kept in candidates)
    options = {"menu": PAIRS, "max_bits": 4.0, "evals": 60, "population": 20, "isolated": False}
    volumes = [
        sum(
            hypervolume(list(search(groups, errors, evaluate, **options, seed=seed).values()), (10.0, 5.0))
            for seed in range(3)
        )
        for groups in (grouped, singles([PAIRS] * 24))
    ]
    assert volumes[0] > volumes[1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=14), st.integers(1, 6))
def test_ranks_are_those_of_non_dominated_sorting(points, limit):
    """Front n + 1 is what no member outside fronts 0..n dominates; in a front the ends come first."""
    known = {(place,): (float(a), float(b)) for place, (a, b) in enumerate(points)}
    order = rank(list(known), known, float(limit))
    left = set(known)
    for number in range(1 + max(front for front, _ in order.values())):
        front = {
            a for a in left if not any(constrained_dominates(known[b], known[a], float(limit)) for b in left - {a})
        }
        assert front == {genome for genome, (at, _) in order.items() if at == number}
        for axis in (0, 1):
            low = min(known[genome][axis] for genome in front)
            assert any(order[g][1] == -math.inf for g in front if known[g][axis] == low)
        left -= front
    assert not left


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


def test_parents_are_the_fitter_ones_and_the_best_survive(monkeypatch):
    """Half of the first population is bad in all genes: its children have fewer of these than half. No generation loses
    the best genome within the limit."""
    batches, kept = [], []

    def evaluate(genomes):
        batches.append(genomes)
        return [(float(sum(g)), float(sum(g))) for g in genomes]

    def spy(members, points, limit):
        best = min(points[genome] for genome in points)
        kept.append(any(points[genome] == best for genome in members))
        return rank(members, points, limit)

    monkeypatch.setattr(nsga2_module, "rank", spy)
    draw = random.Random(0).randrange
    seeds = [tuple(low + draw(2) for _ in range(10)) for low in [0] * 10 + [7] * 10]
    options = {"population": 20, "limit": 99.0, "reference": (100.0, 100.0), "seed": 0, "patience": 10**6}
    nsga2([9] * 10, evaluate, seeds=seeds, budget=200, **options)
    genes = [gene for child in batches[1] for gene in child]
    assert sum(genes) / len(genes) < 3.3  # 4 without selection
    assert len(kept) > 10 and all(kept)


def test_crowding_is_the_distance_between_neighbours():
    front = [(0.0, 4.0), (4.0, 0.0), (1.0, 2.0), (3.0, 1.0)]
    assert crowding(front) == [math.inf, math.inf, 3 / 4 + 3 / 4, 3 / 4 + 2 / 4]


def test_the_search_starts_at_the_uniform_tables_and_the_ladder_near_the_limit():
    errors, batches = random_errors(12, 0), []
    evaluate = additive(GROUPS, 1)

    def remember(tables):
        batches.append(list(tables))
        return evaluate(tables)

    search(GROUPS, errors, remember, **SEARCH | {"population": 15}, seed=0)
    assert batches[0] == [(pair,) * 12 for pair in PAIRS]
    steps = [table_of(genome, GROUPS) for genome in ladder(GROUPS, errors)]
    near = sorted(steps, key=lambda table: abs(equivalent_bits(table) - 4.0))[:5]
    assert set(near) <= set(batches[1]) and ((4, 4),) * 12 in batches[1] and len(batches[1]) == 15


def test_the_pick_is_by_held_out_loss_then_steps_then_bits(monkeypatch, tmp_path):
    """KL counts to two digits; the answers' length decides between equals, bits between those."""
    tables = {((8, 8),): (0.1001, 5.0), ((4, 4),): (0.1004, 7.0), ((4, 2),): (0.1004, 7.0), ((2, 2),): (0.2, 9.0)}
    current = []

    @contextmanager
    def hook(model, table, form):
        current[:] = [table]
        yield

    monkeypatch.setattr(kv_search, "quantised_cache", hook)
    monkeypatch.setattr(kv_search, "log_probabilities", lambda *_: None)
    monkeypatch.setattr(kv_search, "mean_kl", lambda *_: tables[current[0]][0])
    monkeypatch.setattr(kv_search, "first_divergence", lambda *_: tables[current[0]][1])
    scores = held_out_scores(None, PER_TOKEN, set(tables), None, None, 0, tmp_path / "held-out.json")
    assert sorted(tables, key=scores.__getitem__) == [((4, 2),), ((4, 4),), ((8, 8),), ((2, 2),)]


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


def test_without_groups_the_search_starts_from_exact_knapsacks():
    """Where uniform tables collapse: of 12 layers 3 need wide values, and 3.25 bits are just enough for them."""
    menu, alone = ((4, 4), (4, 2)), singles([((4, 4), (4, 2))] * 12)
    weights = [8.0 if layer % 4 == 1 else 0.1 for layer in range(12)]

    def evaluate(tables):
        return [(sum(w * (v == 2) for w, (_, v) in zip(weights, t, strict=True)), equivalent_bits(t)) for t in tables]

    options = SEARCH | {"menu": menu, "max_bits": 3.25, "evals": 12, "population": 8, "isolated": True}
    archive = search(alone, [dict(zip(menu, (0.1, 0.2), strict=True))] * 12, evaluate, **options, seed=0)
    found = best(archive, 3.25)[0]
    assert [v for _, v in found] == [4 if layer % 4 == 1 else 2 for layer in range(12)]
    assert best_uniform(archive, 3.25) == [((4, 2),) * 12] and best_uniform(archive, 2) == []
    assert len(archive) <= 12 and archive[found][0] == pytest.approx(0.9) and archive[((4, 2),) * 12][0] > 20


def test_points_outside_the_corner_have_no_volume():
    assert hypervolume([], (1.0, 1.0)) == hypervolume([(1.0, 0.5), (0.5, 1.0)], (1.0, 1.0)) == 0
    assert hypervolume([(0.5, 0.5)], (1.0, 1.0)) == 0.25


def test_a_search_that_returns_a_baseline_is_told_by_its_table():
    uniform, mixed = ((4, 4),) * 3, ((4, 4), (4, 2), (4, 4))
    models = {"kvtuner": (uniform, PER_TOKEN), "ladder": (uniform, PER_TOKEN), "kivi-4": (uniform, KIVI)}
    assert same_tables(models, "kvtuner") == ["KV4", "ladder"]  # though KV4 was not measured; KIVI's is another cache
    assert same_tables({"kvtuner": (mixed, PER_TOKEN), "KV4": (uniform, PER_TOKEN)}, "kvtuner") == []
    assert same_tables({"kvtuner": (mixed, PER_TOKEN), "knapsack": (mixed, PER_TOKEN)}, "kvtuner") == ["knapsack"]


def test_the_paper_search_is_a_flag_away():
    recipe = KVTuner(**yaml.safe_load((RECIPES / "configs/kvtuner/paper.yaml").read_text()))
    assert recipe.cluster and recipe.max_bits == 4 and recipe.evals == 200 and recipe.objective == "gsm8k"
    assert not KVTuner().cluster and KVTuner().max_bits == 3.25 and KVTuner().objective == "kl"
    assert "clustered" in KVTuner().baseline_names() and "unclustered" in recipe.baseline_names()
    assert "within-6" in recipe.baseline_names() and "within-4" in KVTuner().baseline_names()


def test_the_ladder_takes_the_best_pair_of_each_number_of_bits():
    """Without pruning there are several pairs with as many bits; the steps are those of the pruned candidates."""
    errors = random_errors(4, 1)
    pruned = [pareto_pairs(row) for row in errors]
    assert all({pair_bits(pair) for pair in kept} == {8, 6, 5, 4, 3, 2} for kept in pruned)
    steps = [
        [table_of(genome, groups) for genome in ladder(groups, errors)]
        for groups in (singles(pruned), singles([PAIRS] * 4))
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 21


def test_the_knapsack_baseline_uses_all_the_bits_it_has():
    """11 layers, 60 bits in all: a mean that is no exact fraction may not cost the baseline a bit."""
    menu, errors = ((4, 4), (2, 2)), random_errors(11, 5)

    def evaluate(tables):
        return [
            (sum(row.get(pair, 0.0) for row, pair in zip(errors, t, strict=True)), equivalent_bits(t)) for t in tables
        ]

    bits = equivalent_bits(((4, 4),) * 4 + ((2, 2),) * 7)
    alone = singles([menu] * 11)
    found = table_of(knapsack_genome(alone, isolated_losses(alone, evaluate), bits), alone)
    allowed = [t for t in itertools.product(menu, repeat=11) if sum(map(sum, t)) <= 60]
    assert sum(map(sum, found)) == 60 and evaluate([found])[0][0] == min(loss for loss, _ in evaluate(allowed))


def test_the_baselines_have_the_bits_of_the_table():
    errors = random_errors(12, 4)
    candidates = [pareto_pairs(row) for row in errors]
    table = random_table(candidates, 4.5, 0)
    evaluate = additive(singles(candidates), 2)
    baselines = baseline_tables(
        ["KV4", "kivi-2", "ladder", "reversed", "random", "knapsack", "depth", "clustered"],
        table,
        errors,
        candidates,
        evaluate,
        form=PER_TOKEN,
        menu=PAIRS,
        seed=0,
        other_search=lambda: tuple(kept[0] for kept in candidates),
    )
    assert baselines["KV4"] == [(((4, 4),) * 12, PER_TOKEN)] and baselines["kivi-2"] == [(((2, 2),) * 12, KIVI)]
    assert baselines["clustered"][0][0] == tuple(kept[0] for kept in candidates)
    assert len({found for found, _ in baselines["random"]}) == RANDOM_TABLES
    for name in ("ladder", "reversed", "random", "knapsack", "depth"):
        bits = [equivalent_bits(found) for found, _ in baselines[name]]
        assert all(equivalent_bits(table) - 1.1 <= b <= equivalent_bits(table) + 0.1 for b in bits), (name, bits)
    losses = {name: evaluate([baselines[name][0][0]])[0][0] for name in ("knapsack", "ladder", "reversed")}
    assert losses["knapsack"] <= losses["ladder"] < losses["reversed"]


# ------------------------------------------------------------------------------------------------------ results on file


@pytest.fixture
def losses(monkeypatch):
    """Evaluations of a loss that needs no model: (its constructor, the tables evaluated so far)."""
    seen, current = [], []

    class Hook:
        def __init__(self, model, table, form):
            current[:] = [table]

        def __enter__(self):
            seen.append(current[0])

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(kv_search, "quantised_cache", Hook)

    def make(folder, processes=None, value=lambda table: float(sum(map(sum, table)))):
        return Evaluations(None, PER_TOKEN, value, folder, processes or World())

    return make, seen


TABLES = [((8, 8), (4, 2)), ((4, 4), (4, 4)), ((2, 2), (2, 2))]


def test_a_result_is_kept_and_a_torn_line_is_measured_again(tmp_path, losses):
    make, seen = losses
    points = make(tmp_path)(TABLES)
    assert points == [(22.0, 5.5), (16.0, 4.0), (8.0, 2.0)] and seen == TABLES
    file = tmp_path / "evaluations-0.jsonl"
    file.write_text(file.read_text()[:-9])  # a kill in the middle of a line
    seen.clear()
    again = make(tmp_path)
    assert again(TABLES[::-1]) == points[::-1] and seen == TABLES[2:]
    assert {table_text(t) for t in TABLES} == {json.loads(line)["table"] for line in file.read_text().splitlines()}
    assert again.seconds.keys() == set(TABLES) and min(again.seconds.values()) >= 0


def test_processes_split_the_tables_and_share_the_results(tmp_path, losses):
    """Two ranks in turn, each stopped at the barrier that it would wait at."""
    make, seen = losses

    class Waits(Exception):
        pass

    def stop():
        raise Waits

    barriers = [[lambda: None] * 2 + [stop] for _ in range(2)]  # two when it opens, the third after its share
    ranks = [make(tmp_path, World(i, 2, lambda i=i: barriers[i].pop(0)())) for i in range(2)]
    for evaluate in ranks:
        with pytest.raises(Waits):
            evaluate(TABLES)
    assert sorted(seen) == sorted(TABLES)
    assert [len((tmp_path / f"evaluations-{i}.jsonl").read_text().splitlines()) for i in range(2)] == [2, 1]
    assert make(tmp_path)(TABLES) == [(22.0, 5.5), (16.0, 4.0), (8.0, 2.0)] and len(seen) == 3


def test_an_objective_that_is_no_number_is_refused(tmp_path, losses):
    make, _ = losses
    with pytest.raises(UserError, match=r"--objective: it is nan with the table 8,8 4,2"):
        make(tmp_path, value=lambda table: math.nan)(TABLES)
    assert (tmp_path / "evaluations-0.jsonl").read_text() == ""


# ---------------------------------------------------------------------------------------------------------- bad tables


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{0: {nbits_key: 8, nbits_value: 3}}", "layer 0 has 3 bits; one of 2, 4, 8, 16"),
        ("{0: {nbits_key: 8, nbits_value: 4}, 2: {nbits_key: 8, nbits_value: 4}}", "every layer from 0 to the last"),
        ("{0: {nbits_key: 8}}", "a mapping from layers to nbits_key and nbits_value"),
        ("[8, 4]", "a mapping from layers"),
        ("{}", "it has no layers"),
        ('{"kv_cache_quantization": {"mode": "kivi", "layers": [[8]]}}', "a mapping from layers"),
        ("{0: [", "neither YAML nor JSON"),
    ],
)
def test_broken_tables_are_refused(tmp_path, content, said):
    (tmp_path / "table.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        read_table(str(tmp_path / "table.yaml"))
    assert said in str(caught.value) and "table.yaml" in str(caught.value)


def test_pairs_are_parsed():
    assert parse_pairs(["K8V4", "KV2", "KV16", "KV2"]) == ((8, 4), (2, 2), (16, 16))
