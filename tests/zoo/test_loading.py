"""A checkpoint in a fresh environment with torch and transformers only: the bundled code gives the same model."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from tiny_models import Packing, make_base
from transformers import AutoModelForCausalLM

from zoo.record.card import loading

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
CACHE = {"method": "kvtuner", "version": 1, "mode": "kivi", "group_size": 8, "residual_length": 8}
CACHE["layers"] = [[4, 2], [8, 4]]
FAMILIES = {"llama": "armor", "qwen2": "ragged", "qwen3": (4, 3), "gemma3_text": "2:4"}


def needed_by(*names: str) -> dict[str, Distribution]:
    """The distributions that installing `names` brings, as they are installed here."""
    found, wanted = {}, list(names)
    while wanted:
        requirement = Requirement(wanted.pop())
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and requirement.name not in found:
            found[requirement.name] = distribution(requirement.name)
            wanted += found[requirement.name].requires or []
    return found


@pytest.fixture(scope="module")
def foreign_python(tmp_path_factory) -> Path:
    """The interpreter of a new environment that has our torch, transformers and what these need, and no slimzoo."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in needed_by("torch", "transformers").values():
        for top in {file.parts[0] for file in package.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():  # two may share a folder
                (site / top).symlink_to(package.locate_file(top))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family, each with the logits and greedy tokens that the installed slimzoo computes."""
    root, folders = tmp_path_factory.mktemp("checkpoints"), {}
    for family, kind in FAMILIES.items():
        packing = Packing(make_base(root / f"base-{family}", family), kind, head_bits=6 if family == "qwen3" else None)
        settings = {"kv_cache_quantization": CACHE} if family == "qwen3" else {}  # its tokens come from packed codes
        folders[family] = packing.write(root / f"slim-{family}", settings=settings)
        model = AutoModelForCausalLM.from_pretrained(folders[family])
        with torch.no_grad():
            logits = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=8)
        save_file({"logits": logits, "tokens": tokens}, root / f"wanted-{family}.safetensors")
    return folders


@pytest.fixture
def run(foreign_python, tmp_path):
    """Run a script isolated from this environment, offline, with an empty cache; the completed process, text."""

    def run(script: str, *arguments) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf-home")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [foreign_python, "-I", "-c", script, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def succeed(process: subprocess.CompletedProcess) -> dict:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


LOAD = """
import builtins, json, sys
import torch
from importlib.util import find_spec
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

assert find_spec("zoo") is None and find_spec("slimzoo") is None, "slimzoo is importable"
folder, wanted, ids = sys.argv[1], load_file(sys.argv[2]), torch.tensor(json.loads(sys.argv[3]))
builtins.input = lambda text: sys.exit(f"in a terminal it would wait for an answer: {text}")
exec(sys.argv[5])  # the card's own lines
with torch.no_grad():
    logits = model(ids).logits
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)(ids).logits
model.save_pretrained(sys.argv[4])
print(json.dumps({
    "class": f"{type(model).__module__}.{type(model).__name__}",
    "close_logits": torch.allclose(logits, wanted["logits"], rtol=1e-5, atol=1e-5),
    "same_base": torch.equal(model.lm_head(hidden), logits),
    "same_tokens": torch.equal(model.generate(ids, max_new_tokens=8), wanted["tokens"]),
    "cosine": torch.nn.functional.cosine_similarity(half.float(), logits, dim=-1).min().item(),
    "ids": tokenizer("Hi").input_ids,
}))
"""


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_without_slimzoo_with_the_same_logits_and_saves_again(folders, run, family, tmp_path):
    wanted = folders[family].parent / f"wanted-{family}.safetensors"
    again = tmp_path / "again"
    snippet = loading({"pipeline_tag": "text-generation"}, str(folders[family])).split("```")[3].removeprefix("python")
    found = succeed(run(LOAD, folders[family], wanted, json.dumps(IDS.tolist()), again, snippet))
    assert found.pop("class").startswith("transformers_modules.slim_hyphen_")
    assert found.pop("cosine") > 0.999
    assert len(found.pop("ids")) == 2
    assert found == {"close_logits": True, "same_base": True, "same_tokens": True}
    assert shutil.which("c++") is None or any(tmp_path.glob(".cache/slimzoo/kernels/*.so"))  # from the bundled C++
    # What the bundled code saved is the same checkpoint, code included, and loads both ways.
    before, after = load_file(folders[family] / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    code = files(folders[family], "*.py")
    assert code and files(again, "*.py") == code
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(again)(IDS).logits
    torch.testing.assert_close(logits, load_file(wanted)["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_without_consent_it_raises_and_never_loads(folders, run):
    for consent in ("", ", trust_remote_code=False"):
        script = (
            "import sys; from transformers import AutoModelForCausalLM\n"
            f"AutoModelForCausalLM.from_pretrained(sys.argv[1]{consent}); print('LOADED')"
        )
        process = run(script, folders["llama"])
        assert process.returncode == 1 and "LOADED" not in process.stdout
        assert "trust_remote_code=True" in process.stderr.splitlines()[-1]


PLAIN_LOAD = """
import sys; from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True); print('LOADED')
"""


@pytest.mark.slow
def test_a_damaged_folder_is_refused_without_slimzoo_too(folders, run, tmp_path):
    damaged = shutil.copytree(folders["llama"], tmp_path / "damaged")
    (damaged / "slimzoo_layers_armor.py").unlink()
    process = run(PLAIN_LOAD, damaged)
    assert process.returncode == 1 and "LOADED" not in process.stdout
    assert "slimzoo_layers_armor.py" in process.stderr.splitlines()[-1]

    shutil.copy(folders["llama"] / "slimzoo_layers_armor.py", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.wrap_out")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    process = run(PLAIN_LOAD, damaged)
    assert process.returncode == 1 and "LOADED" not in process.stdout
    assert "up_proj.wrap_out is missing" in process.stderr.splitlines()[-1]


BOTH = """
import sys
from transformers import AutoModelForCausalLM, AutoConfig
import torch
ids = torch.arange(6)[None]
remote = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import zoo
local = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(remote).__module__, type(local).__module__, torch.equal(remote(ids).logits, local(ids).logits))
"""


@pytest.mark.slow
def test_bundled_and_installed_code_live_in_one_process(folders, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOTH, str(folders["llama"])]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    remote, local, same = process.stdout.split()
    assert remote.startswith("transformers_modules.") and (local, same) == ("zoo.models.llama", "True")
