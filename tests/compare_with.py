"""Does this tree still do what another commit does? For work that changes structure only, to the last bit.

    python tests/compare_with.py COMMIT [--recipe NAME …] [--keep DIR]

Runs every recipe at tiny settings, with two seeds, in a worktree of COMMIT and in this tree, on this machine, and compares
what the runs leave: weights, configs, reports, settings, exports, and what `verify` says. Then refused command lines and
the flags. Prints one line for each run and thing, then the differences; exit code 1 if there is one. About half an hour.

Not compared: what depends on the clock or the machine (cost, speed, environment), bundled code, plots and cards.
--recipe compares these recipes only. --keep DIR keeps inputs and outputs in DIR, and reuses COMMIT's runs found there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

TREE = Path(__file__).resolve().parent.parent
SHOWN = 20  # differences of one kind in one run that are spelled out
CLOCK = ("cost", "speed", "environment")  # parts of a report that no two runs share
BUNDLED = ("auto_map", "transformers_version")  # parts of a config that name code
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "COLUMNS": "10000"}


@dataclass(frozen=True)
class Job:
    """Command lines of one recipe that are run one after another in a folder of their own.

    {inputs} stands for the folder of `make_inputs`, {old} for that of COMMIT's runs. files: {path: text} that are in the
    job's folder beforehand. Of a refused line the exit code, the sentence and what is left count, of others the results.
    """

    recipe: str
    name: str
    lines: tuple[str, ...]
    refused: bool = False
    files: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.recipe}: {self.name}"


# --------------------------------------------------------------------------------------------------------------- runs

LANGUAGE = "--calibration {inputs}/text.txt --seqlen 48 --eval_seqlen 64"
ARMOR = f"armor --model {{inputs}}/llama {LANGUAGE} --nsamples 8 --eval_windows 2 --tasks none --block 16 --iters 4"
LAYERWISE = (
    f"layerwise-quant --model {{inputs}}/llama {LANGUAGE} --nsamples 8 --eval_windows 1 --tasks none --group_size 32"
    " --curve_points 1"
)
KVTUNER = (
    f"kvtuner --model {{inputs}}/llama {LANGUAGE} --nsamples 2 --calib_samples 2 --eval_windows 1 --evals 24"
    " --population 8 --retrieval_items 0 --speed_tokens 0"
)
LPVIT = (
    "lpvit --model {inputs}/vit --dataset {inputs}/images --block 8 --nsamples 24 --curve_samples 16 --rounds 2"
    " --epochs 1 --warmup_epochs 0.5 --batch_size 16 --eval accuracy nll"
)
PRECROPPING = (
    "precropping --model resnet-8 --dataset {inputs}/images --epochs 1 --batch_size 32 --eval accuracy nll ece"
    " --score_rounds 5 --score_samples 4"
)
RANDOM = (
    "random-pruning --model resnet-8-8 --dataset {inputs}/images --image_size 8 --density 0.1 --epochs 1"
    " --batch_size 32 --grasp_samples_per_class 5 --attacked 12"
)
NO_BASELINES = "--baselines none"
SHORT = f"{NO_BASELINES} --curve_points 0"
ALONE = f"{NO_BASELINES} --more_densities 0 --more_models none"

# name of a run: (flags, further commands). The first of each recipe has two seeds, the second another first seed.
RUNS = {
    ARMOR: {
        "two seeds": ("--seeds 2 --export dense gguf-f16", "verify out", "export out again.gguf --format gguf-q8_0"),
        "another seed": ("--seed 1 --baselines none",),
        "wanda": ("--method wanda --dtype float32 --seed 1",),
        "sequential": ("--sequential --model {inputs}/qwen --block 16,8 --continuous als --select uniform --refit A",),
        "automatic blocks": ("--block auto --max_overhead 0.6 --pattern 1:4 --continuous gd --baselines magnitude",),
        "some layers": ("--method sparsegpt --include layers.[12] --ignore lm_head down_proj --workers 2",),
        "tasks": ("--refit none --dtype float16 --baselines nowag --tasks step_inference --task_limit 4",),
        "again": ("--config {old}/armor/two-seeds/out/recipe.yaml",),
    },
    LAYERWISE: {
        "two seeds": ("--seeds 2", "verify out"),
        "another seed": (f"--seed 1 {SHORT}",),
        "gptq": (
            "--backend gptq --model {inputs}/qwen --dtype float32 --baselines lim random rtn"
            " --export dense gguf-packed compressed-tensors",
        ),
        "head": ("--backend rtn --symmetric --scale_search --head_bits 8 --baselines zd gptq --curve_points 0",),
        "three widths": (
            "--levels 4,3,2 --avg_bits 3 --importance sensitivity --baselines lim random reversed dropped",
        ),
        "given scores": (
            f"--backend hqq --importance {{inputs}}/scores.json --keep first --group_size -1 --dtype float16 {SHORT}",
        ),
        "again": ("--config {old}/layerwise-quant/gptq/out/recipe.yaml",),
    },
    KVTUNER: {
        "two seeds": ("--seeds 2 --retrieval_items 1 --retrieval_tokens 3000", "verify out"),
        "another seed": ("--seed 1 --baselines none",),
        "kivi": (
            "--mode kivi --objective ppl --prefill quantized --no_prune --max_bits 5 --speed_tokens 64"
            " --baselines KV4 per-token-4 knapsack random clustered",
        ),
        "given table": ("--load_table {inputs}/table.json --max_bits 6.75 --baselines KV4 --seed 1",),
        "packed weights": ("--model {old}/layerwise-quant/gptq/out --baselines KV4 second within-6", "verify out"),
        "again": ("--config {old}/kvtuner/kivi/out/recipe.yaml",),
    },
    LPVIT: {
        "two seeds": ("--seeds 2 --densities 0.7", "verify out", "export out dense --format dense"),
        "another seed": (f"--seeds 1 --seed 1 --densities 1 {NO_BASELINES}",),
        "fine-tuned": ("--seeds 1 --finetune --densities 1 --baselines lpvit-no-finetune lpvit-no-ls",),
        "the code's": (
            "--seeds 1 --target_fn sq --rank taylor --alloc derivative --power_mode official --reconstruct none"
            " --densities 1 --baselines block-lamp wanda",
        ),
        "every layer": (
            "--seeds 1 --block 4 --include_embed --include_head --ragged --budget energy --target_fn ce --densities 0.4"
            f" --energy_table {{inputs}}/energy.yaml {NO_BASELINES}",
        ),
        "own base": (f"--model vit-tiny --seeds 1 --densities 1 {NO_BASELINES}", "verify out"),
        "again": (f"--config {{old}}/lpvit/own-base/out/recipe.yaml {NO_BASELINES}",),
    },
    PRECROPPING: {
        "two seeds": (
            "--seeds 2 --sweep 0.6 --baselines width-params same-p-mask",
            "verify out",
            "export out dense --format dense",
        ),
        "another seed": ("--seeds 1 --seed 1",),
        "snip": (
            "--source snip --seeds 1 --init crop --trunk keep --mode params --sweep 0.6"
            " --baselines snip-mask grasp-mask uniform-mask",
        ),
        "mobilenet": (
            "--model mobilenet-v2 --source synflow --score_rounds 2 --density_map producer --width_multiple 2 --seeds 1"
            f" --train_items 64 {NO_BASELINES}",
        ),
        "cifar10": (
            "--dataset cifar10 --train_items 200 --mode flops --epochs 2 --schedule step --lr_drops 1 --seeds 1"
            f" {NO_BASELINES}",
        ),
        "preconfig": (f"--preconfig --budget_params 0.9 --budget_flops 1 --optimizer adamw --seeds 1 {NO_BASELINES}",),
        "plan": ("--dry_run --source grasp",),
        "again": ("--config {old}/precropping/snip/out/recipe.yaml",),
    },
    RANDOM: {
        "two seeds": (
            "--seeds 2 --more_densities 0.3 --more_models resnet-8-4",
            "verify out",
            "export out dense --format dense",
        ),
        "another seed": (f"--seeds 1 --seed 1 {ALONE}",),
        "bitmask": (
            "--storage bitmask --ratio balanced --mask_sampling bernoulli --mask_seed 7 --scaled_init --seeds 1"
            " --baselines uniform --more_densities 0 --more_models none",
        ),
        "dense": (f"--storage dense --ratio snip --snip_reinit xavier --exclude classifier --seeds 1 {ALONE}",),
        "dense classifier": (f"--ratio erk_plus --fc_density 0.5 --train_items 64 --seeds 1 {ALONE}",),
        "again": ("--config {old}/random-pruning/bitmask/out/recipe.yaml",),
    },
}

SCORES, PRESET = "[0.1, 0.4, 0.3]", "llama-3.1-8b-kivi-3.25"
FOUND = {"out/mine": "", "out-dense/mine": "", "out-dense.gguf": "", "out-gguf-f16.gguf": ""}
UNFINISHED = {"out.state/recipe.yaml": "seed: 5\n"}
CONFIGS = {"typo.yaml": "sed: 1\n", "list.yaml": "- 1\n", "bad.yaml": "a: [\n", "energy.yaml": "fp16_mac: 1\n"}
FILES = {"three.json": SCORES, "empty.txt": " ", "rows.jsonl": '{"a": 1}\n', **CONFIGS}

# Flags that no run can have, after those of the recipe; a pair has files of its own beforehand.
REFUSED = {
    ARMOR: [
        "--model no-such-model",
        "--model {inputs}/text.txt",
        "--revision main",
        "--calibration nothing.txt",
        "--calibration empty.txt",
        "--calibration rows.jsonl",
        "--nsamples 50000",
        "--nsamples 0",
        "--eval_windows 0",
        "--eval_seqlen 1",
        "--seeds 0",
        "--include no_such_layer",
        "--include (",
        "--baselines oracle",
        "--tasks no_such_task",
        "--tasks none step_inference",
        "--export bogus",
        "--export dense compressed-tensors",
        "--push_to_hub nobody",
        "--push_to_hub some/body",
        "--pattern 4:2",
        "--pattern 3:5",
        "--block 64",
        "--block 12",
        "--block auto --max_overhead 0.01",
        "--max_overhead 1",
        "--iters -1",
        "--lr 0",
        "--refit_steps 0",
        "--groups_per_block 9999",
        "--continuous newton",
        "--dtype int8",
        "--schedule linear",
        "--no_such_flag 1",
        "--config missing.yaml",
        "--config typo.yaml",
        "--config list.yaml",
        "--config bad.yaml",
        "--paper --iters -1",
        "--output empty.txt/out",
        ("", FOUND),
        ("--export dense gguf-f16", {"out-dense/mine": "", "out-gguf-f16.gguf": ""}),
        ("", UNFINISHED),
        ("--resume", UNFINISHED),
    ],
    LAYERWISE: [
        "--avg_bits 9",
        "--avg_bits 4.5 --levels 4,2",
        "--levels 4,4",
        "--levels banana",
        "--group_size 48",
        "--group_size 64",
        "--importance luck",
        "--importance three.json",
        "--importance missing.json",
        "--backend hqq --symmetric",
        "--backend gptq --nsamples 2 --seqlen 20",
        "--curve_points -1",
        "--head_bits 7",
        "--keep 7",
        "--keep 0 1 2",
        "--nsamples 1",
        "--model smollm2-135m-instruct --group_size 32",
        "--model {inputs}/vit",
        "--baselines gptq oracle",
        "--export bogus",
        "--backend hqq --export dense compressed-tensors",
        "--paper --levels 4,7",
    ],
    KVTUNER: [
        "--pairs K8V3",
        "--pairs banana",
        "--max_bits 1.5",
        "--max_bits nan",
        "--evals 7",
        "--eps 0",
        "--nsamples 0",
        "--nsamples 4000",
        "--objective luck",
        "--objective math:luck",
        "--objective gsm8k --tasks gsm8k_cot",
        "--group_size 32",
        "--mode kivi --group_size 20",
        "--mode kivi --residual_length 48",
        "--mode kivi --residual_length 64",
        "--mode kivi --group_size 24 --residual_length 24",
        f"--load_table {PRESET}",
        f"--load_table {PRESET} --mode kivi",
        "--load_table missing.yaml",
        "--load_table {inputs}/table.json",
        "--baselines KV3",
        "--export gguf-f16",
        "--eval_seqlen 8192",
        "--eval_windows 0",
        "--retrieval_items 1 --retrieval_tokens 100",
        "--task_limit 0",
        "--model {inputs}/narrow --baselines kivi-4",
        "--model {old}/kvtuner/kivi/out",
        "--paper --max_bits 17",
    ],
    LPVIT: [
        "--target 0",
        "--target 0.01",
        "--block 24",
        "--block 12",
        "--rank taylor",
        "--include (",
        "--include nothing",
        "--nsamples 400 --curve_samples 4",
        "--nsamples 4",
        "--curve_samples 0",
        "--warmup_epochs 3",
        "--dataset cifar10",
        "--dataset nowhere",
        "--model resnet-20",
        "--model {inputs}/llama",
        "--baselines best",
        "--energy_table nowhere.yaml",
        "--energy_table energy.yaml",
        "--teacher nowhere --finetune",
        "--eval bleu",
        "--export dense",
        ("--model vit-tiny", {"out-dense/mine": ""}),
    ],
    PRECROPPING: [
        "--budget_params 0",
        "--budget_params 9e9",
        "--budget_params 0.001",
        "--preconfig --source snip",
        "--preconfig --init crop",
        "--min_ratio 0",
        "--min_width 0",
        "--max_density 0.5",
        "--sweep 1.5",
        "--baselines magnitude",
        "--model resnet-9",
        "--model {inputs}/vit",
        "--test_split nowhere",
        "--label_column nothing",
        "--train_items 9999",
        "--seeds 0",
        "--epochs 0",
        "--schedule step --lr_drops 99",
        "--optimizer lion",
        ("", {"out-dense/mine": ""}),
        ("", {"out/mine": ""}),
        ("", UNFINISHED),
    ],
    RANDOM: [
        "--density 0",
        "--density 1.5",
        "--fc_density 0.5",
        "--mask_seed -1",
        "--snip_batches 0",
        "--grasp_temp 0",
        "--grasp_samples_per_class 99",
        "--more_densities 2",
        "--more_models resnet-9",
        "--baselines magic",
        "--baselines erk",
        "--density 0.02 --ratio uniform_plus",
        "--density 0.001",
        "--exclude .",
        "--exclude (",
        "--attacked 0",
        "--image_size 0",
        "--push_to_hub nobody",
    ],
}
ASIDE = [
    "no-such-recipe",
    "verify",
    "verify nowhere",
    "verify {inputs}/llama",
    "export nowhere out",
    "export {inputs}/llama out",
    "export {old}/armor/two-seeds/out out --format compressed-tensors",
    "export {old}/armor/two-seeds/out out --format gguf-packed",
    "export {old}/lpvit/two-seeds/out out --format gguf-f16",
    "export {old}/armor/two-seeds/out out --format onnx",
    "publish nowhere a/b",
    "publish {inputs}/llama a/b",
    "publish {old}/armor/two-seeds/out nobody",
    "publish {old}/armor/two-seeds/out some/body",
]
HELP = ["", "--list", "--help", *(f"{command} --help" for command in ("verify", "export", "publish"))]


def jobs() -> list[Job]:
    """All runs, then what needs their results."""
    found = []
    for base, runs in RUNS.items():
        recipe = base.split()[0]
        for name, (flags, *more) in runs.items():
            first = f"{recipe} {flags}" if flags.startswith("--config") else f"{base} {flags}"
            found.append(Job(recipe, name.replace(" ", "-"), (f"{first} --output out", *more)))
        found.append(Job(recipe, "old-results", (f"verify {{old}}/{recipe}/two-seeds/out",)))
    for base, wrong in REFUSED.items():
        recipe = base.split()[0]
        pairs = [flags if isinstance(flags, tuple) else (flags, {}) for flags in wrong]
        for number, (flags, files) in enumerate(pairs):
            line = f"{base} {NO_BASELINES} --seeds 1 --output out {flags}".strip()
            found.append(Job(recipe, f"refused-{number}", (line,), refused=True, files=FILES | files))
        found.append(Job(recipe, "flags", (f"{recipe} --help",)))
    found += [Job("aside", f"refused-{n}", (line,), refused=True) for n, line in enumerate(ASIDE)]
    return [*found, Job("aside", "flags", tuple(HELP))]


# ------------------------------------------------------------------------------------------------------------ running

# Runs jobs by the code that PYTHONPATH names. A process is forked for each, which saves the imports and keeps them apart.
DRIVER = """
import importlib, json, os, runpy, signal, sys, time, traceback
import matplotlib.figure
import recipes, zoo
matplotlib.figure.Figure.savefig = lambda self, path, *_, **__: open(path, "w").close()  # drawing takes seconds
tree, jobs = json.load(open(sys.argv[1]))
for package in (recipes, zoo):
    assert os.path.realpath(package.__file__).startswith(os.path.realpath(tree) + os.sep), package.__file__

