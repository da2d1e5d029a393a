"""Render a model card from a report: every number of the card is one of the report.

The skeleton is model_cards/template.md; what is said about a method comes from model_cards/<method>.md, whose front
matter holds its names, tags and limits, and whose body may use the recipe's flags as $placeholders.
"""

import math
import re
from string import Template

import yaml  # huggingface_hub needs it too
from huggingface_hub import EvalResult, ModelCardData

from ..errors import UserError
from .compare import compare, speed_verdict, verdicts
from .format import (
    CARDS,
    FIDELITY,
    HUB_ID,
    base_link,
    baseline_name,
    format_bytes,
    format_metric,
    format_time,
    method_name,
    metric_title,
    slug,
    table,
)
from .measurements import FEWEST, FILE
from .schema import check_report

UNKNOWN_LICENSE = "unknown"


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
        "title": name.rpartition("/")[2] + returned(report),
        "summary": " ".join(filter(None, [returned_sentence(report), outdone_sentence(report), method["summary"]])),
        "base": base_link(report["base_model"]["id"]),
        "paper": paper_link(method),
        "quality": quality_table(report),
        "verdicts": "\n".join(f"- {line}" for line in verdicts(report)),
        "pairing": PAIRED if "paired" in report else UNPAIRED,
        "scatter": scatter_line(report),
        "data": data_table(report),
        "sizes": sizes(report),
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


def default_name(report: dict) -> str:
    """Name of a checkpoint that is not published: base and method."""
    return f"{report['base_model']['id'].rpartition('/')[2]}-{method_name(report)}".lower()


def method_file(report: dict) -> dict:
    """Front matter of model_cards/<method>.md, filled in, with the text below it as "body"."""
    name, about = method_name(report), baseline_texts(report["recipe"])
    path = CARDS / f"{name}.md"
    if not path.is_file() and name in about and name != report["recipe"]:  # a baseline as the method of another recipe
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


def returned(report: dict) -> str:
    """What a title adds where the method returned a baseline; else nothing."""
    return f" (the same as {report['same_as'][0]})" if report.get("same_as") else ""


def returned_sentence(report: dict) -> str:
    """The first sentences of a card where the method returned a baseline; else nothing."""
    if not report.get("same_as"):
        return ""
    first, *others = report["same_as"]
    what = baseline_texts(report["recipe"]).get(first, "")
    also = f" So do {', '.join(others)}." if others else ""
    return f"**What the method returned here is a baseline, {first}**: it {what}{also}"


def outdone_sentence(report: dict) -> str:
    """Names the baselines that take no more bytes and are better wherever they can be told apart; else nothing."""
    if footprint := report.get("footprint"):
        taken, own = footprint["models"], footprint["models"][method_name(report)]
    else:
        taken, own = report["size"].get("baselines", {}), report["size"]["compressed_bytes"]
    found = []
    for name in report["baselines"]:
        told = {compare(report, key, name) for key in report["compressed"]}
        if taken.get(name, math.inf) <= own and "worse" in told and "better" not in told:
            found.append(f"{name} ({100 * taken[name] / own:.0f} % of the bytes)")
    return f"**No larger and better here: {', '.join(found)}.**" if found else ""


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
    row of its kind or "test". The fidelity of language models is that on all texts together.
    """
    kind, _, where = key.partition("/")
    evaluation = report["data"]["evaluation"]
    if kind in FIDELITY and "test" not in evaluation:
        names = [found["name"] for place, found in evaluation.items() if place != "tasks"]
        return kind, {"name": ", ".join(names), "version": None}
    data = (
        evaluation.get(where) or evaluation.get("tasks", {}).get(where) or evaluation.get(kind, evaluation.get("test"))
    )
    if data is None:
        raise UserError(f"report: data.evaluation does not describe {where!r}, on which {key} was measured.")
    return kind, data


def data_title(report: dict, key: str) -> str:
    data = metric_source(report, key)[1]
    return data["name"] if data["version"] is None else f"{data['name']} {data['version']}"


def quality_table(report: dict) -> str:
    """Dense, this model and every baseline on every metric; then how near each is to dense."""
    shown = metric_table(report, [key for key in report["compressed"] if key not in FIDELITY], dense=True)
    about = [
        f"- {name}: {text}" for name, text in baseline_texts(report["recipe"]).items() if name in report["baselines"]
    ]
    return "\n\n".join(filter(None, [shown, "\n".join(about), fidelity_table(report)]))


def metric_table(report: dict, keys: list[str], dense: bool) -> str:
    models = {"dense": report["dense"]} if dense else {}
    models |= {f"**{method_name(report)}**": report["compressed"], **report["baselines"]}
    header, rows = [""], []
    for key in keys:
        header.append(f"{metric_title(key)} {'↑' if report['compressed'][key]['higher_is_better'] else '↓'}")
    for name, metrics in models.items():
        mark = "**" if metrics is report["compressed"] else ""
        rows.append([name, *(f"{mark}{format_metric(metrics[key])}{mark}" for key in keys)])
    return table(header, rows)


def fidelity_table(report: dict) -> str:
    """How near the predictions are to the dense model's; empty where that was not measured."""
    keys = [key for key in FIDELITY if key in report["compressed"]]
    if not keys:
        return ""
    dense, what = report["dense"][keys[0]], "of every image"
    if "test" not in report["data"]["evaluation"]:
        what = f"of the next token on {dense['n']} held-out windows of the texts, together"
    about = (
        f"Each prediction {what}, compared with the dense model's: KL(dense ‖ model) in nats, and how often both rank the"
        " same first."
    )
    return f"{about}\n\n{metric_table(report, keys, dense=False)}"


