"""Our packed bits against llama.cpp: a 1 B model of random weights, decoded on as many threads. `make bench-peers`, or

python -m recipes.bench.peers [--output runs/bench-peers.json]

llama.cpp runs Q4_0 and Q8_0 (32 weights share a scale), we 4 and 8 bits in groups of 128; both store every matrix so, the
head included. Each run is a process of its own, and both take turns: only ratios within a round are compared. Decoding
starts after 32 tokens; prefill is a prompt of 512. "compiled" is torch.compile with a cache of fixed length: 500 modules
take longer to call from Python than llama.cpp's graph takes to walk. What fails is not tried again: its rows say why, and
the others go on. `make bench-peers` builds llama.cpp without its AMX code, which dies of SIGILL where a second thread may
not use the tiles; one that was built before has to be removed first.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch

from recipes.bench.models import ONE_B
from recipes.bench.rounds import run_apart, write_rows

PAIRS = {"packed_4": "Q4_0", "packed_8": "Q8_0"}
COMPILED = "{}, compiled"
BLOCK = 32  # weights that share a scale in both formats of llama.cpp
BYTES = {"Q4_0": 18, "Q8_0": 34}  # of a block: an fp16 scale, then the codes
STEP = {"Q4_0": 0.005, "Q8_0": 0.0003}  # scales that give weights of a standard deviation near 0.02
NEW_TOKENS = 24


def write_gguf(path: Path, kind: str) -> None:
    """The 1 B model of `recipes.bench.models` with random codes of one type."""
    config, writer, random = ONE_B, gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = config.num_key_value_heads * hidden // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")  # llama.cpp does not start without a vocabulary
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)

    def add(name: str, d_out: int, d_in: int) -> None:
        blocks = random.integers(0, 256, (d_out, d_in // BLOCK, BYTES[kind]), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(STEP[kind]).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(d_out, -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd.weight", config.vocab_size, hidden)
    add("output.weight", config.vocab_size, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config.num_hidden_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, d_out, d_in in (
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{layer}.{name}.weight", d_out, d_in)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_cpp(path: Path, repeats: int = 3) -> dict[str, float]:
    """Seconds per decoded token and of the prompt, medians, as `recipes.bench.models.run_model` measures ours."""
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(path), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    decode, prefill = [], []
    for _ in range(repeats):
        model.reset()
        model.eval(list(range(3, 35)))
        begin = time.perf_counter()
        for token in range(NEW_TOKENS):
            model.eval([100 + token])
        decode.append((time.perf_counter() - begin) / NEW_TOKENS)
        model.reset()
        begin = time.perf_counter()
        model.eval(list(range(3, 515)))
        prefill.append(time.perf_counter() - begin)
    return {"decode": statistics.median(decode), "prefill": statistics.median(prefill)}


def commands(scratch: Path) -> dict[str, list]:
    """{name: module and flags} of every measurement of a round; writes the models that llama.cpp reads."""
    found = {}
    for ours, theirs in PAIRS.items():
        print(f"writing a model of {theirs}", flush=True)
        write_gguf(scratch / theirs, theirs)
        found[ours] = ["recipes.bench.models", "--model", ours, "--tokens", NEW_TOKENS]
        found[COMPILED.format(ours)] = [*found[ours], "--compiled"]
        found[theirs] = ["recipes.bench.peers", "--run", scratch / theirs]
    return found


def attempt(command: list) -> dict[str, float] | str:
    """What a measurement in its own process gives, or in a few words why it gives nothing."""
    try:
        return run_apart(*command)
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:
            return f"ended by {signal.Signals(-error.returncode).name}"
        return (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (IndexError, ValueError):
        return "printed no numbers"


def compare(rounds: int) -> list[dict]:
    """A row for each phase of each pair: tokens per second of both, the ratio in every round, and what failed."""
    runs: dict[str, list[dict]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        turns = commands(Path(scratch))
        for index in range(rounds):
            for name in [name for name in turns if name not in failed]:
                print(f"round {index + 1}/{rounds}  {name:20}", end=" ", flush=True)
                found = attempt(turns[name])
                if isinstance(found, str):
                    failed[name] = found
                    print(f"failed: {found}", flush=True)
                    continue
                runs.setdefault(name, []).append(found)
                print(f"{1e3 * found['decode']:.1f} ms a token, {found['prefill']:.2f} s a prompt", flush=True)
    return [
        row(phase, tokens, (kind, theirs), runs, failed)
        for ours, theirs in PAIRS.items()
        for phase, tokens, kind in (("decode", 1, ours), ("decode", 1, COMPILED.format(ours)), ("prefill", 512, ours))
    ]


def row(phase: str, tokens: int, pair: tuple[str, str], runs: dict[str, list[dict]], failed: dict[str, str]) -> dict:
    """`failed` has {name: why} of those of the pair that did; what they measured before is kept."""
    seconds = {name: [run[phase] for run in runs.get(name, [])] for name in pair}
    ours, theirs = seconds.values()
    return {
        "phase": phase,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items() if values},
        "speed_over_llama_cpp": [b / a for a, b in zip(ours, theirs, strict=False)],
        "failed": {name: failed[name] for name in pair if name in failed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-peers.json"))
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run:
        print(json.dumps(run_llama_cpp(flags.run)))
        return
    rows = compare(flags.rounds)
    for found in rows:
        parts = [f"{name} {speed:.1f} tokens/s" for name, speed in found["tokens_per_second"].items()]
        parts += [f"{name} failed: {why}" for name, why in found["failed"].items()]
        if found["speed_over_llama_cpp"]:
            ratios = " ".join(f"{ratio:.2f}x" for ratio in found["speed_over_llama_cpp"])
            parts.append(f"ours over llama.cpp, round by round: {ratios}")
        print(f"{found['phase']:8} {'  '.join(parts)}")
    write_rows(rows, flags.output)


if __name__ == "__main__":
    main()
