"""Render a model card from a report: every number of the card is one of the report, formatted here.

The skeleton is model_cards/template.md; what is said about a method comes from model_cards/<method>.md, whose front
matter holds its names, tags and limits, and whose body may use the recipe's flags as $placeholders.
"""

import math
import re
from pathlib import Path
from string import Template

import yaml  # huggingface_hub needs it too
from huggingface_hub import EvalResult, ModelCardData

from ..errors import UserError
from .schema import check_report

CARDS = Path(__file__).resolve().parent.parent.parent / "model_cards"  # beside this package, in a clone and in a wheel
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
UNKNOWN_LICENSE = "unknown"
TITLES = {  # of the metrics whose keys do not say it; the name of the data follows
    "top5": "top-5 accuracy",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_scaled": "temperature-scaled ECE",
    "auroc": "AUROC against",
    "fpr95": "FPR at 95 % TPR against",
    "auroc_energy": "energy AUROC against",
    "fpr95_energy": "energy FPR at 95 % TPR against",
    "fgsm": "accuracy under FGSM",
    "pgd": "accuracy under PGD",
}


def render_card(report: dict, *, repo_id: str | None) -> str:
    """The README.md of a checkpoint: YAML front matter for the Hub, then what was measured, how to load, limits.

    Args:
        report: a report that passes `check_report`.
        repo_id: "org/name" where the card will be published; None names the checkpoint by base and method.
    Raises: UserError for a broken report, or a method without (or with a broken) file in model_cards/.
    """
    check_report(report)
    method = method_file(report)
    name = repo_id or default_name(report)
    metadata = card_metadata(report, method, name, repo_id)
    fields = {
        "title": name.rpartition("/")[2],
        "summary": method["summary"],
        "base": base_link(report["base_model"]["id"]),
        "paper": paper_link(method),
        "quality": quality_table(report),
        "verdicts": "\n".join(f"- {line}" for line in verdicts(report)),
        "scatter": scatter_line(report),
        "data": data_table(report),
        "sizes": size_table(report),
        "speed": speed_table(report),
        "sameness": sameness(report),
        "loading": loading(method, repo_id or f"runs/{report['recipe']}"),
        "method": method["body"],
        "recipe": report["recipe"],
        "config": yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True).rstrip(),
        "cost": cost_line(report),
        "evidence": evidence(report),
        "samples": samples(report),
        "limits": "\n".join(f"- {line}" for line in limits(report, method)),
    }
    body = fill((CARDS / "template.md").read_text(encoding="utf-8"), fields, "template.md")
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


# --------------------------------------------------------------------------------------------- what a card needs


def method_name(report: dict) -> str:
    """What made the weights: the recipe's `method` flag where it has one, else the recipe."""
    return report["config"].get("method", report["recipe"])


def default_name(report: dict) -> str:
    """Name of a checkpoint that is not published: base and method."""
    return f"{report['base_model']['id'].rpartition('/')[2]}-{method_name(report)}".lower()


def method_file(report: dict) -> dict:
    """Front matter of model_cards/<method>.md, filled in, with the text below it as "body"."""
    name, about = method_name(report), baseline_texts(report["recipe"])
    path = CARDS / f"{name}.md"
    if not path.is_file() and name in about:
        path = CARDS / "plain.md"
    if not path.is_file():
        raise UserError(f"there is no {path}: the card needs a file that says what {name} does.")
    fields = {**report["config"], "name": name, "about": about.get(name, "")}
    text = fill(path.read_text(encoding="utf-8"), fields, path.name)
    _, front, body = text.split("---\n", 2)
    return {**yaml.safe_load(front), "body": body.strip()}


def baseline_texts(recipe: str = "") -> dict[str, str]:
    """{baseline: what it is, one line}; what a name means in one recipe only goes before what it means elsewhere."""
    texts = yaml.safe_load((CARDS / "baselines.yaml").read_text(encoding="utf-8"))
    own = {key.partition("/")[2]: text for key, text in texts.items() if key.startswith(f"{recipe}/")}
    return {key: text for key, text in texts.items() if "/" not in key} | own


