"""Layer-wise quantisation: scores, plans, mixtures, and the whole command on a tiny model; the paper's claims on SmolLM2
are in test_layerwise_quant_smollm2.py."""

import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from launching import ENVIRONMENT, RECIPES, run
from tiny_models import make_base
from transformers import AutoModelForCausalLM

import zoo  # noqa: F401
from recipes.common.core.cli import main, parse
from recipes.common.domains.language import Language
from recipes.common.loops.streaming import InputStatistics, MatrixStore, Method, StreamedModel, Variant, compress_blocks
from recipes.common.metrics.metric import over_runs
from recipes.common.parts.quantizers import rtn
from recipes.layerwise_quant.importance import block_damage, kendall_tau, least_first, lim, score_block, zd
from recipes.layerwise_quant.plans import cut_plans, order_blocks, parse_levels, plan_bits, step_down
from zoo.errors import UserError
from zoo.record.format import metric_title
from zoo.record.verify import verify

pytestmark = pytest.mark.slow

IDS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ scores


def test_lim_of_known_layers():
    x = normal(3, 7, 16)
    assert lim(x, x).tolist() == pytest.approx([-1] * 3, abs=1e-6)
    assert lim(x, -x).tolist() == pytest.approx([1] * 3, abs=1e-6)
    y = x + normal(3, 7, 16, seed=1)
    torch.testing.assert_close(lim(5 * x, 0.1 * y), lim(x, y))
    torch.testing.assert_close(lim(x * torch.rand(3, 7, 1), y), lim(x, y))  # each token counts alike
    first = y.clone()
    first[:, 0] = -1000 * x[:, 0]
    torch.testing.assert_close(lim(x, first), lim(x, y))  # position 0 does not count
    first[:, 1] = -1000 * x[:, 1]
    assert (lim(x, first) > lim(x, y)).all()


def test_lim_in_the_loop_is_that_of_hooks_in_double(tmp_path):
    """…and of the last block it is not what hidden_states[-1] would give, since that is after the final norm."""
    base = make_base(tmp_path / "base", "llama", num_hidden_layers=3)
    method = Method("none", lambda name, weight, stats: {"none": Variant({}, None, weight)})
    scores = tmp_path / "scores"
    compress_blocks(
        StreamedModel(base),
        IDS,
        [method],
        MatrixStore(tmp_path / "store"),
        observe=lambda *seen: score_block(scores, *seen),
    )
    found = [json.loads((scores / f"{i}.json").read_text()) for i in range(3)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0], out)}))
    with torch.no_grad():
        last = model(IDS, output_hidden_states=True).hidden_states[-1]
    for i, (x, y) in seen.items():
        cosines = [
            (x[n, t] @ y[n, t] / x[n, t].norm() / y[n, t].norm()).item()
            for n in range(len(IDS))
            for t in range(1, IDS.shape[1])
        ]
        assert found[i]["lim"] == pytest.approx(-sum(cosines) / len(cosines), abs=1e-6)
        assert sum(found[i]["halves"]) / 2 == pytest.approx(found[i]["lim"], abs=1e-6)
        assert found[i]["zd"] == zd([m.weight.float() for m in StreamedLinears(model, i)])
    assert abs(lim(seen[2][0], last).mean().item() - found[2]["lim"]) > 1e-4


class StreamedLinears(list):
    def __init__(self, model, index):
        super().__init__(m for m in model.model.layers[index].modules() if isinstance(m, torch.nn.Linear))


def test_zd_of_known_distributions():
    weights = [normal(400, 500), normal(300, 500, seed=1)]
    assert zd(weights) == pytest.approx(0.1587, abs=0.002)
    assert zd(weights, two_sided=True) == pytest.approx(0.3173, abs=0.003)
    uniform = [torch.rand(600, 500, generator=torch.Generator().manual_seed(2))]
    assert zd(uniform) == pytest.approx((1 - 1 / math.sqrt(3)) / 2, abs=0.002)
    assert zd([3 * w + 7 for w in weights]) == pytest.approx(zd(weights), abs=1e-5)
    few = [torch.tensor([[0.0, 0.0, 0.0, 10.0]]), torch.tensor([[0.0, 0.0]])]
    assert zd(few) == 1 / 6  # matrices count together


