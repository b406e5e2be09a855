"""What methods share: the layers that they may take, how these meet a budget of parameters, and are left plain by a search."""

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.utils import parametrize

from ..allocate import Choice, allocate
from ..budget import Budget
from ..errors import CompactError
from ..kernels import KernelLayer
from ..layers import Layer


def eligible(model: nn.Module, found: Iterable[Layer]) -> list[Layer]:
    """Those of the layers that may be others: plain convolutions of at least two filters, whose weights nothing else reads."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    result = []
    for layer in found:
        module = model.get_submodule(layer.name)
        plain = type(module) is nn.Conv2d and "weight" in module._parameters and names[id(module.weight)] == 1
        if plain and layer.called and not layer.fixed and layer.shape[0] >= 2:
            result.append(layer)
    return result


def like(old: nn.Module) -> nn.Conv2d:
    """The plain convolution in whose place a layer comes. Raises CompactError where there is none."""
    if isinstance(old, KernelLayer):
        return old.hollow()
    if not isinstance(old, nn.Conv2d):
        raise CompactError(f"the recipe makes the kernel of a {type(old).__name__}, which has none")
    return old


def dense(layer: nn.Module) -> nn.Module:
    """The plain convolution that a layer is equal to."""
    assert isinstance(layer, KernelLayer)
    return layer.dense()


def meet(
    budget: Budget,
    choices: Sequence[Choice],
    method: str,
    what: str = "store as fewer numbers",
    *,
    refitted: Sequence[Layer] = (),
) -> list[int]:
    """Which of its forms each part of the network takes, so that the whole meets the budget; the first is what it has now.

    Costs are in what the budget counts. Where the parts are layers that will be `refitted`, errors count by what is then left
    of them (`Budget.left`). Raises CompactError if there is nothing to choose, or the target is out of reach.
    """
    if all(len(each.costs) < 2 for each in choices):
        raise CompactError(f"there are no convolutions here that {method} could {what}; `compactcli methods` lists others")
    fixed = float(budget.cost(budget.along(), budget.ranks())) - sum(float(each.costs[0]) for each in choices)
    least = fixed + sum(float(each.costs.min()) for each in choices)
    if least > budget.target and not budget.nearest:
        raise budget.out_of_reach(least)
    room = max(budget.target, least) - fixed
    chosen = allocate(choices, room)
    if least > budget.target and not any(chosen):
        raise CompactError(f"{method} could make nothing here smaller: each layer is as small as its smallest form")
    if not refitted:
        return chosen
    left = budget.left(sum(float(each.errors[form]) for each, form in zip(choices, chosen, strict=True)))
    shares = [float(left[budget.layers.index(layer)]) for layer in refitted]
    return allocate([Choice(each.costs, own * each.errors) for each, own in zip(choices, shares, strict=True)], room)


def unparametrize_(module: nn.Module, order: Sequence[str]) -> None:
    """Leave a module's own parameters plain, with the values that their parametrizations make, in that order."""
    for name in order:
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name)
    for name in order:
        module._parameters[name] = module._parameters.pop(name)