def paper_link(method: dict) -> str:
    if "arxiv" not in method:
        return method["paper"]
    return f"[{method['paper']}](https://arxiv.org/abs/{method['arxiv']})"


def fill(text: str, fields: dict, name: str) -> str:
    """`text` with its $placeholders replaced."""
    try:
        return Template(text).substitute(fields)
    except KeyError as error:
        raise UserError(f"model_cards/{name} uses ${error.args[0]}, which the report's config does not hold.") from None


def card_metadata(report: dict, method: dict, name: str, repo_id: str | None) -> ModelCardData:
    """The front matter: tags, licence and relation to the base, and every measured metric as `model-index`."""
    base = report["base_model"]
    sources = {"source_url": f"https://huggingface.co/{repo_id}/blob/main/report.json", "source_name": "slimzoo report"}
    results = []
    for key, metric in report["compressed"].items():
        kind, data = metric_source(report, key)
        results.append(
            EvalResult(
                task_type=method["pipeline_tag"],
                dataset_type=slug(data["name"]),
                dataset_name=data_title(report, key),
                dataset_config=key.partition("/")[2],
                dataset_revision=data["version"],
                metric_type=kind,
                metric_name=metric_title(key),
                metric_value=metric["value"],
                metric_args={k: metric[k] for k in ("spread", "n", "n_of", "unit") if metric[k] is not None},
                **(sources if repo_id else {}),
            )
        )
    data = [row["name"] for use, row in report["data"].items() if use != "evaluation"]
    widget = [
        {"text": sample["prompt"], "output": {"text": sample["compressed"]}} for sample in report.get("samples", [])
    ]
    return ModelCardData(
        license=base["license"] or UNKNOWN_LICENSE,
        base_model=base["id"] if HUB_ID.fullmatch(base["id"]) else None,
        base_model_relation=method["relation"] if HUB_ID.fullmatch(base["id"]) else None,
        library_name=method["library_name"],
        pipeline_tag=method["pipeline_tag"],
        language=base["language"] or None,
        datasets=[name for name in data if HUB_ID.fullmatch(name)] or None,
        tags=["slimzoo", *method["tags"], "compressed"],
        widget=widget or None,
        model_name=name,
        eval_results=results,
    )


def metric_source(report: dict, key: str) -> tuple[str, dict]:
    """("perplexity", the row of `data.evaluation`) of the metric "perplexity/A"; without a place, as of image models, the
    row of its kind or "test".
    """
    kind, _, where = key.partition("/")
    evaluation = report["data"]["evaluation"]
    data = (
        evaluation.get(where) or evaluation.get("tasks", {}).get(where) or evaluation.get(kind, evaluation.get("test"))
    )
    if data is None:
        raise UserError(f"report: data.evaluation does not describe {where!r}, on which {key} was measured.")
    return kind, data


def slug(name: str) -> str:
    """An identifier for the Hub: a Hub id as it is, else lower case with dashes."""
    return name if HUB_ID.fullmatch(name) else re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def metric_title(key: str) -> str:
    kind, _, where = key.partition("/")
    return f"{TITLES.get(kind, kind.replace('_', ' '))} {where}".strip()


def data_title(report: dict, key: str) -> str:
    data = metric_source(report, key)[1]
    return data["name"] if data["version"] is None else f"{data['name']} {data['version']}"


# ------------------------------------------------------------------------------------------- comparing, honestly


def uncertainty(report: dict, key: str, metric: dict) -> float:
    """One standard deviation of what may differ between two models: over seeds, and over the items of a task.

    How windows of text scatter is left out: all models read the same windows and move together.
    """
    over_seeds = metric["spread"] or 0.0 if metric["n_of"] == "seeds" else 0.0
    dense = report["dense"][key]
    if dense["n_of"] != "items":
        return over_seeds
    if metric["unit"] != "fraction":
        return math.hypot(over_seeds, dense["spread"] or 0.0)
    return math.hypot(over_seeds, math.sqrt(metric["value"] * (1 - metric["value"]) / dense["n"]))


