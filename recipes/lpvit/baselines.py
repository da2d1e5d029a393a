"""What LPViT is compared with: what each baseline changes of the flags, and the baselines that remove single weights."""

from __future__ import annotations

from recipes.lpvit.selection import magnitude_masks, wanda_masks

L1 = {"rank": "l1", "power_mode": "off", "rounds": 1, "reconstruct": "none"}
BASELINES = {
    "lpvit-no-ls": {"reconstruct": "none"},
    "lpvit-one-round": {"rounds": 1},
    "uniform-l1": L1 | {"alloc": "uniform"},
    "uniform-l1+ls": L1 | {"alloc": "uniform", "reconstruct": "ls"},
    "global-l1": L1 | {"alloc": "global"},
    "block-lamp": L1 | {"alloc": "lamp"},
    "block-erk": L1 | {"alloc": "erk"},
    "global-fisher": {
        "target_fn": "out",
        "rank": "fisher",
        "alloc": "global",
        "power_mode": "off",
        "reconstruct": "none",
    },
    "global-fisher+ls": {
        "target_fn": "out",
        "rank": "fisher",
        "alloc": "global",
        "power_mode": "off",
        "reconstruct": "ls",
    },
    "lpvit-code": {
        "target_fn": "sq",
        "rank": "taylor",
        "alloc": "derivative",
        "power_mode": "official",
        "rounds": 1,
        "reconstruct": "none",
        "mask_rank": "l1",
    },
}
UNSTRUCTURED = {"magnitude": magnitude_masks, "wanda": wanda_masks}
SWEPT = ("lpvit-no-ls", "uniform-l1", "uniform-l1+ls", "global-l1", "global-fisher", "global-fisher+ls")
