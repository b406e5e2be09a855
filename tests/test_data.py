"""Datasets: what is found where, in which order, at which size; laws of sampling, normalisation and augmentation."""

import gzip
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from compactcli import augment, data, sources, vision
from compactcli.errors import CompactError
from compactcli.recipe import Preprocessing

GREY = Preprocessing(mean=(0.5,), std=(0.5,))
COLOUR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def save(path: Path, colour: object = (10, 20, 30), size: tuple[int, int] = (4, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


def open_folder(root: Path, shape: data.Shape = (3, 4, 4), **options: object) -> data.Dataset:
    preprocessing = options.pop("preprocessing", COLOUR)
    return sources.open_dataset(str(root), input_shape=shape, preprocessing=preprocessing, **options)  # type: ignore[arg-type]


def split_of(labels: list[int]) -> data.Split:
    """A split whose image i is all i."""
    count = len(labels)
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return data.from_tensors(images, torch.tensor(labels), "train")


# Folders


def test_class_folders_are_labelled_by_their_sorted_names(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        for shade, name in enumerate(("bird", "cat", "ant")):
            save(tmp_path / part / name / "1.png", (shade, 0, 0))
    save(tmp_path / "train" / "ant" / ".hidden.png")
    save(tmp_path / "train" / ".cache" / "1.png")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    dataset = open_folder(tmp_path)
    assert dataset.name == tmp_path.name
    assert not dataset.named
    assert dataset.classes == ("ant", "bird", "cat")
    assert dataset.train is not None
    assert dataset.test is not None
    assert dataset.test.name == "test"
    assert data.labels_of(dataset.train).tolist() == [0, 1, 2]
    assert dataset.train.images()[:, 0, 0, 0].tolist() == [2, 0, 1]


def test_val_is_the_test_split_where_there_is_no_test(tmp_path: Path) -> None:
    save(tmp_path / "val" / "a" / "1.png")
    dataset = open_folder(tmp_path)
    assert dataset.train is None
    assert dataset.test is not None
    assert dataset.test.name == "val"


def test_bare_class_folders_are_training_data(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png")  # images right in it: a class that happens to be called train
    save(tmp_path / "plane" / "1.png")
    dataset = open_folder(tmp_path)
    assert dataset.classes == ("plane", "train")
    assert dataset.test is None


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    dataset = open_folder(tmp_path)
    assert dataset.train is not None
    assert dataset.train.name == "all"
    assert dataset.classes is None
    assert data.sample(dataset.train, 5, seed=0).shape == (1, 3, 4, 4)
    with pytest.raises(CompactError, match="no labels; put them in one folder per class"):
        next(data.batches(dataset.train, COLOUR, 1, "cpu"))


def test_images_beside_folders_are_told_of(tmp_path: Path) -> None:
    """A folder of thumbnails is no class, and a forgotten image is not left out in silence."""
    image = save(tmp_path / "1.png")
    save(tmp_path / "thumbs" / "1.png")
    with pytest.raises(CompactError, match=f"{re.escape(str(image))} lies beside folders, which are classes then"):
        open_folder(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_in_no_class_of_a_split_are_told_of(part: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / split / "a" / "1.png")
    image = save(tmp_path / part / "1.png")
    with pytest.raises(CompactError, match=f"{re.escape(str(image))} is in no folder of a class, as others in .*{part} are"):
        open_folder(tmp_path)


def test_a_split_without_classes_is_left_out_and_told_of(tmp_path: Path) -> None:
    """As the test images of a competition, whose classes nobody tells."""
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "test" / "1.png")
    lines: list[str] = []
    assert open_folder(tmp_path, log=lines.append).test is None
    assert lines == [f"{tmp_path.name}: left out test/, whose images are in no folders of classes"]


def test_the_classes_of_val_are_those_that_test_has(tmp_path: Path) -> None:
    save(tmp_path / "val" / "a" / "1.png")
    save(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(CompactError, match="a is a class that test/ does not have"):
        open_folder(tmp_path)


def test_a_class_that_is_only_in_test_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(CompactError, match="b is a class that train/ does not have"):
        open_folder(tmp_path)


def test_a_missing_class_folder_in_test_does_not_move_the_labels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "train" / name / "1.png")
    save(tmp_path / "test" / "b" / "1.png")
    test = open_folder(tmp_path).test
    assert test is not None
    assert data.labels_of(test).tolist() == [1]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompactError, match=r"holds no images \(\.apng .*\) and no folders of images"):
        open_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(CompactError, match="hold no images"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"not an image", r"2\.png is not an image"), (None, r"2\.png cannot be decoded")]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    save(tmp_path / "1.png")
    path = save(tmp_path / "2.png", size=(64, 64))
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    train = open_folder(tmp_path).train
    assert train is not None
    assert train.images(torch.tensor([0])).shape == (1, 3, 4, 4)  # only what is asked for is decoded
    with pytest.raises(CompactError, match=message):
        train.images()


def test_corrupt_files_are_left_out_on_request(tmp_path: Path) -> None:
    """The rest is what it would be without them; their number and the first of them are told."""
    for part, own in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        for number in range(3):
            save(tmp_path / part / own / f"{number}.png")
    lines: list[str] = []
    whole = open_folder(tmp_path, skip_corrupt=True, log=lines.append)
    assert lines == []
    bad = [tmp_path / "train" / "a" / f"bad{number}.png" for number in range(4)] + [tmp_path / "test" / "b" / "cut.jpg"]
    for path in bad[:4]:
        path.write_bytes(b"no image")
    bad[4].write_bytes(save(tmp_path / "x.png", size=(64, 64)).read_bytes()[:60])
    (tmp_path / "x.png").unlink()
    sound = open_folder(tmp_path, skip_corrupt=True, log=lines.append)
    for before, after in ((whole.train, sound.train), (whole.test, sound.test)):
        assert before is not None
        assert after is not None
        assert torch.equal(data.labels_of(before), data.labels_of(after))
        assert torch.equal(before.images(), after.images())
    first = ", ".join(f"train/a/bad{number}.png" for number in range(3))
    assert lines == [f"{tmp_path.name}: left out 5 corrupt images: {first} and 2 more"]
    train = open_folder(tmp_path).train
    assert train is not None
    with pytest.raises(CompactError, match=r"bad0\.png is not an image; remove it, or leave such files out with --skip-corrupt"):
        train.images()


def test_what_is_not_named_as_an_image_is_told(tmp_path: Path) -> None:
    """Pictures with endings that nothing here knows must not be missing unseen; hidden files are nobody's pictures."""
    for own in ("a", "b"):
        for number, suffix in enumerate((".png", ".jfif", ".JPE", ".heic", "")):
            save(tmp_path / own / f"{number}.png").rename(tmp_path / own / f"{number}{suffix}")
        save(tmp_path / own / ".hidden.png")
    (tmp_path / "b" / "labels.txt").write_text("b")
    lines: list[str] = []
    dataset = open_folder(tmp_path, log=lines.append)
    assert dataset.train is not None
    assert len(dataset.train) == 6
    assert len(dataset.train.images()) == 6
    assert lines == [f"{tmp_path.name}: left out 5 files that are not named as images are: .heic (2), no ending (2), .txt (1)"]


def test_unknown_data_lists_the_names() -> None:
    with pytest.raises(
        CompactError, match="no data 'digit'; it must be a folder of images, module:function, or one of digits, cifar10"
    ):
        sources.open_dataset("digit", input_shape=(3, 4, 4), preprocessing=COLOUR)
    with pytest.raises(CompactError, match="the network takes 4 channels; images have 1 or 3"):
        sources.open_dataset("digits", input_shape=(4, 4, 4), preprocessing=COLOUR)
    with pytest.raises(CompactError, match="--limit is 0"):
        sources.open_dataset("digits", input_shape=(1, 4, 4), preprocessing=GREY, limit=0)
    with pytest.raises(CompactError, match="unknown interpolation 'cubic'; it must be one of nearest, box, bilinear"):
        sources.open_dataset("digits", input_shape=(1, 4, 4), preprocessing=Preprocessing((0.5,), (0.5,), interpolation="cubic"))


def test_an_image_that_would_be_huge_once_it_is_scaled_is_refused(tmp_path: Path) -> None:
    """Its shorter side is made as long as the network wants, and the other as many times longer as it is."""
    save(tmp_path / "1.png", size=(1, 60_000))
    dataset = open_folder(tmp_path, (3, 224, 224), preprocessing=replace(COLOUR, resize=256))
    assert dataset.train is not None
    with pytest.raises(CompactError, match="1 x 60000 pixels, too narrow to be scaled"):
        dataset.train.images()


def test_images_beyond_memory_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png")
    monkeypatch.setattr("compactcli.images.MEMORY_LIMIT", 2 * 48)
    train = open_folder(tmp_path).train
    assert train is not None
    assert train.images(torch.tensor([0, 1])).shape[0] == 2
    with pytest.raises(CompactError, match=r"3 images of 3 x 4 x 4 take .* try --limit 2"):
        train.images()


def test_where_not_one_image_fits_a_smaller_shape_is_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "1.png")
    monkeypatch.setattr("compactcli.images.MEMORY_LIMIT", 47)
    train = open_folder(tmp_path).train
    assert train is not None
    with pytest.raises(CompactError, match=r"1 images of 3 x 4 x 4 take .* held at once; try a smaller --input-shape"):
        train.images()


def test_all_images_are_decoded_once(tmp_path: Path) -> None:
    path = save(tmp_path / "1.png", (1, 1, 1))
    train = open_folder(tmp_path).train
    assert train is not None
    with torch.inference_mode():
        images = train.images()
    assert not images.is_inference()  # they outlive the evaluation that asked for them
    path.unlink()
    assert train.images() is images
    assert torch.equal(train.images(torch.tensor([0])), images)


# Pixels


def pixels(path: Path, shape: data.Shape, resize: int | None = None) -> Tensor:
    preprocessing = Preprocessing((0.5,), (0.5,), resize)
    train = open_folder(path.parent, shape, preprocessing=preprocessing).train
    assert train is not None
    return train.images()[0]


def test_colour_becomes_luma_and_grey_is_repeated(tmp_path: Path) -> None:
    colour = save(tmp_path / "colour" / "1.png", (255, 0, 0))
    assert pixels(colour, (1, 4, 4)).unique().tolist() == [76]  # 0.299 of 255
    grey = save(tmp_path / "grey" / "1.png", 7, mode="L")
    assert pixels(grey, (3, 4, 4)).shape == (3, 4, 4)
    assert pixels(grey, (3, 4, 4)).unique().tolist() == [7]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "1.png")
    assert pixels(tmp_path / "1.png", (1, 4, 4)).unique().tolist() == [127]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.full((4, 4), 200, kind)).save(tmp_path / "1.tif")
    with pytest.raises(CompactError, match=r"1\.tif cannot be decoded \(32 bits a pixel, .*; remove it, or leave such files out"):
        pixels(tmp_path / "1.tif", (1, 4, 4))