def sameness(report: dict) -> str:
    """What dense, this model and the baselines have in common."""
    if "training" in report["data"]:
        return "All rows were trained on the same images, by the same recipe, and measured on the same held-out ones:"
    return "All rows were measured on the same data, and the baselines were calibrated on the same text:"


PAIRED = (
    "Every difference was taken window by window and item by item, this model's values against the other's on the same"
    f" ones (`{FILE}`); its ± is one standard error of the mean, over windows, items, seeds or draws, whichever is largest."
    f" Better and worse need two of them, on {FEWEST} windows or items at least; where no ± is given, two of both rows' own"
    " scatter."
)
UNPAIRED = (
    "Values of single windows and items were not kept, so these differences are not paired: better and worse need two"
    " standard errors of both rows' own scatter taken together, and all else is undecided."
)
LOADING = """With slimzoo installed (on no package index yet: `pip install .` in a clone of its source), no remote code runs:

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
{variable} = {reader}.from_pretrained("{source}", trust_remote_code=False)  # runs no code; without a word it would ask
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
    known = {
        key: m
        for key, m in report["dense"].items()
        if m["spread"] is not None and m["n_of"] != "seeds" and key not in FIDELITY
    }
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


def sizes(report: dict) -> str:
    """The weights of both models, and what else the report has to say of sizes."""
    size = report["size"]
    ratio = size["compressed_bytes"] / size["dense_bytes"]
    rows = [
        ["dense, same dtype", format_bytes(size["dense_bytes"]), f"{size['parameters']:,}"],
        [f"**{method_name(report)}**", f"**{format_bytes(size['compressed_bytes'])}**", f"{size['nonzero']:,}"],
    ]
    verdict = "" if ratio < 1 else " Nothing is saved."
    weights = (
        f"{table(['', 'weights', 'numbers stored'], rows)}\n\nThat is {100 * ratio:.1f} % of the dense size.{verdict}"
    )
    if ratio == 1 and "footprint" in report:  # something else is saved
        weights = f"The weights are those of the base model, {format_bytes(size['dense_bytes'])}."
    return "\n\n".join([weights, *tables(report, "sizes")])


def speed_table(report: dict) -> str:
    """Ratios of speed; above one is faster than what it is measured against."""
    if not report["speed"]:
        return "Speed was not measured."
    rows = [
        [phase, baseline_name(ratio), format_metric(m), f"{m['n']} {m['n_of']}"]
        for phase, ratios in report["speed"].items()
        for ratio, m in ratios.items()
    ]
    where = f"Measured on {report['environment']['cpu']} ({report['cost']['device']}), interleaved in one process"
    versions = report["environment"]["versions"]
    with_torch = f", torch {versions['torch']}" if "torch" in versions else ""
    shown = table(["phase", "against", "speed", "n"], rows)
    return f"{shown}\n\n{where}{with_torch}. Above one is faster. {speed_verdict(report)}"


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
    """Proxy losses by matrix type, quality against size, and what the method found: sweeps, tables, figures."""
    blocks = [*proxy_losses(report), image("Quality against size", "quality_size")]
    for title, sweep in report.get("sweeps", {}).items():
        blocks += [sweep_table(title, sweep), image(title, f"sweep-{slug(title)}")]
    blocks += tables(report, "evidence")
    for stem, figure in report.get("figures", {}).items():
        blocks += [figure.get("caption", ""), image(figure["title"], stem)]
    return "\n\n".join(filter(None, blocks))


def image(title: str, stem: str) -> str:
    return f"![{title}](plots/{stem}.png)"


def tables(report: dict, section: str) -> list[str]:
    """The report's tables of a section of the card, each under its title unless its header begins with that."""
    blocks = []
    for title, found in report.get("tables", {}).items():
        if found.get("section", "evidence") == section:
            heading = "" if found["header"][0] == title else f"{title}:"
            blocks += [heading, table(found["header"], found["rows"]), found.get("caption", "")]
    return list(filter(None, blocks))


def proxy_losses(report: dict) -> list[str]:
    """The losses of each matrix type, as a table and a plot; empty when none is known."""
    rows = []
    for name, layers in layer_types(report).items():
        init, final = (sum(row[key] for row in layers) / len(layers) for key in ("loss_init", "loss_final"))
        errors = [row["output_error"] for row in layers if row["output_error"] is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else ""
        rows.append([name, len(layers), f"{init:.4f}", f"{final:.4f}", error])
    header = ["matrix", "count", "mean loss at the start", "mean loss at the end", "mean relative output error"]
    return [table(header, rows), image("Proxy loss of every matrix", "proxy_loss")] if rows else []


def sweep_table(title: str, sweep: dict) -> str:
    """The first metric of every series over the quantity that was varied."""
    places = sorted({point["x"] for points in sweep["series"].values() for point in points})
    metric = next(iter(next(iter(sweep["series"].values()))[0]["metrics"]))
    header, rows = f"{metric_title(metric)} by {sweep['x']}", []
    for name, points in sweep["series"].items():
        shown = {point["x"]: format_metric(point["metrics"][metric]) for point in points}
        rows.append([name, *(shown.get(x, "") for x in places)])
    return f"{title}:\n\n{table([header, *(f'{x:g}' for x in places)], rows)}"


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