def run(arguments):
    sys.argv = ["recipes", *arguments]
    try:
        runpy.run_module("recipes", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def read(path):
    return open(path, errors="replace").read()

for name in {job["recipe"] for job in jobs}:
    try:
        importlib.import_module("recipes." + name.replace("-", "_"))
    except ImportError:
        pass  # the job will say so
for job in jobs:
    begin, found = time.time(), {"exit": [], "stdout": [], "stderr": []}
    for arguments in job["arguments"]:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.chdir(job["folder"])
            signal.alarm(job["seconds"])
            for number, kind in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(f"{job['folder']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        found["exit"].append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        for kind in ("stdout", "stderr"):
            found[kind].append(read(f"{job['folder']}.{kind}"))
            os.remove(f"{job['folder']}.{kind}")
    with open(f"{job['folder']}.json", "w") as file:
        json.dump({key: job[key] for key in ("lines", "files")} | found, file)
    if not job["refused"]:
        print(f"  {job['key']}: {time.time() - begin:.0f} s{', FAILED' if any(found['exit']) else ''}")
"""


def run_jobs(tree: Path, chosen: list[Job], folder: Path, places: dict[str, Path]) -> None:
    """Runs jobs by the code in `tree`; each in folder/recipe/name, what it says beside that in name.json."""
    described = []
    for job in chosen:
        place = folder / job.recipe / job.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        place.with_suffix(".json").unlink(missing_ok=True)
        for name, text in job.files.items():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text)
        arguments = [[word.format(**places) for word in shlex.split(line)] for line in job.lines]
        seconds = 120 if job.refused else 1200  # a line that is not refused may go on for ever
        described.append(vars(job) | {"key": job.key, "folder": str(place), "arguments": arguments, "seconds": seconds})
    if described:
        listed = folder / "jobs.json"
        listed.write_text(json.dumps([str(tree), described]))
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tree), "HF_DATASETS_CACHE": str(folder / "cache")}
        command = ["nice", sys.executable, "-u", "-c", DRIVER, str(listed)]
        subprocess.run(command, env=environment, cwd=folder, check=True)


def told(folder: Path, job: Job) -> dict | None:
    """What a finished job said: {"lines", "files", "exit", "stdout", "stderr"}; None of one that did not run so."""
    file = folder / job.recipe / f"{job.name}.json"
    said = json.loads(file.read_text()) if file.exists() else None
    return said if said and (said["lines"], said["files"]) == (list(job.lines), job.files) else None


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The code of a commit in a folder that is gone afterwards."""
    git = ["git", "-C", str(TREE), "worktree"]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tree"
        subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def with_needs(chosen: list[Job], everything: list[Job]) -> list[Job]:
    """The chosen jobs and those whose results they take, in the order of `everything` but needs first."""
    found: dict[str, Job] = {}

    def add(job: Job) -> None:
        for other in everything:
            if other is not job and any(f"{{old}}/{other.recipe}/{other.name}/" in f"{line}/" for line in job.lines):
                add(other)
        found.setdefault(job.key, job)

    for job in chosen:
        add(job)
    return list(found.values())


def make_inputs(folder: Path) -> None:
    """Random models, a text, images of four classes, and small files, the same ones for every run."""
    from pydoc_data.topics import topics

    import torch
    from helpers.tiny_models import make_base
    from PIL import Image
    from transformers import ConvNextImageProcessorPil, ViTConfig, ViTForImageClassification

    shape = {"num_hidden_layers": 4, "head_dim": 32, "max_position_embeddings": 4096}
    for name, family, changes in (("llama", "llama", {}), ("qwen", "qwen2", {}), ("narrow", "llama", {"head_dim": 16})):
        make_base(folder / name, family, **shape | changes)
    (folder / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics))[:60_000])
    generator = torch.Generator().manual_seed(0)
    classes = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}
    for split, count in (("train", 40), ("validation", 8), ("test", 12)):
        for name, channels in classes.items():
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 180, (16, 16, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channels] += 40
                Image.fromarray(pixels.numpy()).save(folder / "images" / split / name / f"{index}.png")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = dict(enumerate(sorted(classes)))
    config = ViTConfig(**shape, image_size=16, patch_size=4, id2label=labels, initializer_range=0.1)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(folder / "vit")
    (folder / "scores.json").write_text("[0.1, 0.4, 0.3, 0.2]")
    (folder / "table.json").write_text('{"mode": "per_token", "layers": [[8, 4], [16, 16], [4, 2], [2, 2]]}')
    energies = {"fp16_mac": 1.0, "fp32_mac": 4.0, "int8_mac": 0.2, "sram_32bit": 6.0, "dram_32bit": 500.0}
    (folder / "energy.yaml").write_text(yaml.safe_dump(energies))


