"""The loop that trains: what it refuses before any work."""

import pytest
import torch
from PIL import Image

from recipes.common.core.cli import main


def test_a_folder_where_the_dense_model_would_go_is_not_touched(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in ("left", "right"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(12):
                pixels = torch.randint(0, 255, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / name / f"{index}.png")
    precious = tmp_path / "out-dense" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    flags = ["--dataset", str(tmp_path / "images"), "--output", str(tmp_path / "out"), "--epochs", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["precropping", *flags])
    assert stopped.value.code == 2 and "pass --overwrite to replace it" in capsys.readouterr().err
    assert precious.read_text() == "mine" and not list(tmp_path.glob("out*state"))
