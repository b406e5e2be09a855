"""Networks whose file holds half as many bytes for each number: what they are rounded to, and what that costs."""

import math
from collections.abc import Callable
from dataclasses import replace

from . import __version__, artefact, data, measure, report
from .artefact import Network
from .recipe import Measures, Step
from .report import Evaluated


def cast_(
    network: Network,
    dtype: str,
    dataset: data.Dataset | None = None,
    *,
    before: Evaluated | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> Network:
    """Round a network in place to what its file will hold in a dtype (`recipe.DTYPES`); the same network, one step on.

    It is computed in float32 as before: what is read from the file is this network, bit for bit. Tensors with values beyond
    the dtype's range stay as they are. With a dataset its accuracy is measured; `before` is what it was, where that is known.
    Raises CompactError if a weight is not finite, or there are no labels.
    """
    artefact.check_finite(network)
    if dataset is not None and before is None:
        before = report.evaluate(network, dataset, batch_size=batch_size, device=device)
    shape, outputs = network.input_shape, measure.probed(network.module, network.input_shape)
    whole = _round_(network, dtype)
    if whole:
        log(f"{dtype}: {whole[0]} is beyond its range{f', and {len(whole) - 1} more' * (len(whole) > 1)}: kept as float32")
    error = measure.relative_change(measure.probed(network.module, shape), outputs)
    measures = Measures(measure.params(network.module), measure.macs(network.module, shape))
    if dataset is None or before is None:
        log(f"{dtype}: output error {error:.1e} on random images")
    else:
        now = report.evaluate(network, dataset, batch_size=batch_size, device=device)
        measures = replace(measures, accuracy=now.accuracy.top1, evaluated=now.to_json())
        was, is_ = before.accuracy.top1, now.accuracy.top1
        images = f"{now.accuracy.images:,} {now.split} images of {now.dataset}"
        log(f"{dtype}: accuracy {is_:.2f} %, {is_ - was:+.2f} points, before {was:.2f} %, on {images}")
    step = Step("export", None, {"dtype": dtype}, (), measures, error if math.isfinite(error) else None, __version__)
    network.recipe = replace(network.recipe.then(step), dtype=dtype)
    return network


def uncast_(network: Network, log: Callable[[str], None] = lambda line: None) -> None:
    """Have the network stored as it is computed, in float32: so is what changes from now on."""
    if network.recipe.dtype is not None:
        log(f"{network.name}: no longer stored in {network.recipe.dtype}, but in float32; --dtype rounds what comes of it")
        network.recipe = replace(network.recipe, dtype=None)


def _round_(network: Network, dtype: str) -> list[str]:
    """Round all that the file will hold; the names of tensors that stay as they are."""
    whole = []
    own = {**dict(network.module.named_parameters()), **dict(network.module.named_buffers())}
    for name in network.module.state_dict():
        tensor = own.get(name)
        if tensor is not None and tensor.is_floating_point():
            stored = artefact.stored(tensor.detach(), dtype)
            if stored.dtype == tensor.dtype:
                whole.append(name)
            tensor.data = stored.to(tensor.dtype)  # the same tensor, for whoever else holds it
    return whole