# ---------------------------------------------------------------------------------------------------------- comparing


def differences(old, new, where: str = "") -> Iterator[str]:
    """`path: old -> new` of every place where two trees of JSON differ; the order of keys does not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key, ...), new.get(key, ...), f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{where}[{place}]")
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        texts = ("(absent)" if value is ... else json.dumps(value, ensure_ascii=False) for value in (old, new))
        yield f"{where.removeprefix('.')}: " + " -> ".join(t if len(t) < 300 else f"{t[:300]}…" for t in texts)


def left_in(folder: Path) -> list[str]:
    """Files below a folder, without bundled code, whose names may change."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.suffix != ".py" and "__pycache__" not in path.parts)


def tensors_of(path: Path) -> dict[str, tuple]:
    """{name: (dtype, shape, sha256 of the bytes)} of a safetensors or GGUF file."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        found = ((t.name, t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in GGUFReader(path).tensors)
    else:
        import torch
        from safetensors.torch import load_file

        found = (
            (name, str(t.dtype), list(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for name, t in load_file(path).items()
        )
    return {name: (dtype, shape, hashlib.sha256(data).hexdigest()[:16]) for name, dtype, shape, data in found}


def compare_weights(old: Path, new: Path) -> Iterator[str]:
    if old.read_bytes() != new.read_bytes():
        wrong = list(differences(tensors_of(old), tensors_of(new)))
        yield from wrong or ["the tensors are equal, the bytes around them differ"]


def compare_config(old: Path, new: Path) -> Iterator[str]:
    configs = (json.loads(path.read_text()) for path in (old, new))
    yield from differences(*({k: v for k, v in config.items() if k not in BUNDLED} for config in configs))


def compare_report(old: Path, new: Path) -> Iterator[str]:
    """An older report in the form of the newer one, without what the clock makes of it; its files are compared anyway."""
    reports = [json.loads(path.read_text()) for path in (old, new)]
    if reports[0]["schema_version"] != reports[1]["schema_version"]:
        from zoo.record.migrate import upgrade

        reports[0] = upgrade(reports[0])
    for report in reports:
        for key in (*CLOCK, "files"):
            report.pop(key)
    timeless = (re.sub(r"(tables were evaluated) in [^\"]*", r"\1", json.dumps(report)) for report in reports)
    yield from differences(*map(json.loads, timeless))


def compare_settings(old: Path, new: Path) -> Iterator[str]:
    yield from differences(*(yaml.safe_load(path.read_text()) for path in (old, new)))


def compare_bytes(old: Path, new: Path) -> Iterator[str]:
    if old.read_bytes() != new.read_bytes():
        yield "the bytes differ"


def kind_of(name: str) -> tuple[str, Callable[[Path, Path], Iterator[str]]] | None:
    """The thing that a file belongs to and how two of it are compared; None if they are not."""
    path = Path(name)
    if path.suffix in (".safetensors", ".gguf"):
        return "weights", compare_weights
    if path.name == "report.json":
        return "report", compare_report
    if path.suffix == ".yaml":
        return "settings", compare_settings
    if path.name == "config.json":
        return "config", compare_config
    return None if path.name == "README.md" or path.suffix == ".png" else ("other files", compare_bytes)


def compare_run(job: Job, old: Path, new: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(thing, number compared, differences) of a finished run."""
    first, second = told(old, job), told(new, job)
    yield "exit codes", len(job.lines), [*differences(first["exit"], second["exit"]), *failures(first, second)]
    if any(first["exit"]):
        return
    a, b = old / job.recipe / job.name, new / job.recipe / job.name
    yield "names of files", len(left_in(a)), list(differences(*(dict.fromkeys(left_in(x), 1) for x in (a, b))))
    found: dict[str, list] = {}
    for name in (name for name in left_in(a) if (b / name).exists() and kind_of(name)):
        thing, compare = kind_of(name)
        found.setdefault(thing, []).append([f"{name}  {wrong}" for wrong in compare(a / name, b / name)])
    for thing, lists in found.items():
        yield thing, len(lists), sum(lists, [])
    said = [
        {line: text.splitlines() for line, text in zip(job.lines, x["stdout"], strict=True) if not timed(line)}
        for x in (first, second)
    ]
    if said[0]:
        yield "printed", len(said[0]), list(differences(*said))


