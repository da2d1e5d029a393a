"""How a recipe scales: a random checkpoint of LLaMA-7B's shape, larger than the memory allowed, and its first blocks
compressed by the very loop that recipes run. `make bench-scale`, or

python -m recipes.bench.scale [--blocks 3] [--folder runs/random-7b]

Prints the peak resident memory, the seconds of a block at STEPS iterations of ARMOR's loop and of its refit, the seconds
of one more of each, and what the whole model would take at the recipe's own numbers of them. Writes 13.5 GB once;
--folder is kept for the next time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from recipes.armor import Armor
from recipes.armor.factorisation import init_nowag, optimise
from recipes.common.loops.streaming import MatrixStore, StreamedModel, compress_blocks
from recipes.common.metrics.memory import peak_rss_bytes
from recipes.common.parts.pruners import normalize
from zoo.folder import atomic_folder

STEPS = 2  # of the loop, and of the refit
SEVEN_B = LlamaConfig(  # LLaMA-2-7B's shape: 6.7 B parameters
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
)


def write_random_model(folder: Path, config: LlamaConfig) -> None:
    """A bf16 checkpoint with one shard per block, so that no more than a block is ever in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".layers.")[-1].split(".")[0] if ".layers." in name else "rest"
        shards.setdefault(block, {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    with atomic_folder(folder) as partial:
        config.save_pretrained(partial)
        index = {}
        for number, shapes in enumerate(tqdm(shards.values(), desc="writing", unit="shard"), 1):
            tensors = {
                name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                if len(shape) > 1
                else torch.ones(shape, dtype=torch.bfloat16)
                for name, shape in shapes.items()
            }
            shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(tensors, partial / shard, metadata={"format": "pt"})
            index |= dict.fromkeys(shapes, shard)
        size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
        (partial / "model.safetensors.index.json").write_text(text)


def compress_first_blocks(folder: Path, recipe: Armor, blocks: int) -> float:
    """Seconds that the first `blocks` blocks take."""
    model = StreamedModel(folder)
    tokens = torch.randint(0, model.config.vocab_size, (recipe.nsamples, recipe.seqlen))
    with tempfile.TemporaryDirectory(dir=folder.parent) as state:
        began = time.perf_counter()
        compress_blocks(
            model,
            tokens,
            recipe.methods(None, seed=0),  # ARMOR asks nothing of its run
            MatrixStore(Path(state)),
            workers=recipe.workers or torch.get_num_threads(),
            blocks=range(blocks),
        )
        return time.perf_counter() - began


def step_seconds(folder: Path, recipe: Armor) -> tuple[float, float]:
    """Seconds of one iteration of the loop, and of one step of the refit, for all matrices of a block, one thread each and
    as many at a time as there are threads. A step of the refit is its product with a d_in x d_in matrix.
    """
    model, loop, refit, threads = StreamedModel(folder), 0.0, 0.0, torch.get_num_threads()
    model.load_block(0)
    torch.set_num_threads(1)
    for module in model.linears(0).values():
        W_bar, _, _ = normalize(module.weight.detach())
        b_out, b_in = recipe.blocks(*W_bar.shape)
        d = torch.ones(W_bar.shape[1])
        factors = init_nowag(W_bar, d, b_out, b_in, 2, 4)
        began = time.perf_counter()
        optimise(factors, W_bar, d, recipe, torch.Generator().manual_seed(0))
        loop += (time.perf_counter() - began) / recipe.iters
        Q = torch.rand(W_bar.shape[1], W_bar.shape[1])
        began = time.perf_counter()
        W_bar @ Q
        refit += time.perf_counter() - began
    torch.set_num_threads(threads)
    return loop / threads, refit / threads


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="blocks to compress")
    parser.add_argument("--folder", type=Path, default=Path("runs/random-7b"), help="the random model, made if missing")
    flags = parser.parse_args()
    if not flags.folder.exists():
        flags.folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(flags.folder.parent).free < 16e9:
            raise SystemExit(f"error: {flags.folder} needs 16 GB of disk; name another --folder.")
        write_random_model(flags.folder, SEVEN_B)
    size = sum(path.stat().st_size for path in flags.folder.glob("*.safetensors"))
    print(f"{flags.folder}: {size / 1e9:.1f} GB on disk")
    recipe = Armor(iters=STEPS, curve=[], refit_rounds=1, refit_steps=STEPS, baselines=["none"])
    seconds = compress_first_blocks(flags.folder, recipe, flags.blocks) / flags.blocks
    peak = peak_rss_bytes()
    print(f"peak resident memory over {flags.blocks} blocks: {peak / 2**30:.2f} GiB", flush=True)
    loop, refit = step_seconds(flags.folder, recipe)
    steps = 2 * Armor.refit_steps * Armor.refit_rounds  # of S and of B; the new masks after the first are not in it
    rest = seconds - STEPS * (loop + 2 * refit)
    print(f"a block takes {rest:.0f} s, {loop:.1f} s per iteration and {refit:.1f} s per step of the refit")
    block = rest + Armor.iters * loop + steps * refit
    hours = math.ceil(SEVEN_B.num_hidden_layers * block / 360) / 10
    print(
        f"projected: {SEVEN_B.num_hidden_layers} blocks at {Armor.iters} iterations and {steps} steps in"
        f" {hours:.1f} hours"
    )


if __name__ == "__main__":
    main()
