"""A made-up report with every part that the schema knows, and a made-up run; no number in it was measured."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from tiny_models import Packing, make_base

from recipes.common.core import report as reports
from recipes.common.data.base_models import BaseModel
from recipes.common.data.texts import Text
from recipes.common.domains.language import Language
from zoo.folder import open_folder
from zoo.layers.packing import row_bytes

VERSION_1 = (
    Path(__file__).parents[1] / "zoo" / "record" / "version_1"
)  # an invented report of then, and its card of then


def metric(value, spread=None, n=7, n_of="windows", unit="ppl", higher=False, **more):
    return {"value": value, "spread": spread, "n": n, "n_of": n_of, "unit": unit, "higher_is_better": higher, **more}


def over_two_seeds(first, second, unit="ppl", higher=False):
    spread = abs(first - second) / 2**0.5
    return metric((first + second) / 2, spread, 2, "seeds", unit, higher, values=[first, second])


def data(name, **more):
    return {"name": name, "version": "v-11.5", "sha256": "ab" * 32, "size": 123_457, "license": "cc0-1.0", **more}


def layer(depth, kind, init, final):
    shape = {"format": "armor", "d_out": 96, "d_in": 64, "block_out": 8, "block_in": 16, "pattern": [2, 4]}
    losses = {"loss_init": init, "loss_final": final, "output_error": final / 3}
    return {"name": f"model.layers.{depth}.mlp.{kind}", **shape, **losses}


def pair(difference, error, n=7):
    return {"difference": difference, "error": error, "n": n}


EXAMPLE = {
    "schema_version": 3,
    "recipe": "armor",
    "config": {
        "model": "made-up",
        "method": "armor",
        "pattern": "2:4",
        "lr": 0.00321,
        "schedule": "cosine",
        "iters": 654,
        "block": "16",
        "refit": "A+S",
        "seed": 5,
        "seeds": 2,
    },
    "base_model": {
        "id": "made-up/Base-Model",
        "revision": "c0ffee",
        "sha256": "cd" * 32,
        "parameters": 98_765,
        "license": "apache-2.0",
        "language": ["en"],
    },
    "data": {
        "calibration": data("made-up/calibration-set", windows=31, seqlen=77),
        "evaluation": {
            "A": data("invented prose", windows=7, seqlen=55),
            "B": data("invented speech", windows=7, seqlen=55),
            "tasks": {"riddles": data("invented riddles", items=211)},
        },
    },
    "dense": {
        "perplexity/A": metric(11.31, 0.87),
        "perplexity/B": metric(13.37),
        "acc/riddles": metric(0.523, 0.037, n=211, n_of="items", unit="fraction", higher=True),
    },
    "compressed": {
        "perplexity/A": over_two_seeds(12.41, 12.61),
        "perplexity/B": over_two_seeds(15.17, 15.27),
        "acc/riddles": over_two_seeds(0.512, 0.514, "fraction", True),
    },
    "baselines": {
        "wanda": {
            "perplexity/A": over_two_seeds(19.81, 20.83),
            "perplexity/B": over_two_seeds(15.18, 15.28),
            "acc/riddles": over_two_seeds(0.301, 0.305, "fraction", True),
        },
        "sparsegpt": {
            "perplexity/A": over_two_seeds(12.01, 12.03),
            "perplexity/B": over_two_seeds(14.18, 14.19),
            "acc/riddles": over_two_seeds(0.518, 0.519, "fraction", True),
        },
    },
    "paired": {
        "dense": {"perplexity/A": pair(0.1009, 0.0117), "perplexity/B": pair(0.1291, 0.0133)},
        "wanda": {"perplexity/A": pair(-0.4851, 0.0219), "perplexity/B": pair(-0.0007, 0.0071)},
        "sparsegpt": {"perplexity/A": pair(0.0401, 0.0173), "perplexity/B": pair(0.0701, 0.0123)},
    },
    "size": {
        "dense_bytes": 197_530,
        "compressed_bytes": 143_210,
        "parameters": 98_765,
        "nonzero": 65_432,
        "baselines": {"wanda": 131_072},
    },
    "speed": {
        "decode": {
            "ratio_to_dense_bf16": metric(1.47, 0.03, 3, "runs", "ratio", True),
            "ratio_to_dense_fp32": metric(2.19, 0.04, 3, "runs", "ratio", True),
        },
        "prefill": {"ratio_to_dense_bf16": metric(0.91, 0.02, 3, "runs", "ratio", True)},
    },
    "cost": {"seconds": 1234.5, "peak_rss_bytes": 2_345_678_901, "device": "cpu"},
    "environment": {"python": "3.98.7", "versions": {"torch": "8.76.5"}, "cpu": "Invented CPU, 6 threads"},
    "seeds": [5, 6],
    "layers": [layer(depth, kind, 0.0713 + depth, 0.0429) for depth in range(3) for kind in ("up_proj", "gate_proj")],
    "notes": ["the dense reference was invented for a test"],
    "tables": {
        "Invented findings": {"header": ["riddle", "share"], "rows": [["easy", 0.7431], ["hard", 0.1357]]},
        "Invented sizes": {
            "header": ["", "kB"],
            "rows": [["all", 63.17]],
            "section": "sizes",
            "caption": "Very small.",
        },
    },
    "sweeps": {
        "Riddles by length": {
            "x": "words of a riddle",
            "log": True,
            "series": {
                "armor": [
                    {"x": x, "metrics": {"acc/riddles": over_two_seeds(y, y + 0.02, "fraction", True)}}
                    for x, y in ((12, 0.613), (48, 0.427))
                ]
            },
        }
    },
    "figures": {
        "invented": {
            "title": "An invented figure",
            "caption": "Nothing was measured.",
            "panels": [{"series": [{"name": "guess", "style": "line", "x": [1.5, 2.5], "y": [0.31, 0.73]}]}],
        }
    },
    "samples": [{"prompt": "Say hi.", "dense": "Hi!", "compressed": "Hi there!"}],
}


def example_report(**changes) -> dict:
    return copy.deepcopy(EXAMPLE) | changes


def write_run(folder: Path, base_id: str = "made-up/Base-Model", kind: str = "armor") -> Path:
    """A finished run in `folder`: a tiny packed checkpoint with everything that a recipe puts beside it."""
    packing = Packing(make_base(folder.parent / f"base-{folder.name}"), kind)
    rows, losses = [], {}
    for place, (name, spec) in enumerate(packing.compression["modules"].items()):
        linear = packing.dense.get_submodule(name)
        loss = [0.5 + place / 100, 0.25 + place / 100]
        losses[name] = loss
        shape = {"d_out": linear.out_features, "d_in": linear.in_features}
        measured = {"loss_init": loss[0], "loss_final": loss[1], "output_error": 0.125}
        rows.append({"name": name, **spec, **shape, **measured})
    config = {**EXAMPLE["config"], "method": "armor"}
    packing.write(
        folder,
        dtype=torch.bfloat16,
        compression={**packing.compression, "method": "armor", "proxy_loss": losses},
        extra_files={"recipe.yaml": yaml.safe_dump(config, sort_keys=False)},
    )
    text = Text(**data("invented text"), text="")
    language = Language({"nsamples": 3, "seqlen": 17, "eval_seqlen": 19})
    language.text, language.texts = text, {"A": text, "B": text}
    base = BaseModel(base_id, packing.base, None, "ef" * 32, 4321, "apache-2.0", "llama", ("made up",))
    size = open_folder(folder).sizes()
    if kind == "armor":
        plain = [{"format": "bitmask", **{key: row[key] for key in ("d_out", "d_in", "pattern")}} for row in rows]
        wrappers = sum(row_bytes(row, 2) for row in rows) - sum(row_bytes(row, 2) for row in plain)
        size["baselines"] = {"wanda": size["compressed_bytes"] - wrappers}
    measured = {"dense": [with_raw(EXAMPLE["dense"])], "armor": runs_of(EXAMPLE["compressed"])}
    measured |= {name: runs_of(metrics) for name, metrics in EXAMPLE["baselines"].items()}
    report = reports.build(
        recipe=SimpleNamespace(name="armor", method="armor", settings=lambda: config, device="cpu"),
        base_model=base.row(),
        data=language.data_rows(EXAMPLE["dense"]),
        dense=measured["dense"],
        compressed=measured["armor"],
        baselines={name: measured[name] for name in EXAMPLE["baselines"]},
        size=size,
        speed=EXAMPLE["speed"],
        layers=rows,
        seconds=12.5,
        seeds=EXAMPLE["seeds"],
        notes=base.notes,
    )
    reports.write(report, folder, reports.raw_values(measured))
    return folder


def runs_of(metrics: dict) -> list[dict]:
    """What was measured for each seed, from metrics over seeds."""
    single = {"spread": None, "n": 7, "n_of": "windows"}
    runs = [{key: m | single | {"value": m["values"][i]} for key, m in metrics.items()} for i in range(2)]
    return [with_raw({key: {k: v for k, v in m.items() if k != "values"} for key, m in run.items()}) for run in runs]


def with_raw(metrics: dict) -> dict:
    """Perplexities with log-likelihoods of windows that give them: large steps that all models share, and small ones."""

    def steps(value: float) -> list[float]:
        small = [0.01 * ((value * 100 + 3 * i) % 7 - 3) for i in range(7)]
        all_steps = [s + 0.2 * (i - 3) for i, s in enumerate(small)]
        return [math.log(value) + s - sum(all_steps) / 7 for s in all_steps]

    return {
        key: m | {"raw": [[round(x, 12) for x in steps(m["value"])]]} if m["unit"] == "ppl" else m
        for key, m in metrics.items()
    }
