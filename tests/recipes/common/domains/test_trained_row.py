"""What a report says of a dense model that the run trained."""

import hashlib

from recipes.common.data.architectures import fresh_model
from recipes.common.domains.classification import Classification


def test_the_row_of_a_trained_model_holds_for_one_file_and_for_several(tmp_path):
    model = fresh_model("resnet-8-4", ["a", "b"], 8, 0)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 1
    domain = Classification({"model": "resnet-8-4", "dataset": "somewhere"})
    one, several = (domain.trained_row(tmp_path / name) for name in ("one", "several"))
    assert one["sha256"] == hashlib.sha256((tmp_path / "one" / "model.safetensors").read_bytes()).hexdigest()
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert several["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert one["parameters"] == several["parameters"] == model.num_parameters()
