"""The training loop: determinism, best weights, distillation, hooks, and what it never touches."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compactcli import cifar, data, measure, optim, sources, train
from compactcli.errors import CompactError, UsageError
from compactcli.history import History, Watch
from compactcli.methods import Method, Progress
from compactcli.optim import Settings
from compactcli.recipe import Preprocessing

PREPROCESSING = Preprocessing(mean=(0.5,), std=(0.25,))
QUICK = Settings(epochs=3, batch_size=16, lr=0.1, precision="float32", weight_decay=0.0)


def network(seed: int = 0, classes: int = 3, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, classes))


def untouchable(index: Tensor) -> Tensor:
    raise AssertionError("the test images were read")


def dataset(count: int = 120, classes: int = 3) -> data.Dataset:
    """Noise, brighter in the channel of its class: separable after a few steps. Its test images must not be read."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 128, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 100
    test = data.Split("test", torch.zeros(4, dtype=torch.int64), (3, 8, 8), torch.arange(4), untouchable)
    return data.Dataset("colours", False, ("red", "green", "blue"), data.from_tensors(images, labels, "train"), test)


def fit(model: nn.Module, settings: Settings = QUICK, **options: Any) -> History:
    return train.fit_(model, options.pop("dataset", dataset()), PREPROCESSING, settings, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def settings(**values: Any) -> Settings:
    return Settings(**{"epochs": 3, "batch_size": 16, "lr": 0.1, "precision": "float32", "weight_decay": 0.0, **values})


class Told(nn.Module):
    """The classes and their scores, in one of the structures that networks give."""

    def __init__(self, structure: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.structure = network(), structure

    def forward(self, x: Tensor) -> Any:
        scores = self.inner(x)
        return self.structure(scores.argmax(1), scores)


@pytest.mark.parametrize("structure", [lambda *both: both, lambda *both: dict(enumerate(both)), lambda one, two: [two, one]])
def test_the_scores_are_what_is_trained_whatever_is_beside_them(structure: Callable[[Tensor, Tensor], Any]) -> None:
    plain, told = network(), Told(structure)
    expected, found = fit(plain, teacher=network(1)), fit(told, teacher=network(1))
    assert [record.loss for record in found.epochs] == [record.loss for record in expected.epochs]
    assert same(weights(told.inner), weights(plain))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_weights(precision: str) -> None:
    results = []
    for seed in (1, 1, 2):
        model = network()
        torch.rand(seed + len(results))  # torch's global random state is not the same
        fit(model, settings(precision=precision, seed=seed), keep="last")
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_learns(optimizer: str) -> None:
    model = network(dropout=0)
    history = fit(model, settings(epochs=10, optimizer=optimizer, lr=0.05))
    assert history.epochs[0].accuracy < 80
    assert history.best_accuracy > 95
    losses = [record.loss for record in history.epochs[1:] if record.loss is not None]
    assert losses[-1] < losses[0] / 2
    assert [record.epoch for record in history.epochs] == list(range(11))


def test_the_model_comes_back_ready_to_be_saved() -> None:
    model, teacher = network(), network(1)
    fit(model, teacher=teacher)
    for part in (model, teacher):
        assert not part.training
        assert all(tensor.is_contiguous() for tensor in part.state_dict().values())


class Spoil(Method):
    """Turns the last layer's sign at every step from epoch `start` on."""

    def __init__(self, start: int) -> None:
        self.start = start

    def project(self, model: nn.Module, progress: Progress) -> None:
        if progress.epoch >= self.start:
            with torch.no_grad():
                model.get_parameter("6.weight").mul_(-1)


def test_the_best_weights_are_restored() -> None:
    at_the_end: list[dict[str, Tensor]] = []

    class Remember(Method):
        def done(self, model: nn.Module) -> bool:
            at_the_end.append(weights(model))
            return False

    model = network(dropout=0)
    history = fit(model, settings(epochs=8), hooks=[Spoil(6), Remember()])
    assert 0 < history.best_epoch <= 6
    assert history.best_accuracy == max(record.accuracy for record in history.epochs)
    assert same(weights(model), at_the_end[history.best_epoch - 1])
    assert not same(weights(model), at_the_end[-1])


def test_a_model_never_gets_worse() -> None:
    model = network(dropout=0)
    fit(model, settings(epochs=10))
    before = weights(model)
    history = fit(model, settings(epochs=2, lr=0.0), hooks=[Spoil(0)])
    assert history.best_epoch == 0
    assert same(weights(model), before)


def test_a_search_keeps_its_last_weights() -> None:
    model = network()
    before = weights(model)
    fit(model, settings(epochs=1, lr=0.0), hooks=[Spoil(0)], keep="last")  # 7 steps, each turns the sign
    assert torch.equal(model.get_parameter("6.weight"), -before["6.weight"])


def test_a_learning_rate_of_zero_changes_only_batch_norm_statistics() -> None:
    model = network()
    before = weights(model)
    fit(model, settings(epochs=1, lr=0.0, weight_decay=0.1), keep="last")
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_no_epochs_measure_and_change_nothing() -> None:
    model = network()
    before = weights(model)
    history = fit(model, settings(epochs=0))
    assert len(history.epochs) == 1
    assert same(weights(model), before)


def test_a_teacher_alone_is_imitated() -> None:
    """A teacher that is sure of other classes than the labels: imitating it is not learning the labels."""
    teacher = network(3, dropout=0)
    fit(teacher, settings(epochs=10))
    with torch.no_grad():
        for name in ("6.weight", "6.bias"):
            teacher.get_parameter(name).copy_(teacher.get_parameter(name).roll(1, 0))
    teacher.zero_grad()
    state = weights(teacher)
    train_split = dataset().train
    assert train_split is not None
    inputs = data.normalise(train_split.images(), PREPROCESSING)

    def distance(student: nn.Module) -> float:
        with torch.no_grad():
            return float((student.eval()(inputs).softmax(1) - teacher(inputs).softmax(1)).abs().mean())

    student = network(0, dropout=0)
    before = distance(student)
    fit(student, settings(epochs=10, distill_weight=1.0), teacher=teacher, keep="last")
    assert distance(student) < before / 4
    assert same(weights(teacher), state)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_distillation_loss_is_hintons() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 5, 3, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1])
    p = (targets / 4).softmax(1)
    divergence = (p * (p.log() - (outputs / 4).softmax(1).log())).sum(1).mean()
    plain = -outputs.softmax(1).log()[torch.arange(5), labels].mean()
    loss = optim.loss(outputs, labels, targets, settings(distill_weight=0.3))
    assert torch.allclose(loss, 0.7 * plain + 0.3 * 16 * divergence)
    assert torch.allclose(optim.loss(outputs, labels, None, settings()), plain)


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(CompactError, match="the teacher has 4 classes, the network 3; try another --teacher"):
        fit(network(), teacher=network(classes=4))


