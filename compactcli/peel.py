"""Takes the weights out of what training scripts wrap around them, and their names out of prefixes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from .errors import CompactError, short
from .pickles import HARMLESS, Call

# Where training scripts put the weights, the best ones first.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema")
WRAPPERS = (
    *AVERAGED,
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "base_model.")
INNER = ("features.", "module.")  # a part wrapped in DataParallel, as torchvision's old training script does
LIGHTNING = "pytorch-lightning_version"  # what says that a checkpoint is of a Lightning module
# What else lies beside weights: numbers of the training run, and what AveragedModel and thop leave behind.
NUMBERS = frozenset({"acc", "acc1", "best_acc", "best_acc1", "best_prec1", "epoch", "loss", "step"})
AVERAGES = frozenset({"n_averaged"})
COUNTERS = frozenset({"total_ops", "total_params"})


T = TypeVar("T")


class NeedsTrustError(CompactError):
    """The tensors are inside an object that only unpickling can open."""


def peel(tree: Any) -> tuple[dict[str, Any], list[str]]:
    """Name -> tensor without the wrappers, leftovers and prefixes that training scripts add; a note for each.

    Raises CompactError if there are no tensors, saying what there is instead.
    """
    table, path = _unwrap(tree, set()) or ({}, [])
    entries = {name: value for name, value in table.items() if name.rpartition(".")[2] not in COUNTERS}
    if not entries:
        raise _nothing(tree)
    notes = []
    if path:
        beside = [key for key in tree if isinstance(key, str) and key != path[0]]
        others = f" (beside {_some(beside)})" if beside else ""
        notes.append(f"took {' / '.join(short(name) for name in path)}{others}")
    if len(entries) < len(table):
        notes.append(f"dropped {len(table) - len(entries)} counters that thop left behind (total_ops, total_params)")
    if beside := _beside_network(tree, list(entries)):
        notes.append(f"dropped what lies beside the network: {_some(beside)}")
        dropped = set(beside)
        entries = {name: value for name, value in entries.items() if name not in dropped}
    if prefix := shared_prefix(list(entries)):
        notes.append(f"stripped the prefix {prefix} from all {len(entries)} names")
    entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    if wrapped := _wrapped(list(entries)):
        notes.append(f"took module. out of {len(wrapped)} names that begin with {''.join(INNER)}")
    return {wrapped.get(name, name): value for name, value in entries.items()}, notes


def _wrapped(names: list[str]) -> dict[str, str]:
    """The names in a part that is wrapped as a whole, and what they are without the wrapper."""
    outer, inner = INNER
    inside = [name for name in names if name.startswith(outer)]
    if not all(name.startswith(outer + inner) and name != outer + inner for name in inside):
        return {}
    return {name: outer + name.removeprefix(outer + inner) for name in inside}


def _beside_network(tree: Any, names: list[str]) -> list[str]:
    """The tensors of a Lightning module, losses and metrics, that are not of the network in it, which holds most of them."""
    if LIGHTNING not in tree:
        return []
    outside = ([name for name in names if not name.startswith(prefix)] for prefix in PREFIXES)
    return next((others for others in outside if 2 * len(others) < len(names)), [])


def shared_prefix(names: Iterable[str]) -> str:
    """The longest run of PREFIXES that all names begin with and something follows; those of NUMBERS may have none."""
    names = [name for name in names if name not in NUMBERS]
    shared = ""
    for _ in range(8):  # wrappers nest a few times; a hostile name could hold a million prefixes
        for prefix in PREFIXES:
            longer = shared + prefix
            if names and all(name.startswith(longer) and name != longer for name in names):
                shared = longer
                break
    return shared


def without_path(tensors: Mapping[str, T]) -> Mapping[str, T]:
    """The tensors without the modules that all names begin with; the same mapping where they share none."""
    shared: list[str] = next(iter(tensors), "").split(".")[:-1]
    for name in tensors:
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shared, name.split(".")[:-1], strict=False))
        shared = [part for part, _ in alike]
    if not shared:
        return tensors
    length = len(".".join(shared)) + 1
    return {name[length:]: tensor for name, tensor in tensors.items()}


def _unwrap(tree: Any, seen: set[int]) -> tuple[dict[str, Any], list[str]] | None:
    """The tensors in a tree and the keys that lead to them; None if there are none. `seen`: tables known to have none.

    NUMBERS alone are none; beside others they may be the network's own, as its names will show.
    """
    if not isinstance(tree, dict) or id(tree) in seen:
        return None
    seen.add(id(tree))
    found = {name: inner for name in WRAPPERS if (inner := _unwrap(tree.get(name), seen))}
    if found:
        sizes = {name: _size(weights) for name, (weights, _) in found.items()}  # averages may be of parameters alone
        name = next(name for name in found if name not in AVERAGED or sizes[name] == max(sizes.values()))
        return found[name][0], [name, *found[name][1]]
    if weights := _weights(tree):
        return weights, []
    # Under no name we know: then the only table of tensors. By identity, since a hostile tree may name one a million times.
    tables = {id(value): key for key, value in tree.items() if isinstance(value, dict) and id(value) not in seen}
    unnamed = {key: weights for key in tables.values() if (weights := _weights(tree[key]))}
    seen |= {identity for identity, key in tables.items() if key not in unnamed}
    if len(unnamed) > 1:
        raise CompactError(f"holds several networks ({_some(list(unnamed))}); save the state_dict of one of them")
    return next(((weights, [name]) for name, weights in unnamed.items()), None)


def _weights(tree: dict[Any, Any]) -> dict[str, Any]:
    found = {key: value for key, value in tree.items() if isinstance(key, str) and key not in AVERAGES and is_tensor(value)}
    return found if found.keys() - NUMBERS else {}


def _size(weights: dict[str, Any]) -> int:
    """How many tensors there are that a network cannot do without."""
    return sum(name.rpartition(".")[2] not in COUNTERS | {"num_batches_tracked"} for name in weights)


def is_tensor(value: Any) -> bool:
    """Whether a value in a tree is a tensor, or a call that makes one."""
    return isinstance(value, Tensor) or (isinstance(value, Call) and value.is_tensor)


def _nothing(tree: Any) -> CompactError:
    """Why there are no tensors in a tree."""
    blocked = next((call.function for call in _calls(tree) if call is tree or call.function not in HARMLESS), None)
    if blocked is not None:
        return NeedsTrustError(
            f"holds a pickled object of class {short(blocked)}; only --trust-pickle unpickles it, "
            "which runs code from the file; better: save model.state_dict()"
        )
    if is_tensor(tree):
        return CompactError("holds a single tensor without a name; wanted a state_dict")
    if isinstance(tree, dict):
        keys = _some([key for key in tree if isinstance(key, str)]) or "an empty table"
        return CompactError(f"no tensors in the file, only {keys}; wanted a state_dict")
    return CompactError(f"holds a {type(tree).__name__.strip('_').lower()}; wanted a state_dict")


def _calls(tree: Any) -> Iterator[Call]:
    """The objects in a tree that are no tensors, those under a wrapper's name first."""
    waiting, seen = [tree], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Call) and not item.is_tensor:
            yield item
        elif isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            waiting += [item[key] for key in sorted(item, key=lambda key: key in WRAPPERS)]


def _some(names: list[str]) -> str:
    """The first six names, for a line of text."""
    return ", ".join(short(name) for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