def timed(line: str) -> bool:
    """Whether a command prints seconds."""
    return " --output " in line and "--dry_run" not in line


def failures(old: dict, new: dict) -> Iterator[str]:
    """The last words of lines that should have worked."""
    for side, said in (("old", old), ("new", new)):
        for line, code, error in zip(said["lines"], said["exit"], said["stderr"], strict=True):
            if code:
                yield f"{side}, exit {code}, {line}:\n    " + "\n    ".join(error.splitlines()[-12:])


def compare_refusal(job: Job, old: Path, new: Path) -> list[str]:
    """Exit code, sentence and what is left of a line that should be refused."""
    seen = []
    for folder in (old, new):
        said, place = told(folder, job), folder / job.recipe / job.name
        sentence = " ".join(said["stderr"][0].rpartition("error: ")[2].replace(str(place), ".").split())
        left = [name for name in left_in(place) if name not in job.files]
        seen.append({"exit": said["exit"][0], "says": sentence, "leaves": left})
    flags = job.lines[0].rpartition(" --output out")[2] or job.lines[0]
    return [f"{job.name}: {flags.strip()}\n    {wrong}" for wrong in differences(*seen)]


def flags_of(text: str) -> dict[str, str]:
    """{flag: its line} of a help text, and the rest under the line's own words."""
    found, flag = {}, ""
    for line in text.splitlines():
        if line.startswith(" " * 10) and flag:
            found[flag] += " " + line.strip()
        elif not line.startswith("usage: python -m recipes") or "<name>" in line:
            flag = line.split(",")[0].split()[0] if line.strip().startswith("-") else line
            found[flag] = " ".join(line.split())
    return found


