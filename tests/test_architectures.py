"""Networks are built by name."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compactcli import architectures, vision
from compactcli.errors import CompactError
from compactcli.recipe import Preprocessing


def test_torchvision_imports_though_its_operators_are_missing() -> None:
    """Simulated where they are present: the extension cannot be found, as if built for another torch."""
    program = """
import torch
from torch import ops
ops.load_library = lambda path: (_ for _ in ()).throw(OSError("built for another torch"))
from compactcli import vision
models = vision.torchvision().models
again = vision.torchvision().models
print(models is again, models.resnet18(weights=None)(torch.zeros(1, 3, 64, 64)).shape[1])
"""
    root = Path(architectures.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "1000"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_users_own_file_may_import_torchvision_though_its_operators_are_missing(tmp_path: Path, at_once: bool) -> None:
    """Simulated where they are present, by an import that fails once as the extension does."""
    first, within = ("import foreign", "pass") if at_once else ("", "import foreign")
    (tmp_path / "own_net.py").write_text(f"{first}\n\ndef make():\n    {within}\n    return foreign.Linear(2, 3)\n")
    (tmp_path / "foreign.py").write_text("""
import torch
from torch.nn import Linear
if not hasattr(torch.ops.torchvision, "qnms"):
    raise RuntimeError("operator torchvision::qnms does not exist")
""")
    program = f"""
import sys
from compactcli import architectures
sys.path.insert(0, {str(tmp_path)!r})
print(architectures.user({str(tmp_path / "own_net.py")!r} + ":make", None, (3, 8, 8)).build().out_features)
"""
    root = Path(architectures.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_names_are_all_known() -> None:
    names = architectures.names()
    assert {"cifar:resnet56", "cifar:vgg16_hetconv", "resnet50", "vgg16", "mobilenet_v2", "googlenet"} <= set(names)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet56", "unknown architecture 'resnet56'; did you mean cifar:resnet56"),
        ("resnt50", "did you mean resnet50"),
        ("cifar:resnt50", "did you mean cifar:resnet50"),
        ("zzz", r"unknown architecture 'zzz'$"),
        ("cifar:", "unknown architecture 'cifar:'"),
        ("hf-hub:somebody/something", "unknown architecture"),
        ("torchvision:resnt50", "unknown architecture 'torchvision:resnt50'; did you mean .*resnet50"),
        ("torchvision:cifar:resnet56", "unknown architecture"),
    ],
)
def test_unknown_names(name: str, match: str) -> None:
    with pytest.raises(CompactError, match=match):
        architectures.get(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("resnet50", {"weights": "DEFAULT"}, "resnet50 does not take the argument 'weights', only aux_logits"),
        ("cifar:resnet20", {"depth": 9}, "cifar:resnet20 does not take the argument 'depth', only in_channels, keys"),
        ("cifar:vgg16", {"classifier": "linear3"}, "cifar:vgg16 does not take the argument 'classifier'"),
        ("cifar:resnet20", {"width": 0}, "cifar:resnet20 cannot take width=0"),
        ("cifar:resnet20", {"width": 1 << 21}, "cifar:resnet20 cannot take width=2097152"),
        ("cifar:resnet20", {"num_classes": [10]}, r"cifar:resnet20 cannot take num_classes=\[10\]"),
        ("cifar:resnet20", {"num_classes": "ten"}, r"cifar:resnet20 \(num_classes=ten, .*\) cannot be built: "),
        ("cifar:resnet20", {"keys": "mine"}, "keys is 'mine', not one of akamaster, csg"),
        ("vgg16", {"width_mult": 0.5}, r"vgg16 \(width_mult=0.5\) cannot be built: .*width_mult"),
    ],
)
def test_refused_arguments(name: str, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(CompactError, match=match):
        architectures.get(name, kwargs).build(device="meta")


def test_preprocessing() -> None:
    resnet = architectures.get("resnet50")
    assert resnet.input_shape == (3, 224, 224)
    assert resnet.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 232, "bilinear")
    assert architectures.get("efficientnet_b0").preprocessing.interpolation == "bicubic"
    assert architectures.get("resnet50", input_shape=(3, 32, 32)).preprocessing.resize is None
    assert architectures.get("vit_b_16", {"image_size": 384}).input_shape == (3, 384, 384)
    grey = architectures.get("cifar:base", {"in_channels": 1})
    assert (grey.input_shape, grey.preprocessing.mean, grey.preprocessing.std) == ((1, 32, 32), (0.5,), (0.5,))
    assert architectures.get("cifar:vgg16_hetconv").preprocessing.std == (1.0, 1.0, 1.0)


def test_without_initialisation_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    for name in ("cifar:resnet20", "resnet18", "swin_t", "regnet_y_400mf", "convnext_tiny", "shufflenet_v2_x0_5"):
        network = architectures.get(name).build()
        assert all(not tensor.is_meta for tensor in network.state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)


def test_initialisation_is_the_ordinary_one() -> None:
    torch.manual_seed(1)
    ours = architectures.get("resnet18").build(initialise=True)
    torch.manual_seed(1)
    theirs = vision.torchvision().models.resnet18(weights=None)
    for (key, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("name", ["cifar:resnet20", "swin_t", "maxvit_t", "regnet_x_400mf", "vit_b_32"])
def test_buffers_are_right_without_initialisation(name: str) -> None:
    blank = dict(architectures.get(name).build().named_buffers())
    full = dict(architectures.get(name).build(initialise=True).named_buffers())
    assert blank.keys() == full.keys()
    assert all(torch.equal(blank[key], full[key]) for key in blank)


@pytest.mark.parametrize("name", ["cifar:mobilenet_v2", "resnet50", "regnet_y_128gf", "swin_v2_t", "inception_v3"])
def test_meta_networks_hold_no_memory(name: str) -> None:
    network = architectures.get(name).build(device="meta")
    assert all(tensor.is_meta for tensor in network.state_dict().values())


FACTORY = """
from torch import nn

