"""Forward and backward pass of a training step: plainly, or recorded once as a CUDA graph and replayed."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import distributed, optim
from .errors import CompactError
from .graph import scores
from .optim import Settings

Gradient = Callable[[Tensor, Tensor, int], Tensor]

WARM_UP = 3  # steps before the recorded one: libraries choose their kernels and take their memory in them


def of(network: nn.Module, teacher: nn.Module | None, settings: Settings) -> Gradient:
    """What computes the network's gradients."""
    plain = Plain(network, teacher, settings)
    if not settings.cuda_graphs:
        return plain
    return Recorded(plain, network, settings.batch_size, torch.device(settings.device))


class Plain:
    """The gradients of the mean loss over a batch of all processes."""

    def __init__(self, network: nn.Module, teacher: nn.Module | None, settings: Settings) -> None:
        self.network, self.teacher, self.settings = network, teacher, settings

    def __call__(self, inputs: Tensor, labels: Tensor, of_all: int) -> Tensor:
        """Add them to the parameters' for this process's part of a batch of so many images; its share of that mean.

        `inputs` are normalised (n, c, h, w), `labels` (n,).
        """
        processes = distributed.sharers(of_all)
        images = of_all * distributed.world_size() // processes  # each takes all of a batch that is too small to share
        count = max(1, min(self.settings.accumulate, of_all // processes // 2))  # as many parts in every process
        total = torch.zeros((), device=inputs.device)
        for number, (part, wanted) in enumerate(zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True), 1):
            with distributed.unsynchronised(self.network) if number < count else nullcontext():
                with optim.autocast(self.settings):
                    with torch.no_grad():  # first, and on images of its own: either may write into what it is given
                        targets = None if self.teacher is None else scores(self.teacher(part.clone()))
                    outputs = scores(self.network(part))
                loss = optim.loss(outputs, wanted, targets, self.settings) * (len(part) / images)
                (loss * distributed.world_size()).backward()  # type: ignore[no-untyped-call]  # DDP takes the mean
            total += loss.detach()
        return total


class Recorded:
    """The same, as a CUDA graph: where Python takes longer than the GPU, a step then takes as long as the GPU does.

    Smaller batches, as at an epoch's end, are computed plainly. A graph reads parameters and leaves gradients where they were
    when it was recorded: where parameters have been moved since, it is recorded anew. What the network chooses on the CPU stays
    as it was then; dropout and the like draw on the GPU, anew in each step.
    """

    graph: torch.cuda.CUDAGraph

    def __init__(self, plain: Gradient, network: nn.Module, batch_size: int, device: torch.device) -> None:
        self.plain, self.batch_size = plain, batch_size
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.warm = 0
        self.places: list[int] = []  # of the parameters when the graph was recorded

    def __call__(self, inputs: Tensor, labels: Tensor, of_all: int) -> Tensor:
        """As `Plain`; the gradients must have been set to none before. Raises CompactError if the step cannot be recorded."""
        if len(inputs) != self.batch_size:
            return self.plain(inputs, labels, of_all)
        if self.warm < WARM_UP:
            self.warm += 1
            return self.beside(inputs, labels, of_all)
        if self.places != self.where():
            self.record(inputs, labels, of_all)
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss

    def beside(self, inputs: Tensor, labels: Tensor, of_all: int) -> Tensor:
        """Plainly, on the stream that is recorded later."""
        self.stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(self.stream):
            loss = self.plain(inputs, labels, of_all)
        torch.cuda.current_stream(inputs.device).wait_stream(self.stream)
        return loss

    def record(self, inputs: Tensor, labels: Tensor, of_all: int) -> None:
        """Note down what a step does; nothing is computed yet."""
        self.inputs, self.labels, graph = inputs.clone(), labels.clone(), torch.cuda.CUDAGraph()
        own = torch.cuda.current_stream(inputs.device)
        try:
            with torch.cuda.stream(own), torch.cuda.graph(graph, stream=self.stream):  # back to it after a failure as well
                self.loss = self.plain(self.inputs, self.labels, of_all)
        except RuntimeError as problem:
            first: BaseException = problem  # of which the end of the recording says only that there was one
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).partition("\n")[0]
            raise CompactError(f"--cuda-graphs: a step of this network cannot be recorded ({reason}); leave it out") from None
        self.graph, self.gradients, self.places = graph, [parameter.grad for parameter in self.parameters], self.where()

    def where(self) -> list[int]:
        """Where the parameters are in memory."""
        return [parameter.data_ptr() for parameter in self.parameters]