def compare_flags(job: Job, old: Path, new: Path) -> tuple[int, list[str]]:
    """Every flag with its default, choices and help, in whatever order."""
    texts = [{line: flags_of(x) for line, x in zip(job.lines, told(f, job)["stdout"], strict=True)} for f in (old, new)]
    return sum(map(len, texts[0].values())), list(differences(*texts))


def compare(chosen: list[Job], old: Path, new: Path) -> int:
    """Prints what was compared, then the differences; returns their number."""
    lines: list[tuple[str, int, list[str]]] = []
    for job in (job for job in chosen if not job.refused):
        if job.name == "flags":
            lines.append((job.key, *compare_flags(job, old, new)))
        else:
            lines += [(f"{job.key}, {thing}", n, wrong) for thing, n, wrong in compare_run(job, old, new)]
    for recipe in dict.fromkeys(job.recipe for job in chosen if job.refused):
        refused = [compare_refusal(job, old, new) for job in chosen if job.refused and job.recipe == recipe]
        lines.append((f"{recipe}: refusals", len(refused), sum(refused, [])))
    for what, number, wrong in lines:
        print(f"{what:60} {number:5}  {f'{len(wrong)} DIFFERENCES' if wrong else 'equal'}")
    for what, _, wrong in lines:
        if wrong:
            print(f"\n{what}: old -> new", *wrong[:SHOWN], sep="\n  ")
            if len(wrong) > SHOWN:
                print(f"  … and {len(wrong) - SHOWN} more")
    return sum(len(wrong) for _, _, wrong in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what this tree is compared with")
    parser.add_argument(
        "--recipe", nargs="+", action="extend", help="these recipes only; `aside` stands for the other commands"
    )
    parser.add_argument("--keep", type=Path, help="folder for inputs and outputs")
    flags = parser.parse_args(arguments)
    resolve = ["git", "-C", str(TREE), "rev-parse", "--verify", "--short=12", f"{flags.commit}^{{commit}}"]
    commit = subprocess.run(resolve, check=True, capture_output=True, text=True).stdout.strip()
    everything = jobs()
    chosen = [job for job in everything if not flags.recipe or job.recipe in flags.recipe]
    with tempfile.TemporaryDirectory() as temporary:
        root = (flags.keep or Path(temporary)).resolve()
        places = {"inputs": root / "inputs", "old": root / commit}
        sys.path.insert(0, str(TREE))  # wins over what is installed
        if not places["inputs"].exists():
            make_inputs(places["inputs"])
        waiting = [job for job in with_needs(chosen, everything) if told(places["old"], job) is None]
        if waiting:
            print(f"running {len(waiting)} jobs of {commit}", flush=True)
            with worktree(commit) as tree:
                run_jobs(tree, waiting, places["old"], places)
        print(f"running {len(chosen)} jobs of this tree", flush=True)
        run_jobs(TREE, chosen, root / "new", places)
        if compare(chosen, places["old"], root / "new"):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