def make(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten())

def wrong():
    return 3

number = 3
"""


def test_the_users_own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(FACTORY)
    file = f"{tmp_path}/own_nets.py"
    made = architectures.user(f"{file}:make", {"width": 6}, (3, 8, 8))
    assert (made.name, made.input_shape, made.kwargs) == ("own_nets.py:make", (3, 8, 8), {"width": 6})
    assert next(made.build().parameters()).shape == (6, 3, 3, 3)
    monkeypatch.syspath_prepend(tmp_path)
    assert architectures.user("own_nets:make", None, (1, 8, 8)).preprocessing.mean == (0.5,)
    for spec, match in [
        (f"{file}:wrong", "own_nets.py:wrong returns a int, not a torch.nn.Module"),
        (f"{file}:number", "own_nets.py:number is no factory"),
        (f"{file}:absent", "there is no 'absent' in .*own_nets.py"),
        (f"{tmp_path}/none.py:make", "there is no file .*none.py"),
        ("no_such_package.nets:make", "cannot load no_such_package.nets:make: ModuleNotFoundError"),
        ("make", "cannot load make: ValueError"),
    ]:
        with pytest.raises(CompactError, match=match):
            architectures.user(spec, None, (3, 8, 8)).build()
    with pytest.raises(CompactError, match=re.escape("cannot be built: make() got an unexpected keyword argument 'depth'")):
        architectures.user(f"{file}:make", {"depth": 6}, (3, 8, 8)).build()
    with pytest.raises(CompactError, match="give --input-shape"):
        architectures.user(f"{file}:make")


BESIDE = """from __future__ import annotations
from dataclasses import dataclass
from own_parts import WIDTH, layer

@dataclass
class Sizes:
    width: int = WIDTH

def make():
    import own_later_parts
    return layer(Sizes().width, own_later_parts.SIDE)
