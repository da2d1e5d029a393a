"""The recipe `kvtuner`: errors of attention, objectives, and the whole command on tiny models. Its search without a model is
in test_kvtuner_search.py, what needs a real model in test_kvtuner_smollm2.py; the cache itself is tested in tests/zoo."""

import json
import signal
import subprocess
import time

import pytest
import torch
from launching import ENVIRONMENT, RECIPES, TWO_PROCESSES, run
from safetensors.torch import load_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo  # noqa: F401
from recipes.common.core.cli import main
from recipes.kvtuner.retrieving import hidden_codes, retrieval
from recipes.kvtuner.simulation import (
    block_inputs,
    first_divergence,
    greedy,
    log_probabilities,
    mean_kl,
    measure_errors,
    quantised_cache,
    round_keys,
    round_values,
)
from recipes.kvtuner.tables import FORMATS, read_table
from zoo.cache import CACHE, KVTunerCache
from zoo.errors import UserError
from zoo.record.format import FIDELITY

pytestmark = pytest.mark.slow

IDS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
PER_TOKEN, KIVI = FORMATS["per_token"], FORMATS["kivi"]


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
            wanted = model(IDS, **{CACHE: cache}).logits
            with quantised_cache(model, table, form):
                found = model(IDS, use_cache=False).logits
            plain = model(IDS, use_cache=False).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert (found - plain).abs().max() > 0.01


def test_keys_by_channel_never_mix_channels():
    """A channel of outliers costs its neighbours nothing, whatever the number of tokens."""
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
        assert found.output[layer][1] < found.output[layer][0] and all(e > 0 for e in found.elementwise[layer])


def test_element_wise_errors_are_mean_ratios(model):
    """At 16-bit keys a^ = a, so that o - o^ is a mean of the values' errors: with one decoded token, by hand."""
    seen = {}

    def remember(module, args, kwargs):
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        shape = (*x.shape[:2], -1, module.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        half = module.head_dim // 2
        q, k = (y * cos[:, None] + torch.cat([-y[..., half:], y[..., :half]], -1) * sin[:, None] for y in (q, k))
        seen["qkv"] = q[:, :, -1:], k, v

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(remember, with_kwargs=True)
    found = measure_errors(model, IDS, IDS.shape[1] - 1, ((16, 2),), PER_TOKEN).elementwise[0][0]
    handle.remove()
    q, k, v = seen["qkv"]
    repeated = [t.repeat_interleave(2, 1) for t in (k, v, round_values(v, 2, PER_TOKEN))]
    a = (q @ repeated[0].transpose(-1, -2) / 32**0.5).softmax(-1)
    o, o_hat = a @ repeated[1], a @ repeated[2]
    assert found == pytest.approx(((o - o_hat).abs() / o.abs()).mean().item(), rel=1e-3)


def test_kl_and_divergence(model):
    reference = log_probabilities(model, IDS)
    assert mean_kl(model, IDS, reference) < 1e-7
    inputs, last = block_inputs(model, IDS), ((16, 16),) * (model.config.num_hidden_layers - 1) + ((2, 2),)
    with quantised_cache(model, last, PER_TOKEN):  # only the last block differs, and only it need be computed
        whole, part = mean_kl(model, IDS, reference), mean_kl(model, IDS, reference, inputs, len(last) - 1)
    assert part == pytest.approx(whole, rel=1e-4) and whole > 1e-6
    assert mean_kl(model, IDS, reference) < 1e-7  # and all blocks are back
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


def test_a_code_is_retrieved_if_decoding_gives_it(model):
    """Prompts with the model's own greedy answers are all right; one token of an answer changed makes it wrong."""
    rows = greedy(model, IDS[:, :20], 3).tolist()
    items = [(row[:20], row[20:]) for row in rows]
    found = retrieval(model, items)
    assert found["retrieval/squad-dev"]["value"] == 1.0 and found["retrieval/squad-dev"]["n"] == 3
    wrong = [(items[0][0], [*items[0][1][:2], (items[0][1][2] + 1) % 256]), *items[1:]]
    worse = retrieval(model, wrong)
    assert worse["retrieval/squad-dev"]["value"] == pytest.approx(2 / 3)
    nlls = []
    for prompt, answer in wrong:
        with torch.no_grad():
            p = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        nlls.append(sum(-p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)) / len(answer))
    expected = torch.tensor(nlls).mean().exp().item()
    assert worse["perplexity/squad-dev"]["value"] == pytest.approx(expected, rel=1e-4)


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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "calibration.txt").write_text(WORDS * 60)
    return make_base(folder / "model", "qwen2", num_hidden_layers=4, head_dim=32)