def test_hooks_are_called_in_order() -> None:
    calls: list[str] = []

    class Watch(Method):
        def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
            calls.append("groups")
            return [{"params": [model.get_parameter("6.weight")], "lr": 0.2}]

        def regularise(self, model: nn.Module, progress: Progress) -> None:
            self.before = model.get_parameter("6.weight").detach().clone()
            gradient = model.get_parameter("6.weight").grad
            assert gradient is not None
            gradient.fill_(1.0)
            calls.append(f"regularise {progress.step}")
            self.rate = progress.learning_rates[1]

        def project(self, model: nn.Module, progress: Progress) -> None:
            step = (self.before - model.get_parameter("6.weight"))[0, 0].item()
            # The optimizer took the gradient that `regularise` left: Nesterov's first step is (1 + 0.9) lr.
            assert progress.step or step == pytest.approx(1.9 * self.rate, rel=1e-4)
            calls.append(f"project {progress.step} in epoch {progress.epoch} at {progress.share:.2f}")

        def done(self, model: nn.Module) -> bool:
            calls.append("done")
            return True

    ended = fit(network(), settings(epochs=2, schedule="constant", batch_size=54, warmup_epochs=0), hooks=[Watch()])
    assert len(ended.epochs) == 2  # before training, and the one epoch until a hook said done
    steps = ["regularise 0", "project 0 in epoch 0 at 0.00", "regularise 1", "project 1 in epoch 0 at 0.25"]
    assert calls == ["groups", *steps, "done"]