"""


@pytest.mark.parametrize("spec", ["nets/own_whole.py:make", "own_module:make"])
def test_a_users_file_imports_what_lies_beside_it(spec: str, tmp_path: Path) -> None:
    """As Python lets a script do, when it is loaded and when it is called; a module is looked for in the working folder."""
    folder = tmp_path / Path(spec).parent
    folder.mkdir(exist_ok=True)
    source = Path(spec.partition(":")[0]).with_suffix(".py")
    (tmp_path / source).write_text(BESIDE)
    (folder / "own_parts.py").write_text(
        "from torch import nn\nWIDTH = 6\ndef layer(width, side): return nn.Sequential(nn.Conv2d(3, width, side), nn.Flatten())"
    )
    (folder / "own_later_parts.py").write_text("SIDE = 5")
    code = f"from compactcli.architectures import user\nprint(user('{spec}', None, (3, 8, 8)).build()[0].weight.shape)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=_with_package()
    )
    assert done.stdout.strip() == "torch.Size([6, 3, 5, 5])", done.stderr


def test_what_lies_beside_a_users_file_hides_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "colorsys.py").write_text("raise SystemExit('run')")
    (tmp_path / "own_nets.py").write_text(f"import colorsys\n{FACTORY}")
    architectures.user(f"{tmp_path}/own_nets.py:make", None, (3, 8, 8)).build()


def test_a_users_file_that_fails_leaves_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_nets.py").write_text("1 / 0")
    before = set(sys.modules)
    with pytest.raises(CompactError, match="ZeroDivisionError"):
        architectures.user(f"{tmp_path}/own_nets.py:make", None, (3, 8, 8))
    assert not [name for name in set(sys.modules) - before if "own_nets" in name]


def _with_package() -> dict[str, str]:
    """The environment, in which this very package is found from any folder."""
    return os.environ | {"PYTHONPATH": str(Path(architectures.__file__).parents[1])}


def test_a_users_factory_is_never_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_nets.py:make", "own_nets:make"):
        with pytest.raises(CompactError, match="unknown architecture"):
            architectures.get(name)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", ["mobilenetv3_large_100.miil_in21k_ft_in1k", "resnet18.a1_in1k", "efficientnet_b0.ra_in1k"])
def test_a_folder_says_what_its_weights_were_trained_on(timm: Any, name: str, nested: bool) -> None:
    """As timm's own files do; a network has several weights, of which the best need not be these."""
    own = timm.get_pretrained_cfg(name).to_dict()
    expected = architectures.get(f"timm:{name}")
    config = {"architecture": name.partition(".")[0], "num_classes": 7, **({"pretrained_cfg": own} if nested else own)}
    found = architectures.configured(config)
    assert (found.input_shape, found.preprocessing) == (expected.input_shape, expected.preprocessing)
    assert architectures.configured(config, input_shape=(3, 64, 64)).preprocessing == replace(expected.preprocessing, resize=None)
    plain = architectures.get(f"timm:{name.partition('.')[0]}")
    assert architectures.configured({"architecture": name.partition(".")[0]}).preprocessing == plain.preprocessing


@pytest.mark.parametrize(
    "own",
    [{"mean": [0.5]}, {"std": [0, 0, 0]}, {"input_size": [3, 0, 32]}, {"input_size": "large"}, {"crop_pct": -1}, {"mean": 3}, 7],
)
def test_a_damaged_description_is_refused(timm: Any, own: Any) -> None:
    with pytest.raises(CompactError, match=r"what config\.json says of the input is damaged: .*; give --arch"):
        architectures.configured({"architecture": "resnet18", "pretrained_cfg": own})


def test_a_folder_of_timm_may_hold_a_network_without_a_head(timm: Any) -> None:
    found = architectures.configured({"architecture": "resnet18", "num_classes": 0})
    assert "fc.weight" not in found.build().state_dict()
    with pytest.raises(CompactError, match="timm:resnet18 cannot take in_chans=0"):
        architectures.get("timm:resnet18", {"in_chans": 0})


def test_timm_by_name(timm: Any) -> None:
    found = architectures.get("timm:resnet18.a1_in1k", {"num_classes": 5, "in_chans": 1})
    assert found.input_shape == (1, 224, 224)
    assert found.preprocessing.interpolation == "bicubic"
    network = found.build(device="meta")
    assert isinstance(network, nn.Module)
    assert network.state_dict()["fc.weight"].shape == (5, 512)
    with pytest.raises(CompactError, match="timm has no model 'resnet19'; did you mean"):
        architectures.get("timm:resnet19")
    with pytest.raises(CompactError, match="does not take the argument 'checkpoint_path'"):
        architectures.get("timm:resnet18", {"checkpoint_path": "weights.pth"})
    with pytest.raises(CompactError, match="timm has no model"):
        architectures.get("timm:hf-hub:somebody/something")


@pytest.mark.parametrize(("alias", "name"), architectures.ALIASES.items())
def test_an_alias_is_the_network_that_it_names(alias, name):
    assert architectures.get(alias) == architectures.get(name)
    assert any(isinstance(module, nn.BatchNorm2d) for module in architectures.get(alias).build(device="meta").modules())