def test_kendall_tau():
    assert kendall_tau([1, 2, 3, 4], [2, 4, 6, 8]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(2 / 3)


def test_block_damage_is_the_divergence_of_one_swapped_block(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base", "llama"), dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    before = {name: module.weight.clone() for name, module in linears.items()}
    rough = {name: weight + 0.1 * normal(*weight.shape, seed=5) for name, weight in before.items()}
    found = block_damage(model, IDS[0], linears, rough.get)
    assert all(torch.equal(module.weight, before[name]) for name, module in linears.items())
    with torch.no_grad():
        dense = model(IDS[:1]).logits[0].double().softmax(-1)
        for name in linears:
            if ".1." in name:
                linears[name].weight.data = rough[name]
        swapped = model(IDS[:1]).logits[0].double().softmax(-1)
    assert found[1] == pytest.approx((dense * (dense / swapped).log()).sum(-1).mean().item(), rel=1e-3)
    assert found.keys() == {0, 1} and found[0] > 0
    assert max(block_damage(model, IDS[0], linears, lambda n: linears[n].weight.data).values()) < 1e-6


# -------------------------------------------------------------------------------------------------------------- plans


def test_the_plan_of_llama_2_13b():
    scores = dict(enumerate((normal(40) - 1).tolist()))
    order = least_first(scores)
    bits = plan_bits(order, dict.fromkeys(range(40), 317_000_000), 3.5, 4, 2)
    low = [block for block, b in bits.items() if b == 2]
    assert sorted(low) == sorted(sorted(range(40), key=scores.get)[:10]) and set(bits.values()) == {2, 4}


@pytest.mark.parametrize("average", [2.0, 2.4, 2.85, 3.1, 3.5, 3.99, 4.0])
def test_any_average_is_met_from_below_within_a_block(average):
    weights = {i: 1000 + 137 * (i * i % 11) for i in range(24)}
    order = least_first(dict(enumerate(normal(24).tolist())))
    bits = plan_bits(order, weights, average, 4, 2)
    total = sum(weights.values())
    reached = sum(weights[i] * b for i, b in bits.items()) / total
    assert average - 2 * max(weights.values()) / total < reached <= average + 1e-9
    count = sum(b == 2 for b in bits.values())
    assert all(bits[i] == 2 for i in order[:count])
    assert count == {2.0: 24, 4.0: 0}.get(average, count)


@pytest.mark.parametrize("average", [2.0, 2.3, 2.75, 3.0, 3.4, 4.0])
def test_three_widths_are_cut_everywhere_the_average_allows(average):
    """Every plan rises along the order, meets the average, and would miss it with one block more at the next width."""
    weights = {block: 100 + 7 * (block % 3) for block in range(12)}
    order = [5, 3, 9, 0, 7, 1, 8, 2, 6, 4, 10, 11]
    plans = cut_plans(order, weights, average, (4, 3, 2))
    mean = lambda bits: sum(weights[b] * bits[b] for b in bits) / sum(weights.values())  # noqa: E731
    assert len({tuple(plan[b] for b in order) for plan in plans}) == len(plans)
    for plan in plans:
        widths = [plan[block] for block in order]
        assert widths == sorted(widths) and set(plan) == set(weights)
        assert mean(plan) <= average + 1e-9
        last = max((block for block in order if plan[block] < 4), key=order.index, default=None)
        assert last is None or mean(plan | {last: 4}) > average
    lowest = sorted(sum(bits == 2 for bits in plan.values()) for plan in plans)
    tried = [n for n in range(13) if mean(dict.fromkeys(order[:n], 2) | dict.fromkeys(order[n:], 3)) <= average]
    most = next(n for n in range(13) if mean(dict.fromkeys(order[:n], 2) | dict.fromkeys(order[n:], 4)) <= average)
    assert lowest == [n for n in tried if n < most] + [most]


def test_pinned_blocks_and_two_widths():
    weights = dict.fromkeys(range(6), 10)
    for plan in cut_plans([4, 3, 2, 1], weights, 3.2, (4, 3, 2)):
        assert plan[0] == plan[5] == 4 and sum(plan.values()) <= 6 * 3.2
    assert cut_plans([4, 3, 2, 1], weights, 3.5, (4, 3)) == [plan_bits([4, 3, 2, 1], weights, 3.5, 4, 3)]
    with pytest.raises(UserError, match="--keep pins too many"):
        cut_plans([4], weights, 3.2, (4, 3, 2))


def test_steps_lower_every_block_once_before_any_twice():
    order, widths = [2, 0, 1], (4, 3, 2)
    seen = [[step_down(order, steps, widths)[b] for b in order] for steps in range(7)]
    assert seen == [[4, 4, 4], [3, 4, 4], [3, 3, 4], [3, 3, 3], [2, 3, 3], [2, 2, 3], [2, 2, 2]]
    assert step_down(order, 2, (8, 4)) == {2: 4, 0: 4, 1: 8}


def test_equal_scores_lower_the_later_block_first():
    assert least_first({0: 1.0, 1: 0.5, 2: 0.5, 3: 1.0}) == [2, 1, 3, 0]


def test_levels_and_pins():
    assert parse_levels("auto", 3.5) == (4, 3) and parse_levels("auto", 5.3) == (6, 5)
    assert (
        parse_levels("auto", 8) == (8, 6) and parse_levels("auto", 2.0) == (3, 2) and parse_levels("auto", 1) == (2, 1)
    )
    assert parse_levels("8,4", 5) == (8, 4) and parse_levels("4,3,2", 3.2) == (4, 3, 2)
    with pytest.raises(UserError, match="--avg_bits 3.5: --keep pins too many blocks, 3.67 is the least"):
        plan_bits([1], dict.fromkeys(range(3), 10), 3.5, 4, 3)


def test_orders_are_permutations_that_do_what_their_names_say():
    blocks = list(range(6))
    scores = {"lim": dict(enumerate([-0.1, -0.9, -0.95, -0.97, -0.8, -0.4]))}
    scores["zd"] = dict(enumerate([0.11, 0.15, 0.13, 0.12, 0.16, 0.14]))
    assert order_blocks("lim", scores, blocks, set(), 0) == [3, 2, 1, 4, 5, 0]
    assert order_blocks("zd", scores, blocks, set(), 0) == [4, 1, 5, 2, 3, 0]
    assert order_blocks("reversed", scores, blocks, set(), 0, own="zd") == [0, 3, 2, 5, 1, 4]
    assert order_blocks("depth", scores, blocks, set(), 0) == [5, 4, 3, 2, 1, 0]
    assert set(order_blocks("ends", scores, blocks, set(), 0)[-2:]) == {0, 5}
    draws = [order_blocks("random", scores, blocks, set(), seed) for seed in range(4)]
    assert all(sorted(draw) == list(range(6)) for draw in draws) and len(set(map(tuple, draws))) > 1
    assert order_blocks("lim", scores, blocks, {0, 5}, 0) == [3, 2, 1, 4]


def test_over_runs():
    runs = [
        {
            "perplexity/A": {
                "value": v,
                "spread": 0.5,
                "n": 12,
                "n_of": "windows",
                "unit": "ppl",
                "higher_is_better": False,
            }
        }
        for v in (1, 2, 6)
    ]
    merged = over_runs(runs)["perplexity/A"]
    assert (merged["value"], merged["n"], merged["n_of"]) == (3, 3, "runs")
    assert merged["spread"] == pytest.approx(math.sqrt(7)) and over_runs(runs[:1]) == runs[0]


# --------------------------------------------------------------------------------------- the order of work in a block


def test_statistics_stop_at_the_last_linear_of_interest(tmp_path):
    """…and are those of the whole forward pass."""
    model = StreamedModel(make_base(tmp_path / "base", "llama"))
    hidden = model.embed(IDS, batch=4)
    block, reached = model.load_block(0), []
    block.mlp.register_forward_hook(lambda *_: reached.append(1))
    some = {name: module for name, module in model.linears(0).items() if "q_proj" in name or "o_proj" in name}
    whole, short = InputStatistics(block, some, hessian=True), InputStatistics(block, some, hessian=True)
    with torch.no_grad():
        whole.run(hidden, model.kwargs[0], 4)
        assert reached and reached.clear() is None
        short.collect(hidden, model.kwargs[0], 4)
    assert not reached
    for name in some:
        assert torch.equal(whole.stats(name).hessian, short.stats(name).hessian)
        assert whole.stats(name).tokens == short.stats(name).tokens == IDS.numel()


@pytest.mark.parametrize("inputs", ["dense", "compressed", "sequential"])
def test_statistics_are_of_what_is_quantised_already(tmp_path, inputs):
    """v_proj is compressed to zero in block 0: only "sequential" sees o_proj's inputs vanish, others see them later."""
    base = make_base(tmp_path / "base", "llama", num_hidden_layers=2)
    seen = {}

    def compress(name, weight, stats):
        seen[name] = stats.second_moment
        return {"m": Variant({}, None, 0 * weight if "v_proj" in name or "down_proj" in name else weight)}

    compress_blocks(StreamedModel(base), IDS, [Method("m", compress, inputs)], MatrixStore(tmp_path / "store"))
    assert (seen["model.layers.0.self_attn.o_proj"].max() == 0) == (inputs == "sequential")
    changed = not torch.equal(*(seen[f"model.layers.1.{part}"] for part in ("self_attn.q_proj", "self_attn.k_proj")))
    assert not changed  # one input, one Hessian
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model
    if inputs != "dense":  # block 0 adds nothing any more
        for part in ("self_attn.v_proj", "mlp.down_proj"):
            model.layers[0].get_submodule(part).weight.data.zero_()
    wanted = {}
    model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: wanted.update(x=args[0]))
    with torch.no_grad():
        model(IDS)
    found = seen["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(found, wanted["x"].square().mean((0, 1)), rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------------------------------- the whole command

WORDS = "a quick test of how the recipe runs from start to end with some plain words "
SMALL = {
    "--nsamples": 8,
    "--seqlen": 48,
    "--group_size": 32,
    "--eval_windows": 2,
    "--eval_seqlen": 64,
    "--tasks": "none",
    "--dtype": "float32",
    "--curve_points": 1,
    "--backend": "gptq",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "calibration.txt").write_text(WORDS * 60)
    return make_base(folder / "model", "qwen2", num_hidden_layers=4)


def command(base, output, *more, **changes):
    flags = SMALL | {"--model": base, "--calibration": base.parent / "calibration.txt", "--output": output}
    flags |= {f"--{key}": value for key, value in changes.items()}
    return [
        *RECIPES,
        "layerwise-quant",
        *(str(x) for pair in flags.items() for x in pair),
        *more,
    ]


def weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "lq"
    process = run(command(base, output))
    assert process.returncode == 0, process.stderr
    return output, json.loads((output / "report.json").read_text())


def scores_of(report):
    """{score: {block: number}} of a report, and the blocks of the lower width by the figure's open points."""
    panels = report["figures"]["importance"]["panels"]
    scores = {panel["title"]: dict(zip(*(panel["series"][0][axis] for axis in "xy"), strict=True)) for panel in panels}
    points = panels[0]["series"][0]
    return scores, {block for block, lowered in zip(points["x"], points["open"], strict=True) if lowered}


def curves_of(report):
    """{metric: {order: [(average bits, value)]}} of a report."""
    found = {}
    for key, panel in zip(report["compressed"], report["figures"]["curves"]["panels"], strict=True):
        lines = [line for line in panel["series"] if "name" in line]
        found[key] = {line["name"]: list(zip(line["x"], line["y"], strict=True)) for line in lines}
    return found


def test_end_to_end(finished):
    """A checkpoint of two widths whose report holds curves, importance and every baseline; its own claims verify."""
    output, report = finished
    config = json.loads((output / "config.json").read_text())["compression_config"]
    assert config["average_bits"] == 3.5 and config["average_bits_with_overhead"] == 3.5 + (32 + 8) / 32
    widths = {name.split(".")[2]: spec["bits"] for name, spec in config["modules"].items()}
    assert widths == config["bits_by_layer"]
    assert sorted(widths.values()) == [3, 3, 4, 4]
    scores, lowered = scores_of(report)
    assert lowered == {int(b) for b, bits in widths.items() if bits == 3}
    assert lowered == set(sorted(scores["lim"], key=scores["lim"].get)[:2])
    orders = {"lim", "reversed", "zd", "sensitivity", "random", "depth", "ends"}
    assert set(report["baselines"]) == orders | {"4-bit", "3-bit", "dropped", "rtn", "hqq", "awq", "pruned"}
    for key, curves in curves_of(report).items():
        assert set(curves) == orders
        ends = [report["baselines"][name][key]["value"] for name in ("4-bit", "3-bit")]
        for points in curves.values():
            assert [bits for bits, _ in points] == [4, 3.5, 3] and [points[0][1], points[2][1]] == ends
        shown = report["tables"][f"{metric_title(key)} by average bits, order"]
        assert [row[0] for row in shown["rows"]] == list(curves) and shown["header"][1:] == ["4.00", "3.50", "3.00"]
    assert report["size"]["baselines"]["lim"] == report["size"]["compressed_bytes"]
    assert report["size"]["baselines"]["dropped"] <= report["size"]["compressed_bytes"]
    assert 0.9 < report["size"]["baselines"]["pruned"] / report["size"]["compressed_bytes"] <= 1
    claims = report["tables"]["The paper's claims"]["rows"]
    assert [row[0][:3] for row in claims] == ["(a)", "(b)", "(c)", "(d)"] and claims[0][0] in (
        output / "README.md"
    ).read_text()
    assert (output / "plots" / "curves.png").exists() and "plots/curves.png" in (output / "README.md").read_text()
    honest = run([*RECIPES, "verify", str(output)])
    assert honest.returncode == 0, honest.stdout + honest.stderr


def test_a_fresh_process_gives_the_logits_of_the_weights_in_memory(base, finished):
    output, _ = finished
    modules = json.loads((output / "config.json").read_text())["compression_config"]["modules"]
    packed = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in modules:
        weight = packed.get_submodule(name).dense_weight()
        original = dense.get_submodule(name).weight.data
        assert len(weight[0, :32].unique()) <= 2 ** modules[name]["bits"]
        assert 0 < (weight - original).norm() / original.norm() < 0.35
        original.copy_(weight)
    script = (
        "import torch, sys; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)\n"
        "i = torch.arange(20)[None]; print([round(x, 6) for x in m(i).logits[0, -1].tolist()])\n"
        "assert m.generate(i, max_new_tokens=4).shape == (1, 24)"
    )
    process = run([sys.executable, "-c", script, str(output)])
    assert process.returncode == 0, process.stderr
    with torch.no_grad():
        wanted = dense(torch.arange(20)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(json.loads(process.stdout)), wanted, atol=1e-4, rtol=1e-4)


def test_killed_and_resumed_gives_the_same_weights_and_report(base, finished, tmp_path):
    output, state = tmp_path / "lq", tmp_path / "lq.state"
    for files in (15, 50, 85):  # of matrices, scores and measurements when the run is killed
        more = ["--resume"] if state.exists() else []
        process = subprocess.Popen(command(base, output, *more), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(path.is_file() for path in state.rglob("*.*")) < files:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    resumed = run(command(base, output, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert weights(output) == weights(finished[0])
    report = json.loads((output / "report.json").read_text())
    assert all(report[key] == finished[1][key] for key in ("figures", "tables", "compressed", "baselines"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"importance": "sensitivity", "backend": "awq"}, None),
        ({"importance": "file", "backend": "hqq", "keep": "first"}, None),
        ({"symmetric": "", "avg_bits": 2.6, "group_size": -1, "levels": "4,2", "scale_search": ""}, None),
    ],
)
def test_the_other_ways(base, tmp_path, changes, said):
    flags = changes | {"baselines": "none", "curve_points": 0}
    if flags["importance" if "importance" in flags else "baselines"] == "file":
        (tmp_path / "scores.json").write_text("[0.1, 0.4, 0.3, 0.2]")
        flags["importance"] = tmp_path / "scores.json"
    output = tmp_path / "lq"
    switches = [f"--{key}" for key, value in flags.items() if value == ""]
    flags = {key: value for key, value in flags.items() if value != ""}
    process = run(command(base, output, *switches, **flags))
    assert process.returncode == 0, process.stderr
    config = json.loads((output / "config.json").read_text())["compression_config"]
    report = json.loads((output / "report.json").read_text())
    assert config["average_bits"] <= float(changes.get("avg_bits", 3.5)) and not report["baselines"]
    zeros = "none" if "symmetric" in changes else "float" if "keep" in changes else "integer"
    assert {spec["zeros"] for spec in config["modules"].values()} == {zeros}
    if "keep" in changes:
        assert config["bits_by_layer"] == {"0": 4, "1": 4, "2": 3, "3": 3}
        assert "depth" in report["same_as"] and "(the same as " in (output / "README.md").read_text()
    if changes.get("importance") == "sensitivity":
        scores, low = scores_of(report)
        damage = scores["sensitivity"]
        assert sorted(low) == sorted(sorted(damage, key=damage.get)[:2]) and min(damage.values()) > 0


def test_of_three_widths_the_cuts_with_the_least_loss_on_unseen_text(base, tmp_path):
    output = tmp_path / "lq"
    process = run(command(base, output, "--baselines", "lim", "random", levels="4,3,2", avg_bits=3.0, curve_points=1))
    assert process.returncode == 0, process.stderr
    config, report = (json.loads((output / name).read_text()) for name in ("config.json", "report.json"))
    bits = {int(block): width for block, width in config["compression_config"]["bits_by_layer"].items()}
    scores, _ = scores_of(report)
    order, weights = least_first(scores["lim"]), dict.fromkeys(bits, 1)
    plans = cut_plans(order, weights, 3.0, (4, 3, 2))
    tried = re.findall(r"plan of (.*): perplexity (\S+) on unseen", process.stdout)
    best = min(tried, key=lambda found: float(found[1]))[0]
    assert bits in plans and len(plans) == len(tried) > 1
    assert best == ", ".join(f"{list(bits.values()).count(width)} x {width} bits" for width in (4, 3, 2))
    assert config["compression_config"]["levels"] == [4, 3, 2]
    assert [bits for bits, _ in curves_of(report)["perplexity/A"]["lim"]] == [4, 3, 2]
    assert {row["bits"] for row in report["layers"]} == set(bits.values())


def test_a_packed_head_of_tied_embeddings(tmp_path):
    """It counts in the sizes of all compressed models and in what they are measured with; the average is the blocks'."""
    (tmp_path / "calibration.txt").write_text(WORDS * 60)
    base = make_base(tmp_path / "model", "llama")
    output = tmp_path / "lq"
    main(command(base, output, "--baselines", "lim", "rtn", head_bits=2, curve_points=0)[3:])
    config, report = json.loads((output / "config.json").read_text()), json.loads((output / "report.json").read_text())
    packed = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(packed.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    head = rtn(dense.lm_head.weight.data, 2, 32, False, torch.float32).dequantize()
    assert torch.equal(packed.lm_head.dense_weight(), head)
    assert config["tie_word_embeddings"] is False and config["compression_config"]["average_bits"] == 3.5
    assert config["compression_config"]["ignore"] == []
    size = report["size"]
    assert size["parameters"] == sum(parameter.numel() for parameter in dense.parameters())
    assert size["compressed_bytes"] == sum(p.nbytes for p in packed.state_dict().values())
    assert size["baselines"] == dict.fromkeys(["lim", "rtn"], size["compressed_bytes"])
    assert report["layers"][-1]["name"] == "lm_head" and report["layers"][-1]["d_out"] == 259
    for name, spec in config["compression_config"]["modules"].items():  # the baseline has the same head
        weight = rtn(dense.get_submodule(name).weight.data, spec["bits"], 32, False, torch.float32).dequantize()
        dense.get_submodule(name).weight = torch.nn.Parameter(weight)
    found = Language(report["config"]).metrics(dense)["perplexity/A"]["value"]
    assert found == pytest.approx(report["baselines"]["rtn"]["perplexity/A"]["value"], rel=1e-4)
    assert all(finding.ok for finding in verify(output, None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--avg_bits", "9"], "--avg_bits 9"),
        (["--avg_bits", "0.5"], "--avg_bits 0.5"),
        (["--avg_bits", "4.5", "--levels", "4,2"], "--avg_bits 4.5: widths 4 and 2 reach averages from 2 to 4 only"),
        (["--levels", "4,4"], "--levels 4,4"),
        (["--levels", "4,2,3"], "--levels 4,2,3"),
        (["--levels", "8,6,4,2"], "--levels 8,6,4,2: two or three different widths"),
        (["--levels", "4,7"], "--levels 4,7"),
        (["--levels", "banana"], "--levels banana"),
        (["--group_size", "48"], "--group_size 48"),
        (["--group_size", "0"], "--group_size 0"),
        (["--importance", "luck"], "--importance luck"),
        (["--backend", "hqq", "--symmetric"], "--symmetric"),
        (["--curve_points", "-1"], "--curve_points -1"),
        (["--head_bits", "7"], "--head_bits 7: one of 8, 6, 5, 4, 3, 2, 1"),
        (["--model", "smollm2-135m-instruct", "--group_size", "32"], "lossless"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message):
    with pytest.raises(UserError) as caught:
        parse("layerwise-quant", flags).check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": "64"}, "down_proj: group_size 64"),
        ({"nsamples": "2", "seqlen": "20"}, "too few for GPTQ"),
        ({"keep": "7"}, "--keep 7: first, last or a block from 0 to 3"),
        ({"importance": "three.json"}, "a JSON list of 4 numbers"),
        ({"importance": "missing.json"}, "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(base, tmp_path, changes, said):
    (tmp_path / "three.json").write_text("[1, 2, 3]")
    if "importance" in changes:
        changes = {"importance": tmp_path / changes["importance"]}
    process = run(command(base, tmp_path / "out", **changes))
    assert process.returncode == 2, process.stderr
    error = process.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert [path.name for path in tmp_path.iterdir()] == ["three.json"]