def test_learning_rates_warm_up_and_fall() -> None:
    seen: list[tuple[float, ...]] = []

    class Watch(Method):
        def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
            return [{"params": list(model.parameters()), "lr": 0.2}]  # leaves the plain group empty

        def project(self, model: nn.Module, progress: Progress) -> None:
            seen.append(progress.learning_rates)

    fit(network(), settings(epochs=10, batch_size=54), hooks=[Watch()])
    plain, own = zip(*seen, strict=True)
    assert plain[:3] == pytest.approx((0.1 / 3, 0.2 / 3, 0.1))  # a tenth of 20 steps of warm-up
    assert list(plain[2:]) == sorted(plain[2:], reverse=True)
    assert plain[-1] < 0.001
    assert own == pytest.approx([2 * rate for rate in plain])


def test_frozen_parameters_stay() -> None:
    model = network()
    model.get_parameter("0.weight").requires_grad_(False)
    before = weights(model)
    fit(model, settings(weight_decay=0.1), keep="last")
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])
    assert not torch.equal(model.get_parameter("6.weight"), before["6.weight"])


def test_a_last_batch_of_one_image_is_left_out() -> None:
    steps: list[tuple[int, int]] = []
    fit(network(), settings(epochs=1, batch_size=107), watch=Watch(progress=lambda done, total: steps.append((done, total))))
    assert steps == [(107, 108)]