def compare(report: dict, key: str, ours: dict, rival: dict) -> str:
    """ "better", "worse", or "undecided": nearer than two of the pair's combined `uncertainty`, or equal."""
    gain = (ours["value"] - rival["value"]) * (1 if ours["higher_is_better"] else -1)
    noise = 2 * math.hypot(uncertainty(report, key, ours), uncertainty(report, key, rival))
    if gain == 0 or abs(gain) < noise:
        return "undecided"
    return "better" if gain > 0 else "worse"


def verdicts(report: dict) -> list[str]:
    """One sentence for each rival, dense first: on what this model is better, worse, or not to be told apart."""
    name = method_name(report)
    lines = []
    for rival, metrics in {"dense": report["dense"], **report["baselines"]}.items():
        groups = {"better": [], "worse": [], "undecided": []}
        for key, ours in report["compressed"].items():
            groups[compare(report, key, ours, metrics[key])].append(
                f"{metric_title(key)} ({format_change(ours, metrics[key])})"
            )
        told = [f"{verdict} on {', '.join(found)}" for verdict, found in groups.items() if found]
        none = "" if groups["better"] or rival == "dense" else " No gain over it was measured."
        lines.append(f"{name} against {rival}: {'; '.join(told)}.{none}")
    return lines


# ---------------------------------------------------------------------------------------------------- formatting


def format_metric(metric: dict) -> str:
    """'18.12 ± 0.07', '0.530', '1.32 ± 0.02×'; ± is over seeds or runs only (see `scatter_line`)."""
    value, spread = metric["value"], metric["spread"]
    digits = 3 if metric["unit"] == "fraction" else 2
    unit = "×" if metric["unit"] == "ratio" else ""
    if spread is None or metric["n_of"] not in ("seeds", "runs"):
        return f"{format_number(value, digits)}{unit}"
    return f"{format_number(value, digits)} ± {format_number(spread, digits)}{unit}"


def format_number(value: float, digits: int) -> str:
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def format_change(ours: dict, rival: dict) -> str:
    """'+3.4 %', or for fractions '-2.0 points'."""
    difference = ours["value"] - rival["value"]
    if ours["unit"] == "fraction":
        return f"{100 * difference:+.1f} points"
    return f"{100 * difference / rival['value']:+,.1f} %"


def format_bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A Markdown table; its first column is left-aligned, the others right or as `align` says."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def base_link(name: str) -> str:
    """A base model's id, linked if it is one of the Hub's."""
    return f"[{name}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else f"`{name}`"


def quality_table(report: dict) -> str:
    """Dense, this model and every baseline on every metric."""
    compressed = report["compressed"]
    header = ["", *(f"{metric_title(key)} {'↑' if m['higher_is_better'] else '↓'}" for key, m in compressed.items())]
    rows = [["dense", *(format_metric(report["dense"][key]) for key in compressed)]]
    rows.append([f"**{method_name(report)}**", *(f"**{format_metric(m)}**" for m in compressed.values())])
    for name, metrics in report["baselines"].items():
        rows.append([name, *(format_metric(metrics[key]) for key in compressed)])
    about = [
        f"- {name}: {text}" for name, text in baseline_texts(report["recipe"]).items() if name in report["baselines"]
    ]
    return "\n\n".join([table(header, rows), "\n".join(about)]).strip()


def sameness(report: dict) -> str:
    """What dense, this model and the baselines have in common."""
    if "training" in report["data"]:
        return "All rows were trained on the same images, by the same recipe, and measured on the same held-out ones:"
    return "All rows were measured on the same data, and the baselines were calibrated on the same text:"