def test_rows_stay_rows(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)  # (h, w, c)
    Image.fromarray(values).save(tmp_path / "1.png")
    assert torch.equal(pixels(tmp_path / "1.png", (3, 2, 3)), torch.from_numpy(values).permute(2, 0, 1))


def test_resize_and_crop_are_torchvisions(tmp_path: Path) -> None:
    torchvision = vision.torchvision()
    noise = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "1.png")
    transforms = torchvision.transforms
    steps = [transforms.Resize(24), transforms.CenterCrop((16, 20)), transforms.PILToTensor()]
    wanted = transforms.Compose(steps)(Image.fromarray(noise))
    assert torch.equal(pixels(tmp_path / "1.png", (3, 16, 20), resize=24), wanted)
    straight = transforms.PILToTensor()(transforms.Resize((16, 20))(Image.fromarray(noise)))
    assert torch.equal(pixels(tmp_path / "1.png", (3, 16, 20)), straight)


def test_normalise_is_torchvisions_formula() -> None:
    transforms = vision.torchvision().transforms
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = transforms.Normalize(COLOUR.mean, COLOUR.std)(images.float() / 255)
    assert torch.equal(data.normalise(images, COLOUR), wanted)
    assert data.normalise(images, COLOUR, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(CompactError, match="3 values of mean for images with 1 channels; try --mean"):
        data.normalise(images[:, :1], COLOUR)


# Named datasets


def test_digits_are_the_same_everywhere() -> None:
    digits = sources.open_dataset("digits", input_shape=(1, 8, 8), preprocessing=GREY)
    assert digits.named
    assert not digits.flip
    assert digits.train is not None
    assert digits.test is not None
    assert (len(digits.train), len(digits.test)) == (1296, 501)
    assert data.labels_of(digits.test).bincount().tolist() == [49, 51, 49, 51, 51, 51, 51, 50, 48, 50]
    assert int(digits.test.images().long().sum()) == 2_484_160  # recorded in 0.1: later versions test on the same images
    assert digits.train.images().max() == 255
    everything = torch.cat([digits.train.images(), digits.test.images()])
    assert len(everything.flatten(1).unique(dim=0)) == 1797  # none is in both


def test_digits_are_resized_to_the_network() -> None:
    digits = sources.open_dataset("digits", input_shape=(3, 32, 24), preprocessing=GREY, limit=20)
    assert digits.test is not None
    assert digits.test.images().shape == (20, 3, 32, 24)
    assert data.labels_of(digits.test).bincount().tolist() == [2] * 10


def test_mnist_files_are_read_and_never_mirrored(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for suffix in ("", ".gz"):  # torchvision looks for either
            pack = gzip.compress if suffix else bytes
            (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(
                pack(struct.pack(">iiii", 2051, 6, 28, 28) + pictures.tobytes())
            )
            (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(struct.pack(">ii", 2049, 6) + bytes(range(6))))
    mnist = sources.open_dataset("mnist", input_shape=(1, 28, 28), preprocessing=GREY, data_dir=tmp_path)
    assert mnist.named
    assert not mnist.flip
    assert mnist.train is not None
    assert torch.equal(mnist.train.images()[:, 0], torch.from_numpy(pictures))
    assert data.labels_of(mnist.train).tolist() == list(range(6))
    for content in (b"", struct.pack(">iiii", 2051, 6, 28, 28) + b"cut", b"neither"):
        (folder / "t10k-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(CompactError, match=r"mnist in .* is damaged \(.*\); remove it, and --download fetches"):
            sources.open_dataset("mnist", input_shape=(1, 28, 28), preprocessing=GREY, data_dir=tmp_path)


@pytest.mark.parametrize("name", sources.NAMES[1:])
def test_nothing_is_downloaded_unless_asked(tmp_path: Path, name: str) -> None:
    with pytest.raises(CompactError, match=f"{name} is not in .*; --download fetches it, --data-dir names another folder"):
        sources.open_dataset(name, input_shape=(3, 32, 32), preprocessing=COLOUR, data_dir=tmp_path)


# The user's own


def own(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(f"import torch\ndef load(split):\n    {body}\n")
    return f"{tmp_path / 'mine.py'}:load"


def test_a_function_gives_each_split(tmp_path: Path) -> None:
    spec = own(tmp_path, "return (torch.full((4, 1, 2, 2), 0.2), torch.arange(4)) if split == 'test' else None")
    dataset = sources.open_dataset(spec, input_shape=(1, 2, 2), preprocessing=GREY)
    assert dataset.train is None
    assert not dataset.named
    assert dataset.name == "mine.py:load"
    assert dataset.test is not None
    assert dataset.test.images().unique().tolist() == [51]


def test_a_function_may_import_torchvision_beside_another_torch(tmp_path: Path) -> None:
    """Simulated where it can be imported: a function that fails as that import does, once."""
    vision.torchvision()
    spec = own(
        tmp_path,
        "load.calls += 1\n    if load.calls == 1: raise RuntimeError('operator torchvision::nms does not exist')\n"
        "    return torch.full((4, 1, 2, 2), 0.2), torch.arange(4)\nload.calls = 0",
    )
    dataset = sources.open_dataset(spec, input_shape=(1, 2, 2), preprocessing=GREY)
    assert dataset.train is not None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", 'gave None for "train" and for "test"'),
        ("return torch.zeros(4, 2, 2), None", r"gave images of shape \(4, 2, 2\); wanted \(n, 1 or 3, h, w\)"),
        ("return torch.full((4, 1, 2, 2), 2.0), None", "gave floats outside 0 to 1"),
        ("return torch.full((4, 1, 2, 2), 256, dtype=torch.uint16), None", "gave integers from 256 to 256; wanted 0 to 255"),
        ("return torch.zeros(4, 1, 2, 2), torch.full((4,), 0.7)", "gave torch.float32; wanted images .* and labels as integers"),
        ("return torch.zeros(4, 1, 2, 2) * 1j, None", "gave torch.complex64; wanted images as uint8 or floats"),
        ("return torch.zeros(4, 1, 2, 2), torch.full((4,), 10**10)", "gave labels .* wanted .* from 0 up to 999999"),
        ("return torch.zeros(4, 1, 2, 2), torch.zeros(3, dtype=int)", r"gave labels of shape \(3,\); wanted \(4,\)"),
    ],
)
def test_what_a_function_gives_is_checked(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(CompactError, match=message):
        sources.open_dataset(own(tmp_path, body), input_shape=(1, 2, 2), preprocessing=GREY)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_labels_may_be_integers_of_any_size(tmp_path: Path, dtype: torch.dtype) -> None:
    body = f"return torch.zeros(4, 1, 2, 2), torch.tensor([0, 3, 1, 2], dtype={dtype})"
    found = sources.open_dataset(own(tmp_path, body), input_shape=(1, 2, 2), preprocessing=GREY)
    assert found.train is not None
    assert found.train.labels is not None
    assert found.train.labels.tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:load", r"cannot load .*: ModuleNotFoundError.*; it must be file\.py:name or package\.module:name"),
        (":load", "cannot load :load: ValueError"),
        ("no_such_file.py:load", r"there is no file no_such_file\.py"),
        ("compactcli.data:no_such_function", r"there is no 'no_such_function' in compactcli\.data"),
        ("compactcli.folders:SUFFIXES", r"compactcli\.folders:SUFFIXES is no function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(CompactError, match=message):
        sources.open_dataset(spec, input_shape=(1, 2, 2), preprocessing=GREY)


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_in_folders_of_a_class_are_of_that_class(part: str, tmp_path: Path) -> None:
    for place in ("a/0.png", "a/more/1.png", "b/images/2.png", "b/images/deep/3.png", "b/.hidden/4.png"):
        save(tmp_path / part / place)
    split = getattr(open_folder(tmp_path), part)
    assert data.labels_of(split).tolist() == [0, 0, 1, 1]


def test_classes_are_those_of_the_network_in_whatever_order_they_come(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl", "owl"):
        save(tmp_path / "train" / name / f"{len(list(tmp_path.rglob('*.png')))}.png")
    dataset, lines = open_folder(tmp_path), list[str]()
    for classes, labels in ((("cat", "dog", "owl"), [0, 1, 2, 2]), (("owl", "cat", "dog"), [1, 2, 0, 0]), (None, [0, 1, 2, 2])):
        found = data.as_named(dataset, classes, lines.append)
        assert data.labels_of(found.train).tolist() == labels
        assert found.classes == (classes or dataset.classes)
    assert not lines
    other = data.as_named(dataset, ("cat", "hen", "owl"), lines.append)
    assert data.labels_of(other.train).tolist() == [0, 1, 2, 2]
    assert lines == [
        f"warning: {tmp_path.name} has classes of other names than the network: "
        + ("class 1 is dog there, hen in what it was trained on")
    ]


# Laws


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_class_gives_its_share(labels: list[int], share: float, seed: int) -> None:
    count = round(share * len(labels))
    chosen = data.choose(torch.tensor(labels), len(labels), count, seed)
    assert len(chosen.unique()) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    for label in set(labels):
        taken = sum(labels[position] == label for position in chosen.tolist())
        assert abs(taken - count * labels.count(label) / len(labels)) <= 1 + len(set(labels)) / 2 * labels.count(label) / len(
            labels
        )


def test_small_classes_give_less() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert labels[data.choose(labels, 100, 50, 0)].bincount().tolist() == [45, 5]


def test_choosing_depends_on_the_seed_and_nests() -> None:
    labels = torch.arange(100) % 10
    few, many, other = data.choose(labels, 100, 20, 0), data.choose(labels, 100, 50, 0), data.choose(labels, 100, 20, 1)
    assert set(few.tolist()) < set(many.tolist())
    assert few.tolist() != other.tolist()
    assert torch.equal(few, data.choose(labels, 100, 20, 0))


@given(st.lists(st.integers(0, 2), min_size=4, max_size=40), st.integers(0, 9))
def test_validation_and_the_rest_are_the_whole(labels: list[int], seed: int) -> None:
    split = split_of(labels)
    rest, held_out = data.split_validation(split, 0.3, seed)
    assert sorted(torch.cat([rest.index, held_out.index]).tolist()) == list(range(len(labels)))
    for part in (rest, held_out):
        assert torch.equal(part.images()[:, 0, 0, 0].long(), part.index)
        assert data.labels_of(part).tolist() == [labels[position] for position in part.index]


def test_too_few_images_to_divide() -> None:
    with pytest.raises(CompactError, match=r"0\.1 of 2 training images is 0"):
        data.split_validation(split_of([0, 1]), 0.1, 0)


def test_batches_are_the_split_in_order() -> None:
    split = split_of([0, 1, 2, 0, 1])
    inputs, labels = (torch.cat(parts) for parts in zip(*data.batches(split, GREY, 2, "cpu"), strict=True))
    assert torch.equal(inputs, data.normalise(split.images(), GREY))
    assert labels.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("classes", "outputs", "agrees"), [(("a", "b", "c"), 3, True), (("a", "b", "c"), 4, False), (None, 4, True)]
)
def test_classes_must_be_the_networks(classes: tuple[str, ...] | None, outputs: int, agrees: bool) -> None:
    dataset = data.Dataset("mine", False, classes, split_of([0, 1, 2]), None)
    if agrees:
        data.check_classes(dataset, outputs)
    else:
        with pytest.raises(CompactError, match=f"the data mine has 3 classes, the network {outputs}"):
            data.check_classes(dataset, outputs)
    with pytest.raises(CompactError, match="the data mine has 3 classes, the network 2"):
        data.check_classes(dataset, 2)


# Augmentation


IMAGES = torch.randint(1, 256, (64, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(64)


def test_augmentation_does_not_depend_on_the_batch() -> None:
    whole = augment.varied(IMAGES, INDEX, 3, 7, flip=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    parts = torch.cat([augment.varied(IMAGES[part], INDEX[part], 3, 7, flip=True) for part in torch.split(order, 10)])
    assert torch.equal(parts, whole[order])


def test_every_way_to_move_and_mirror_an_image_is_as_likely() -> None:
    """Up and down, left and right, and mirrored, each whatever the others are."""
    count, ways = 4096, 5 * 5 * 2
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    made = augment.varied(image.expand(count, -1, -1, -1), torch.arange(count), 1, 0, flip=True)
    _, often = made.flatten(1).unique(dim=0, return_counts=True)
    assert len(often) == ways
    assert (often - count / ways).abs().max() < 5 * (count / ways) ** 0.5


def test_augmentation_depends_on_index_epoch_and_seed() -> None:
    same = IMAGES[:1].expand(64, -1, -1, -1)
    assert len(augment.varied(same, INDEX, 1, 0, flip=True).flatten(1).unique(dim=0)) > 20  # of 5 x 7 x 2 possible
    for epoch, seed in ((2, 0), (1, 1)):
        first, other = (augment.varied(IMAGES, INDEX, *when, flip=True) for when in ((1, 0), (epoch, seed)))
        assert not torch.equal(first, other)


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_shift_and_a_mirror(flip: bool) -> None:
    pad_y, pad_x = 2, 3  # an eighth of 16 x 24
    seen = set()
    for image, result in zip(IMAGES, augment.varied(IMAGES, INDEX, 1, 0, flip=flip), strict=True):
        padded = torch.nn.functional.pad(image, (pad_x, pad_x, pad_y, pad_y))
        moves = {
            (y, x, mirrored): (crop.flip(2) if mirrored else crop)
            for y in range(2 * pad_y + 1)
            for x in range(2 * pad_x + 1)
            for crop in [padded[:, y : y + 16, x : x + 24]]
            for mirrored in (False, True)
        }
        (move,) = [move for move, candidate in moves.items() if torch.equal(candidate, result)]
        seen.add(move)
    assert {y for y, _, _ in seen} == set(range(5))
    assert {x for _, x, _ in seen} == set(range(7))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


@pytest.mark.parametrize("workers", [None, 0, 1, 4])
def test_every_batch_is_fed_in_order(tmp_path: Path, workers: int | None) -> None:
    split = class_folder_split(tmp_path)
    batches = torch.split(torch.randperm(len(split), generator=torch.Generator().manual_seed(0)), 3)
    fed = list(data.feed(split, batches, workers))
    assert all(torch.equal(index, batch) for (index, _), batch in zip(fed, batches, strict=True))
    assert all(torch.equal(images, split.read(index)) for index, images in fed)


def test_images_beyond_memory_are_decoded_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never all at once, and never many batches ahead of the one that is used."""
    split = class_folder_split(tmp_path)
    read: list[int] = []

    def counted(index: torch.Tensor) -> torch.Tensor:
        read.append(len(index))
        return split.read(index)

    monkeypatch.setattr(data, "MEMORY_LIMIT", 3 * 8 * 8 * len(split) - 1)
    batches = torch.split(torch.arange(len(split)), 1)
    for number, _ in enumerate(data.feed(replace(split, read=counted), batches), 1):
        assert sum(read) <= number + 3
    assert read == [1] * len(split)


def test_a_damaged_file_ends_the_feed_with_its_name(tmp_path: Path) -> None:
    split = class_folder_split(tmp_path)
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(CompactError, match=r"0\.png is not an image"):
        list(data.feed(split, torch.split(torch.arange(len(split)), 2), 2))


def test_cutout_blanks_a_square_of_every_image() -> None:
    images = torch.full((200, 3, 16, 16), 7, dtype=torch.uint8)
    index = torch.arange(200)
    plain = augment.varied(images, index, 3, 0, flip=False)
    cut = augment.varied(images, index, 3, 0, flip=False, cutout=6, blank=(0.5, 0.25, 1.0))
    gone = (cut != plain).any(1)  # (n, h, w)
    assert torch.equal(cut.permute(0, 2, 3, 1)[gone].unique(dim=0), torch.tensor([[128, 64, 255]], dtype=torch.uint8))
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(gone.sum((1, 2)), rows * columns)  # a rectangle, cut off at the border
    assert int(rows.min()) >= 3
    assert int(rows.max()) == int(columns.max()) == 6
    assert (gone.sum((1, 2)) == 36).float().mean() > 0.3
    again = augment.varied(images[:5], index[:5], 3, 0, flip=False, cutout=6, blank=(0.5, 0.25, 1.0))
    assert torch.equal(cut[:5], again)


def class_folder_split(root: Path) -> data.Split:
    """Twelve images of 8 x 8 in two classes."""
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for number in range(6):
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    split = sources.open_dataset(str(root), input_shape=(3, 8, 8), preprocessing=Preprocessing((0.5,), (0.5,))).train
    assert split is not None
    return split


def test_a_link_to_nothing_is_an_error_as_a_file_is_that_cannot_be_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "b" / "1.png").symlink_to("nowhere")
    dataset = sources.open_dataset(str(tmp_path), input_shape=(3, 8, 8), preprocessing=COLOUR)
    with pytest.raises(CompactError, match=r"1\.png cannot be decoded .*--skip-corrupt"):
        dataset.train.read(torch.arange(3))


def test_too_few_classes_name_the_way_out():
    few = data.Dataset("few", False, ("a", "b"), None, None)
    with pytest.raises(CompactError, match="has 2 classes, the network 10; a class without images may be an empty folder"):
        data.check_classes(few, 10)