class Break(Method):
    """Makes the weights infinite at step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def project(self, model: nn.Module, progress: Progress) -> None:
        if progress.step == self.step:
            with torch.no_grad():
                model.get_parameter("6.weight").fill_(torch.inf)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_best_weights() -> None:
    lines: list[str] = []
    model = network()
    history = fit(model, hooks=[Break(9)], watch=Watch(log=lines.append))
    assert lines[-1] == "stopped: the loss is not finite at step 10 of 21; try a lower --lr"
    assert len(history.epochs) == 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_loss_that_is_not_finite_is_an_error_where_there_is_no_way_back() -> None:
    with pytest.raises(CompactError, match="the loss is not finite at step 10 of 21; try a lower --lr"):
        fit(network(), hooks=[Break(9)], keep="last")
    broken = network()
    with torch.no_grad():
        broken.get_parameter("6.weight").fill_(torch.nan)
    with pytest.raises(CompactError, match="the network's outputs are not finite before training"):
        fit(broken)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_weights_that_break_in_the_last_step_are_never_kept(keep: str) -> None:
    """Even beside a network that was worse than guessing."""
    model = network(dropout=0)
    with torch.no_grad():
        model.get_parameter("6.bias").copy_(torch.tensor([-9.0, 9.0, -9.0]))
        model.get_parameter("6.weight").zero_()
    labelled = dataset()
    only = data.from_tensors(labelled.train.images(), torch.zeros(120, dtype=torch.int64), "train")  # type: ignore[union-attr]
    broken = replace(labelled, train=only)
    if keep == "last":
        with pytest.raises(CompactError, match="the outputs are not finite after epoch 1; try a lower --lr"):
            fit(model, settings(epochs=1, lr=0.0), dataset=broken, hooks=[Break(6)], keep=keep)
        return
    lines: list[str] = []
    history = fit(model, settings(epochs=1, lr=0.0), dataset=broken, hooks=[Break(6)], watch=Watch(log=lines.append))
    assert lines[-1] == "stopped: the outputs are not finite after epoch 1; try a lower --lr"
    assert history.best_epoch == 0
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_validation_images_are_decoded_once() -> None:
    read: list[int] = []
    given = dataset().train
    assert given is not None

    def counted(index: Tensor) -> Tensor:
        read.append(len(index))
        return given.read(index)

    fit(network(), dataset=replace(dataset(), train=replace(given, read=counted)))
    assert sorted(read) == [12, 108]


def test_each_epoch_has_a_line() -> None:
    lines: list[str] = []
    fit(network(), watch=Watch(log=lines.append))
    assert lines[0].startswith("before training: validation ")
    assert [line.partition(":")[0] for line in lines[1:]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("images/s" in line and "left" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: data.Dataset("mine", False, None, None, own.test), "the data mine has no training images"),
        (
            lambda own: data.Dataset("mine", False, None, data.from_tensors(own.train.images(), None, "all"), None),
            "have no labels",
        ),
        (
            lambda own: data.Dataset("mine", False, None, own.train.subset(torch.arange(3)), None),
            "too few to train and to validate",
        ),
    ],
)
def test_data_that_cannot_train(change: Callable[[data.Dataset], data.Dataset], message: str) -> None:
    with pytest.raises(CompactError, match=message):
        fit(network(), dataset=change(dataset()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": -1}, "epochs is -1; it must be 0 or more"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"batch_size": 1}, "batch-size is 1; it must be 2 or more, for batch-norm"),
        ({"distill_weight": 1.5}, "distill-weight is 1.5; it must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"optimizer": "adam"}, "optimizer is adam; it must be sgd or adamw"),
        ({"schedule": "step"}, "schedule is step"),
        ({"validation_share": 0.0}, "validation-share is 0.0"),
        ({"precision": "half"}, "precision is half"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**values)


def test_the_learning_rate_fits_the_optimizer() -> None:
    assert Settings().peak_lr == 0.05
    assert Settings(optimizer="adamw").peak_lr == 0.001
    assert Settings(optimizer="adamw", lr=0.3).peak_lr == 0.3


def test_the_demos_checkpoint_is_as_good_as_its_script_says() -> None:
    model = cifar.NETWORKS["resnet20"](in_channels=1, num_classes=10)
    file = Path(__file__).parents[1] / "examples" / "digits-resnet20.pt"
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,))
    digits = sources.open_dataset("digits", input_shape=(1, 32, 32), preprocessing=preprocessing)
    assert digits.test is not None
    tested = measure.accuracy(model, data.batches(digits.test, preprocessing, 256, "cpu"))
    assert tested.top1 == pytest.approx(98.80, abs=0.25)


def test_a_batch_in_parts_has_the_gradient_of_the_whole() -> None:
    """Without batch-norm, whose statistics are those of a part, and dropout."""
    results = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        fit(model, settings(epochs=1, accumulate=accumulate), keep="last")
        results.append(weights(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_large_gradients_are_scaled_down() -> None:
    norms: list[float] = []

    class Look(Method):
        def regularise(self, model: nn.Module, progress: Progress) -> None:
            for parameter in model.parameters():
                parameter.grad.fill_(3.0)  # type: ignore[union-attr]

        def project(self, model: nn.Module, progress: Progress) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))  # type: ignore[union-attr]

    fit(network(), settings(epochs=1, clip_grad=0.5), hooks=[Look()])
    assert norms == pytest.approx([0.5] * 7, rel=1e-4)


def test_the_averaged_weights_are_validated_and_kept() -> None:
    """By the recursion of the definition: decay d from step t on, min(d, (1 + t) / (10 + t))."""
    passed: list[dict[str, Tensor]] = []

    class Note(Method):
        def project(self, model: nn.Module, progress: Progress) -> None:
            passed.append(weights(model))

    model = network(dropout=0)
    expected = weights(model)
    fit(model, settings(epochs=1, ema=0.3), hooks=[Note()], keep="last")
    for step, now in enumerate(passed):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * own + (1 - decay) * now[name] for name, own in expected.items()}
    expected["1.num_batches_tracked"] = passed[-1]["1.num_batches_tracked"]
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_the_rate_falls_to_a_tenth_at_each_milestone() -> None:
    factor = optim.schedule(Settings(epochs=10, schedule="milestones", milestones=(0.5, 0.75), warmup_epochs=0), 10)
    assert [factor(step) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.skipif(not optim._computes_bfloat16(torch.device("cpu")), reason="needs bfloat16 arithmetic")
def test_training_is_in_the_precision_that_was_settled_on() -> None:
    """float32 where oneDNN's bfloat16 goes wrong: inputs narrower than the stride."""
    seen = set()
    model = nn.Sequential(nn.Conv2d(3, 8, 1, stride=16), nn.Flatten(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    fit(model, settings(epochs=1, precision="auto"))
    assert seen == {torch.float32}


def test_labels_are_smoothed() -> None:
    outputs, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    targets = torch.full((6, 4), 0.2 / 4).scatter(1, labels[:, None], 0.8 + 0.2 / 4)
    expected = -(targets * outputs.log_softmax(1)).sum(1).mean()
    assert torch.allclose(optim.loss(outputs, labels, None, Settings(label_smoothing=0.2)), expected)


def test_a_run_that_gets_no_better_ends() -> None:
    lines: list[str] = []
    still = settings(epochs=9, lr=0.0, batch_norm="frozen", patience=2)
    history = fit(network(), still, watch=Watch(log=lines.append))
    assert [record.epoch for record in history.epochs] == [0, 1, 2]
    assert lines[-1] == "stopped: no better epoch in 2"


def test_time_ends_a_run_between_two_steps() -> None:
    lines: list[str] = []
    steps: list[int] = []
    watch = Watch(log=lines.append, progress=lambda done, total: steps.append(done))
    history = fit(network(), settings(time_limit=1e-9), watch=watch)
    assert lines[-1] == "stopped: the time is up, at step 1 of 21"
    assert steps == [16]
    assert [(record.epoch, record.loss) for record in history.epochs] == [(0, None), (1, None)]  # what is kept is measured


def test_each_epoch_is_in_the_history_at_once() -> None:
    told: list[int] = []
    history = fit(network(), watch=Watch(history=lambda records: told.append(len(records))))
    assert told == [1, 2, 3, 4]
    assert history.epochs[-1].lr == pytest.approx(0.1 * optim.schedule(QUICK, 7)(20))
    assert all(record.images_per_second for record in history.epochs[1:])


def test_frozen_batch_norm_is_not_trained_on() -> None:
    model = network()
    before = weights(model)
    fit(model, settings(batch_norm="frozen"), keep="last")
    assert torch.equal(model.get_buffer("1.running_mean"), before["1.running_mean"])
    assert not torch.equal(model.get_parameter("1.weight"), before["1.weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch
def test_a_compiled_network_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tracer of torch.compile alone: its code generator takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = {}
    for compiled in (False, True):
        model = network(dropout=0)
        fit(model, settings(epochs=1, compile=compiled), keep="last")
        found[compiled] = weights(model)
    assert found[True].keys() == found[False].keys()
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor, rtol=1e-3, atol=1e-4)


def test_threads_that_decode_change_nothing() -> None:
    found = []
    for workers in (None, 0, 1, 3):
        model = network()
        fit(model, settings(workers=workers), keep="last")
        found.append(weights(model))
    assert all(same(found[0], other) for other in found[1:])


def test_the_loop_fits_on_a_few_screens() -> None:
    assert len(Path(train.__file__).read_text(encoding="utf-8").splitlines()) < 300
