"""A search with dual variables on 2,000 digits, for `benchmarks.kills`: `python -m benchmarks._kills_worker FOLDER`."""

import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from compactcli import architectures, data, train
from compactcli.methods import Method, Progress
from compactcli.optim import Settings
from compactcli.recipe import Preprocessing
from compactcli.resume import Store

SHAPE = (3, 32, 32)


class Search(Method):
    """A copy of every kernel drawn towards zero, and a dual variable that sums up how far the kernel is from it (ADMM)."""

    def __init__(self, model: nn.Module) -> None:
        self.kernels = {name: tensor for name, tensor in model.named_parameters() if tensor.ndim == 4}
        self.copies = {name: tensor.detach().clone() for name, tensor in self.kernels.items()}
        self.duals = {name: torch.zeros_like(tensor) for name, tensor in self.kernels.items()}

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        for name, kernel in self.kernels.items():
            assert kernel.grad is not None
            kernel.grad += 1e-3 * (kernel.detach() - self.copies[name] + self.duals[name])

    def project(self, model: nn.Module, progress: Progress) -> None:
        for name, kernel in self.kernels.items():
            self.copies[name] = nn.functional.softshrink(kernel.detach() + self.duals[name], 1e-3)
            self.duals[name] = self.duals[name] + kernel.detach() - self.copies[name]

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"copy": self.copies, "dual": self.duals}
        return {f"{part}/{name}": tensor for part, own in parts.items() for name, tensor in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name in self.kernels:
            self.copies[name], self.duals[name] = state[f"copy/{name}"].clone(), state[f"dual/{name}"].clone()


def main(folder: Path) -> None:
    """Search, or go on with the search that is in the folder; write the weights and the dual variables."""
    torch.manual_seed(0)
    model = architectures.get("cifar:resnet8", {"width": 8}).build(initialise=True)
    search = Search(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2000, *SHAPE), dtype=torch.uint8, generator=generator)
    split = data.from_tensors(images, torch.arange(2000) % 10, "train")
    dataset = data.Dataset("noise", False, None, split, None)
    settings = Settings(epochs=4, save_every=5)
    store = Store(folder / "run.resume.safetensors", settings.identity(), {})
    train.fit_(model, dataset, Preprocessing((0.5,), (0.25,)), settings, hooks=[search], keep="last", store=store, resume=True)
    plain = {name: tensor.contiguous() for name, tensor in {**model.state_dict(), **search.state_dict()}.items()}
    safetensors.torch.save_file(plain, folder / "out.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