LOADING = """With slimzoo installed (`pip install slimzoo`), no remote code runs:

```python
import zoo
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("{source}")
{variable} = {reader}.from_pretrained("{source}")
```

Without slimzoo, with torch and transformers only, the code in this folder does the same work:

```python
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("{source}", trust_remote_code=True)
{variable} = {reader}.from_pretrained("{source}")
```"""
CLASSES = {  # by pipeline tag: the model's class, the class of what prepares its inputs, and a name for that
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer"),
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor", "processor"),
}


def loading(method: dict, source: str) -> str:
    """The snippets that load the checkpoint."""
    auto, reader, variable = CLASSES[method["pipeline_tag"]]
    return LOADING.format(auto=auto, reader=reader, variable=variable, source=source)


def scatter_line(report: dict) -> str:
    """How far another draw of windows or items would move a whole column; empty when nothing is known of it."""
    known = {key: m for key, m in report["dense"].items() if m["spread"] is not None and m["n_of"] != "seeds"}
    if not known:
        return ""
    digits = {key: 3 if m["unit"] == "fraction" else 2 for key, m in known.items()}
    errors = (f"{metric_title(key)} {m['spread']:.{digits[key]}f}" for key, m in known.items())
    return (
        f"Another draw of windows and items would move all rows of a column together; standard errors, on the dense"
        f" model: {', '.join(errors)}."
    )


def data_table(report: dict) -> str:
    """What was trained, calibrated and measured on, exactly."""
    evaluation = report["data"]["evaluation"]
    rows = {use: row for use, row in report["data"].items() if use != "evaluation"}
    rows |= {f"evaluation {name}": row for name, row in evaluation.items() if name != "tasks"}
    rows |= {f"task {name}": row for name, row in evaluation.get("tasks", {}).items()}
    cells = []
    for use, row in rows.items():
        amount = f"{row['windows']} × {row['seqlen']} tokens" if "windows" in row else ""
        amount = f"{row['items']} items" if "items" in row else amount
        digest = f"`{row['sha256'][:12]}`" if row["sha256"] else ""
        cells.append([use, row["name"], row["version"] or "", amount, row.get("license") or "", digest])
    return table(["use", "data", "version", "amount", "licence", "sha256"], cells, "---")


def size_table(report: dict) -> str:
    size = report["size"]
    ratio = size["compressed_bytes"] / size["dense_bytes"]
    rows = [
        ["dense, same dtype", format_bytes(size["dense_bytes"]), f"{size['parameters']:,}"],
        [f"**{method_name(report)}**", f"**{format_bytes(size['compressed_bytes'])}**", f"{size['nonzero']:,}"],
    ]
    if "cache" in report:
        return f"The weights are those of the base model, {format_bytes(size['dense_bytes'])}.\n\n{cache_table(report)}"
    verdict = "" if ratio < 1 else " Nothing is saved."
    return (
        f"{table(['', 'weights', 'numbers stored'], rows)}\n\nThat is {100 * ratio:.1f} % of the dense size.{verdict}"
    )


def cache_table(report: dict) -> str:
    """What the KV cache takes, with and without its scales, and how far predictions move."""
    cache, own = report["cache"], method_name(report)
    dense = cache["dense_bytes_per_token"]
    rows = [["16-bit cache", "16.00", "16.00", f"{dense:,}", "", ""]]
    for name, row in cache["models"].items():
        cells = [f"{row['equivalent_bits']:.2f}", f"{row['effective_bits']:.2f}", f"{row['bytes_per_token']:,}"]
        cells += [f"{100 * row['bytes_per_token'] / dense:.1f} %", f"{row['kl']:.4f}"]
        rows.append([f"**{cell}**" for cell in (name, *cells)] if name == own else [name, *cells])
    header = ["", "bits", "bits with scales", "bytes a token", "of 16 bits", "KL on held-out calibration text"]
    return table(header, rows)


