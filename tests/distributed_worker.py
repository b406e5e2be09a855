"""What one of the processes of tests/test_distributed.py does: `torchrun distributed_worker.py WHAT OUTPUT`."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from networks import named
from test_resume import Dual
from test_train import PREPROCESSING, dataset, network

from compactcli import distributed, train
from compactcli.errors import CompactError
from compactcli.optim import Settings


def main(what: str, output: str) -> None:
    """Train for 20 steps, one an epoch; write the losses and a digest of the weights, a file for each process."""
    torch.set_num_threads(1)
    with distributed.joined("cpu") as device:
        common = {"epochs": 20, "batch_size": 108, "lr": 0.1, "precision": "float32", "device": device, "schedule": "constant"}
        chosen = Settings(
            **common, batch_norm=what if what in ("frozen", "sync") else "train", accumulate=3 if what == "parts" else 1
        )
        if what.startswith("uneven"):  # batches of 15, and a rest of 3 that is too small to share
            how = "sync" if what == "uneven sync" else "frozen"
            chosen = replace(chosen, batch_norm=how, batch_size=15, epochs=3, accumulate=2, ema=0.5)
        if what == "different" and distributed.rank() == 1:
            model = network(classes=4, dropout=0)
        elif what == "residual":
            torch.manual_seed(0)
            model, chosen = named("cifar:resnet8", width=4, num_classes=3), Settings(**common, batch_norm="sync")
        else:
            model = network(dropout=0)
        hook = Dual() if what == "hook" else None
        try:
            history = train.fit_(model, dataset(), PREPROCESSING, chosen, hooks=[hook] if hook else [], keep="last")
        except CompactError as problem:
            found = {"error": str(problem)}
        else:
            tensors = [*model.state_dict().values(), *([hook.dual] if hook else [])]
            digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
            found: dict[str, object] = {"losses": [record.loss for record in history.epochs[1:]], "weights": digest}
            found["accuracy"] = [record.accuracy for record in history.epochs]
        rank = distributed.rank()
    found["threads"] = communicating()
    Path(f"{output}.{rank}").write_text(json.dumps(found))


def communicating() -> list[str]:
    """The threads of gloo that this process has, where the system tells."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    main(*sys.argv[1:])