def command(base, output, *more, **changes):
    flags = SMALL | {"--model": base, "--calibration": base.parent / "calibration.txt", "--output": output}
    flags |= {f"--{key}": value for key, value in changes.items()}
    arguments = [str(x) for pair in flags.items() for x in pair]
    return [*RECIPES, "kvtuner", *arguments, *more]


def run_here(base, output, *more, **changes):
    """The command in this process, which saves the imports; returns the report."""
    main(command(base, output, *more, **changes)[3:])
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "kv"
    return output, run_here(base, output)


def cache_of(report):
    """What a report says of the caches, from its tables, figures, footprint and settings."""
    lines = {line["name"]: line for line in report["figures"]["cache_front"]["panels"][0]["series"]}
    points = {name: list(zip(line["x"], line.get("y", line["x"]), strict=True)) for name, line in lines.items()}
    table = [[cell.strip("*") for cell in row] for row in report["tables"]["KV cache"]["rows"]]
    taken = report["footprint"]["models"]
    return {
        **report["settings"]["kv_cache_quantization"],
        "searched": [{"bits": bits, "loss": loss} for bits, loss in points["evaluated"]],
        "uniform": {
            name: {"bits": bits, "loss": loss}
            for name, (bits, loss) in zip(lines["uniform"]["notes"], points["uniform"], strict=True)
        },
        "dense_bytes_per_token": report["footprint"]["dense"],
        "models": {
            name: {
                "equivalent_bits": float(bits),
                "effective_bits": float(all_bits),
                "bytes_per_token": taken[name],
                "kl": float(kl),
            }
            for name, bits, all_bits, _, _, kl in table[1:]
        },
    }