def speed_table(report: dict) -> str:
    """Ratios of speed; above one is faster than the rival."""
    if not report["speed"]:
        return "Speed was not measured."
    rows = [
        [phase, rival_name(rival), format_metric(m), f"{m['n']} {m['n_of']}"]
        for phase, ratios in report["speed"].items()
        for rival, m in ratios.items()
    ]
    where = f"Measured on {report['environment']['cpu']} ({report['cost']['device']}), interleaved in one process"
    versions = report["environment"]["versions"]
    with_torch = f", torch {versions['torch']}" if "torch" in versions else ""
    shown = table(["phase", "against", "speed", "n"], rows)
    return f"{shown}\n\n{where}{with_torch}. Above one is faster. {speed_verdict(report)}"


def speed_verdict(report: dict) -> str:
    """One sentence: where it is faster, where slower, and what is within two deviations of equal."""
    groups = {"faster": [], "slower": [], "undecided (within two standard deviations of equal)": []}
    faster, slower, undecided = groups.values()
    for phase, ratios in report["speed"].items():
        for rival, m in ratios.items():
            gain = m["value"] - 1
            close = gain == 0 or abs(gain) < 2 * (m["spread"] or 0.0)
            (undecided if close else faster if gain > 0 else slower).append(f"{phase} against {rival_name(rival)}")
    told = "; ".join(f"{verdict}: {', '.join(found)}" for verdict, found in groups.items() if found)
    return f"{told[0].upper()}{told[1:]}.{'' if faster else ' No gain in speed was measured.'}"


def rival_name(ratio: str) -> str:
    """'dense bf16' for the key ratio_to_dense_bf16."""
    return ratio.removeprefix("ratio_to_").replace("_", " ")


def cost_line(report: dict) -> str:
    cost, environment = report["cost"], report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"The run took {format_time(cost['seconds'])} on {cost['device']} ({environment['cpu']}), measuring included, "
        f"and {format_bytes(cost['peak_rss_bytes'])} of memory at its peak; Python {environment['python']}, {versions}."
    )


def layer_types(report: dict) -> dict[str, list[dict]]:
    """{"q_proj": rows of that matrix type, in depth order, ...} of the layers whose loss is known."""
    types: dict[str, list[dict]] = {}
    for row in report["layers"]:
        if row["loss_final"] is not None and row["loss_init"] is not None:
            types.setdefault(row["name"].rpartition(".")[2], []).append(row)
    return types


