"""What a row of `finetune` is the result of: a contender, and how it was trained."""

import re
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from compactcli.optim import Settings


class Way(NamedTuple):
    """How a contender of ours is made."""

    method: str
    options: tuple[str, ...] = ()
    searched: bool = False


OURS = {
    "auto": Way("hinge", ("mode=auto",), searched=True),
    "prune": Way("hinge", ("mode=prune",), searched=True),
    "decompose": Way("hinge", ("mode=decompose",), searched=True),
    "calibrated": Way("hinge", ("mode=auto",)),
    "fcf": Way("fcf", searched=True),
    "magnitude": Way("fcf"),
    "linearconv": Way("linearconv"),
    "csg": Way("csg"),
    "hetconv": Way("hetconv"),
}
PEERS = ("peer", "peer-norm")
CONTENDERS = (*OURS, *PEERS, "control")
SEARCHED = {"peer", *(name for name, way in OURS.items() if way.searched)}
KEPT = Path(tempfile.gettempdir()) / "compactcli-finetune"  # of runs that have not ended


@dataclass(frozen=True)
class Run:
    """What a row is the result of."""

    contender: str
    ratio: float
    search_epochs: int = 5
    epochs: int = 20  # search and fine-tuning together
    lr: float | None = None  # peak, of ours in both stages and of the peer's fine-tuning; None: that of the commands
    weight_decay: float = 1e-4  # of all but the peer's sparse learning
    seed: int = 0
    limit: int | None = None  # images of each split
    set: tuple[str, ...] = ()  # further options of hinge
    peer_lr: float = 0.01  # of its sparse learning
    peer_reg: float = 5e-4
    network: str = field(default="resnet20", compare=False)  # each has a file of its own
    device: str = field(default="cpu", compare=False)

    @property
    def flags(self) -> list[str]:
        """Those that say how it was trained, where these are not the defaults."""
        own = [(item.name, getattr(self, item.name)) for item in fields(self)[2:] if item.compare]
        told = {name: " ".join(value) if name == "set" else value for name, value in own if value != getattr(Run, name)}
        return [f"--{name.replace('_', '-')} {value}" for name, value in told.items()]

    @property
    def key(self) -> str:
        return " ".join([f"{self.contender} {self.ratio:g}", *self.flags])

    @property
    def file(self) -> Path:
        """Where the run is kept, but for the stage and the ending."""
        return KEPT / re.sub(r"[^\w.=-]+", "_", f"{self.network} {self.key}")

    def settings(self, epochs: int, **others: Any) -> Settings:
        own = {name: getattr(self, name) for name in ("lr", "weight_decay", "seed", "device")}
        return Settings(**{"epochs": epochs, "cuda_graphs": self.device != "cpu", **own, **others})

    def of(self, contender: str) -> "Run":
        """The run of another contender to compare with: alike, but for the flags that do not concern it."""
        own: dict[str, Any] = {} if contender in SEARCHED else {"search_epochs": Run.search_epochs}
        own |= {} if contender in OURS else {"set": Run.set}
        own |= {} if contender == "peer" else {"peer_lr": Run.peer_lr, "peer_reg": Run.peer_reg}
        own |= {"ratio": 1.0} if contender == "control" else {}
        return replace(self, contender=contender, **own)
