"""What one of the processes of tests/test_distributed.py does: `torchrun distributed_worker.py FOLDER WHAT ...`."""

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


def main(folder: str, *every: str) -> None:
    """Write what each of them found, and the threads that were left in the end, a file for each process."""
    torch.set_num_threads(1)
    with distributed.joined("cpu") as device:
        found = {what: trained(what, device) for what in every}
        rank = distributed.rank()
    for name, value in {**found, "threads": communicating()}.items():
        (Path(folder) / f"{name}.{rank}").write_text(json.dumps(value))


def trained(what: str, device: str = "cpu") -> dict[str, object]:
    """Train for 20 steps, one an epoch: the losses and a digest of the weights."""
    common = {"epochs": 20, "batch_size": 108, "lr": 0.1, "precision": "float32", "device": device, "schedule": "constant"}
    batch_norm = what if what in ("frozen", "sync") else "train"
    chosen = Settings(**common, batch_norm=batch_norm, accumulate=3 if what == "parts" else 1)
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
        return {"error": str(problem)}
    tensors = [*model.state_dict().values(), *([hook.dual] if hook else [])]
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
    losses, accuracies = ([getattr(record, each) for record in history.epochs] for each in ("loss", "accuracy"))
    return {"losses": losses[1:], "weights": digest, "accuracy": accuracies}


def communicating() -> list[str]:
    """The threads of gloo that this process has, where the system tells."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    main(*sys.argv[1:])