def evidence(report: dict) -> str:
    """Proxy losses by matrix type, quality by average bits, importance of the blocks, and the plots."""
    plots = "![Quality against size](plots/quality_size.png)"
    if report.get("curves"):
        curves = f"{curve_table(report)}\n\n![Quality against average bits](plots/curves.png)"
        plots = f"{curves}\n\n{plots}"
    if report.get("cache"):
        plots = f"{cache_evidence(report)}\n\n{plots}"
    for title, sweep in report.get("sweeps", {}).items():
        plots = f"{plots}\n\n{sweep_table(title, sweep)}\n\n![{title}](plots/sweep-{slug(title)}.png)"
    for title, found in report.get("tables", {}).items():
        cells = [[cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row] for row in found["rows"]]
        plots = f"{plots}\n\n{title}:\n\n{table(found['header'], cells)}"
    if report.get("importance"):
        plots = f"{plots}\n\n{importance_line(report)}\n\n![Importance of the blocks](plots/importance.png)"
    types = layer_types(report)
    if not types:
        return plots
    rows = []
    for name, layers in types.items():
        init, final = (sum(row[key] for row in layers) / len(layers) for key in ("loss_init", "loss_final"))
        errors = [row["output_error"] for row in layers if row["output_error"] is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else ""
        rows.append([name, len(layers), f"{init:.4f}", f"{final:.4f}", error])
    header = ["matrix", "count", "mean loss at the start", "mean loss at the end", "mean relative output error"]
    return f"{table(header, rows)}\n\n![Proxy loss of every matrix](plots/proxy_loss.png)\n\n{plots}"


def cache_evidence(report: dict) -> str:
    """How sensitive the layers are, how they were grouped, and what the search saw."""
    cache = report["cache"]
    header = ["keys and values at", "mean error of attention's output", "most sensitive layer", "least"]
    rows = []
    for name, errors in cache["errors"].items():
        order = sorted(range(len(errors)), key=errors.__getitem__)
        ends = (f"{errors[layer]:.3f} (layer {layer})" for layer in (order[-1], order[0]))
        rows.append([name, f"{sum(errors) / len(errors):.3f}", *ends])
    groups = "; ".join(", ".join(map(str, group["layers"])) for group in cache["groups"])
    return (
        f"{table(header, rows)}\n\nLayers that share a pair: {groups}. {len(cache['searched'])} tables were evaluated in"
        f" {format_time(cache['seconds'])}.\n\n![Bits of every layer](plots/cache_bits.png)\n\n"
        "![Loss against bits](plots/cache_front.png)"
    )


def curve_table(report: dict) -> str:
    """Every metric of every order, by average bits."""
    curves = report["curves"]
    bits = sorted({point["bits"] for points in curves.values() for point in points}, reverse=True)
    tables = []
    for key in report["compressed"]:
        rows = []
        for order, points in curves.items():
            shown = {point["bits"]: format_metric(point["metrics"][key]) for point in points}
            rows.append([order, *(shown.get(b, "") for b in bits)])
        tables.append(table([f"{metric_title(key)} by average bits, order", *(f"{b:.2f}" for b in bits)], rows))
    return "\n\n".join(tables)


def sweep_table(title: str, sweep: dict) -> str:
    """The first metric of every series over the quantity that was varied."""
    places = sorted({point["x"] for points in sweep["series"].values() for point in points})
    metric = next(iter(next(iter(sweep["series"].values()))[0]["metrics"]))
    header, rows = f"{metric_title(metric)} by {sweep['x']}", []
    for name, points in sweep["series"].items():
        shown = {point["x"]: format_metric(point["metrics"][metric]) for point in points}
        rows.append([name, *(shown.get(x, "") for x in places)])
    return f"{title}:\n\n{table([header, *(f'{x:g}' for x in places)], rows)}"


def importance_line(report: dict) -> str:
    """What the ranking of the blocks rests on, and which of them have the lower width."""
    blocks = report["importance"]["blocks"]
    lowered = []
    for bits in sorted({block["bits"] for block in blocks})[:-1] or [blocks[0]["bits"]]:
        lowered.append(f"with {bits} bits: {', '.join(str(b['index']) for b in blocks if b['bits'] == bits)}")
    line = f"Blocks {'; '.join(lowered)}."
    if "stability" not in report["importance"]:
        return line
    tau = report["importance"]["stability"]
    return f"{line} Kendall's tau of LIM between two halves of the calibration text: {tau:.2f}."


def samples(report: dict) -> str:
    """Generations beside those of the dense model; empty when the report has none."""
    if not report.get("samples"):
        return ""
    parts = (("Prompt", "prompt"), ("Dense", "dense"), ("This model", "compressed"))
    blocks = [f"{name}:\n\n{quote(sample[key])}" for sample in report["samples"] for name, key in parts]
    return "## Examples\n\n" + "\n\n".join(blocks)


def quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def limits(report: dict, method: dict) -> list[str]:
    """What not to expect: from the report's notes, its sample sizes, and the method's file."""
    base = report["base_model"]
    lines = [f"The licence is that of the base model: {base['license'] or UNKNOWN_LICENSE}."]
    if base["language"]:
        lines.append(f"Language: {', '.join(base['language'])}, as the base model.")
    seeds = len(report["seeds"])
    lines.append(
        f"Measured with {seeds} seed{'s' if seeds > 1 else ''} on the samples listed above, not on whole benchmarks; a"
        " difference that is called undecided is no difference."
    )
    return lines + [f"{note[0].upper()}{note[1:].rstrip('.')}." for note in report["notes"]] + method["limits"]