def verdict(capsys, *arguments):
    """(exit code, what is printed) of `verify`."""
    capsys.readouterr()
    code = 0
    try:
        main(["verify", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_end_to_end(base, finished, capsys):
    output, report = finished
    table = json.loads((output / "config.json").read_text())["kv_cache_quantization"]
    assert table["layers"] == cache_of(report)["layers"] and table["equivalent_bits"] <= 4
    assert {"KV4", "KV2", "kivi-4", "ladder", "depth", "random", "knapsack"} <= set(report["baselines"])
    bits = {point["bits"]: point["loss"] for point in cache_of(report)["searched"]}
    within = min(loss for b, loss in bits.items() if b <= 4)
    uniform = cache_of(report)["uniform"]["KV4"]
    assert within <= uniform["loss"]
    assert table["search"]["evals"] == len(cache_of(report)["searched"]) <= 24
    assert report["size"]["compressed_bytes"] == report["size"]["dense_bytes"]
    assert read_table(str(next(output.glob("kv_table_4_0.yaml"))))[1] == tuple(map(tuple, table["layers"]))
    assert (
        f"{table['search']['evals']} tables were evaluated in"
        in report["tables"]["Sensitivity of the layers"]["caption"]
    )
    dense_bytes = 4 * 2 * 2 * 32 * 2  # layers, keys and values, heads, head size, 16 bits
    assert cache_of(report)["dense_bytes_per_token"] == dense_bytes
    own = sum(sum(pair) * 32 // 8 + 8 for pair in table["layers"]) * 2  # two scales and minima in fp16
    assert cache_of(report)["models"]["kvtuner"]["bytes_per_token"] == own
    assert cache_of(report)["models"]["KV4"]["bytes_per_token"] == 4 * 2 * (2 * 16 + 8)
    kls = {name: model["kl"] for name, model in cache_of(report)["models"].items()}
    assert kls["KV4"] < kls["KV2"] and 5e-4 < kls["kvtuner"] < kls["KV2"]
    card = (output / "README.md").read_text()
    assert (
        f"| **kvtuner** | **{table['equivalent_bits']:.2f}** | **{table['effective_bits']:.2f}** | **{own:,}** |"
        in card
    )
    assert "plots/cache_bits.png" in card and (output / "plots" / "cache_front.png").exists()
    assert verdict(capsys, output)[0] == 0
    config = json.loads((output / "config.json").read_text())
    for changed, said in (({"layers": [[8, 8]] * 4}, "layers is"), ({"mode": "kivi"}, "mode is")):
        wrong = config | {"kv_cache_quantization": table | changed}
        (output / "config.json").write_text(json.dumps(wrong))
        code, shown = verdict(capsys, "--static", output)
        assert code == 1 and said in shown
    (output / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    out = model.generate(IDS[:, :8], max_new_tokens=4, return_dict_in_generate=True)
    assert [[layer.key_bits, layer.value_bits] for layer in out[CACHE].layers] == table["layers"]
    assert out[CACHE].nbytes / 3 / 11 == pytest.approx(
        cache_of(report)["models"]["kvtuner"]["bytes_per_token"], rel=0.01
    )


def test_packed_weights_and_packed_cache_stack(tmp_path_factory, tmp_path, capsys):
    """From a checkpoint with packed bits: its weights stay packed, byte for byte, and the cache comes on top."""
    root = tmp_path_factory.mktemp("stack")
    (root / "calibration.txt").write_text(WORDS * 60)
    packed = Packing(make_base(root / "dense", "llama", head_dim=32), (4, 3)).write(root / "packed")
    output = tmp_path / "kv"
    report = run_here(packed, output, "--baselines", "KV4")
    assert any("packed already" in note for note in report["notes"])
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (output, packed))
    assert config["compression_config"] == before["compression_config"] and config["kv_cache_quantization"]["layers"]
    tensors = [load_file(folder / "model.safetensors") for folder in (output, packed)]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    model = AutoModelForCausalLM.from_pretrained(output)
    out = model.generate(IDS[:, :8], max_new_tokens=4, return_dict_in_generate=True)
    assert type(out[CACHE]).__name__ == "KVTunerCache" and "qweight" in str(list(tensors[0]))
    assert verdict(capsys, output)[0] == 0


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
        assert cache_of(first)[key] == cache_of(again)[key], key
    assert first["compressed"] == again["compressed"]


def test_two_processes_find_the_same_table(base, finished, tmp_path):
    process = run([*TWO_PROCESSES, *command(base, tmp_path / "kv", "--baselines", "none")[1:]])
    assert process.returncode == 0, process.stderr
    assert "2 processes share the work" in process.stdout
    first, again = (json.loads((folder / "report.json").read_text()) for folder in (finished[0], tmp_path / "kv"))
    assert (
        cache_of(first)["layers"] == cache_of(again)["layers"]
        and cache_of(first)["searched"] == cache_of(again)["searched"]
    )


@pytest.fixture(scope="module")
def long_base(tmp_path_factory):
    """A model that takes prompts long enough to hide codes in (its tokens are bytes)."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "calibration.txt").write_text(WORDS * 60)
    return make_base(folder / "model", "llama", num_hidden_layers=3, head_dim=32, max_position_embeddings=4096)


def test_kivi_with_every_measurement_and_without_its_shortcuts(long_base, tmp_path, capsys):
    report = run_here(
        long_base,
        tmp_path / "kv",
        *("--no_prune", "--baselines", "KV4", "per-token-4", "knapsack", "random", "clustered"),
        **{"mode": "kivi", "group_size": 16, "residual_length": 32, "objective": "ppl", "prefill": "quantized"},
        **{"seeds": 2, "retrieval_items": 2, "retrieval_tokens": 3000, "speed_tokens": 64, "max_bits": 5},
    )
    config = json.loads((tmp_path / "kv" / "config.json").read_text())["kv_cache_quantization"]
    form = {key: config[key] for key in ("mode", "group_size", "residual_length", "prefill")}
    assert form == {"mode": "kivi", "group_size": 16, "residual_length": 32, "prefill": "quantized"}
    assert config["equivalent_bits"] <= 5 and config["effective_bits"] == config["equivalent_bits"] + 2
    assert "Layers that share a pair: 0; 1; 2." in report["tables"]["Sensitivity of the layers"]["caption"]
    assert set(report["baselines"]) == {"KV4", "per-token-4", "knapsack", "random", "clustered"}
    models = cache_of(report)["models"]
    assert models["per-token-4"]["effective_bits"] == 5 and models["KV4"]["effective_bits"] == 6
    assert models["random"]["kl"] > 0 and report["baselines"]["random"]["perplexity/A"]["n_of"] == "runs"
    keys = {"perplexity/A", "perplexity/B", "perplexity/C", "retrieval/squad-dev", "perplexity/squad-dev"}
    assert report["compressed"].keys() == keys | set(FIDELITY)
    assert report["compressed"]["perplexity/A"]["n_of"] == "seeds"
    assert report["speed"].keys() == {"decode", "prefill"} and len(report["speed"]["decode"]) == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kv", dtype=torch.float32)
    cache = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)[CACHE]
    assert cache.form.group_size == 16 and cache.layers[0].stores[0].units == 2  # 32 of 43 tokens, in blocks of 16
    shown = capsys.readouterr().out
    kept = [line.split("  ")[-1].split() for line in shown.splitlines() if line.startswith("layer ")]
    assert len(kept) == 6 and all(len(pairs) == 9 for pairs in kept)  # of three layers and two seeds, no pair is pruned
    assert f"KV cache: {models['kvtuner']['bytes_per_token']:,} of 768 bytes a token" in shown


def test_the_report_says_when_the_search_returns_a_baseline(finished, base, tmp_path):
    """With one pair to choose from nothing but a uniform table can be found."""
    report = run_here(base, tmp_path / "kv", "--pairs", "KV4", "--baselines", "ladder")
    assert report["same_as"] == ["KV4", "ladder"]


def test_a_given_table_is_measured_instead_of_searched(base, tmp_path):
    table = {"mode": "per_token", "layers": [[8, 4], [16, 16], [4, 2], [2, 2]]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    report = run_here(base, tmp_path / "kv", "--baselines", "KV4", load_table=tmp_path / "table.json", max_bits=6.75)
    config = json.loads((tmp_path / "kv" / "config.json").read_text())["kv_cache_quantization"]
    assert config["layers"] == cache_of(report)["layers"] == table["layers"] and config["equivalent_bits"] == 6.75
    assert len(cache_of(report)["searched"]) == 10  # it and the nine uniform ones
    assert "not searched but given" in (tmp_path / "kv" / "README.md").read_text()


def test_a_head_size_that_kivi_cannot_take_leaves_those_baselines_out(tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "calibration.txt").write_text(WORDS * 60)
    base = make_base(folder / "model", "llama")  # heads of 16
    report = run_here(base, tmp_path / "kv")
    assert {"KV4", "ladder", "knapsack"} <= set(report["baselines"]) and "kivi-4" not in report["baselines"]


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, output, arguments) -> str:
    """The one sentence that the command ends with; nothing is written."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not output.parent.exists() or not list(output.parent.iterdir())
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pairs", "K8V3"], "--pairs: pair 0 has 3 bits; one of 2, 4, 8, 16"),
        (["--pairs", "banana"], "--pairs banana"),
        (["--max_bits", "1.5"], "--max_bits 1.5: a number from 2 to 16"),
        (["--pairs", "KV8", "KV4", "--max_bits", "3"], "--max-bits 3: from 4"),
        (["--max_bits", "17"], "--max_bits 17.0: a number from 2 to 16"),
        (["--max_bits", "nan"], "--max_bits nan"),
        (["--evals", "7"], "--evals 7"),
        (["--eps", "0"], "--eps 0"),
        (["--nsamples", "0"], "--nsamples 0"),
        (["--objective", "luck"], "--objective luck: kl, ppl, gsm8k or module:function"),
        (["--objective", ":luck"], "--objective :luck: kl, ppl, gsm8k or module:function"),
        (["--objective", "math:luck"], "--objective math:luck: there is no such function"),
        (["--objective", "no_module:luck"], "--objective no_module:luck: there is no such function"),
        (["--objective", "gsm8k", "--tasks", "gsm8k_cot"], "--tasks gsm8k"),
        (["--group_size", "32"], "--mode per_token"),
        (["--mode", "kivi", "--group_size", "-1"], "--group-size -1"),
        (["--mode", "kivi", "--group_size", "20"], "--group-size 20"),
        (["--mode", "kivi", "--residual_length", "48"], "--residual-length 48"),
        (["--mode", "kivi", "--residual_length", "64"], "--seqlen 48: with --residual-length 64 nothing"),
        (["--mode", "kivi", "--group_size", "24", "--residual_length", "24"], "head size 32 is no multiple of 24"),
        (["--load_table", "llama-3.1-8b-kivi-3.25"], "it is for mode kivi, not per_token"),
        (["--load_table", "llama-3.1-8b-per-token-3.59"], "it has 32 layers"),
        (["--load_table", "qwen2.5-7b-per-token-5.00"], "it has 5 bits, --max-bits is 4; raise that"),
        (["--load_table", "missing.yaml"], "neither a file that can be read"),
        (["--baselines", "KV3"], "--baselines KV3"),
        (["--export", "gguf-f16"], "--export"),
        (["--eval_seqlen", "4096"], "--eval_seqlen 4096"),
        (["--eval_windows", "0"], "--eval_windows 0"),
        (["--retrieval_items", "1", "--retrieval_tokens", "100"], "--retrieval-tokens 100: too few"),
        (["--task_limit", "0"], "--task_limit 0"),
        (["--nsamples", "4000"], "lower --nsamples"),
    ],
)
def test_bad_flags_are_one_sentence_and_leave_nothing(base, tmp_path, capsys, flags, said):
    output = tmp_path / "new" / "kv"
    assert said in refused(capsys, output, [*command(base, output)[3:], *flags])


def test_models_that_have_no_such_cache_are_refused(base, finished, tmp_path, capsys):
    odd = {
        "mistral": ({}, "layers 0, 1 do not attend to all tokens (sliding_attention)"),
        "gemma3_text": ({}, "layers 0 do not attend to all tokens (sliding_attention)"),
        "llama": ({"head_dim": 6, "hidden_size": 24}, "head size 6 is no multiple of 4 (4 codes in a byte)"),
    }
    output = tmp_path / "new" / "kv"
    for family, (settings, said) in odd.items():
        model = make_base(tmp_path / family, family, **settings)
        capsys.readouterr()
        assert said in refused(capsys, output, command(base, output, model=model)[3:])
    narrow = make_base(tmp_path / "narrow", "llama")
    capsys.readouterr()
    said = refused(capsys, output, command(base, output, "--baselines", "kivi-4", model=narrow)[3:])
    assert "--baselines kivi-4" in said and "head size 16" in said
    assert "its cache has a table already" in refused(capsys, output, command(base, output, model=finished[0])[3:])
