"""The engine against a plain training loop of torch modules, and what holds between members of a population."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from collect import architectures, calibration, training
from collect.augmentation import Batches
from collect.calibration import unit
from collect.data import ImageSet, load
from collect.population import Population, layouts, train
from collect.recipe import Recipe
from collect.stacked import CALIBRATION_IMAGES
from generators.errors import ConfigError, UnknownNameError
from generators.filling import init
from generators.seeds import derive

BASE = Recipe(architecture="resnet-8-w4", epochs=2, batch_size=128, lr=0.05, saved="all")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load("digits")


@pytest.fixture(scope="module")
def base(images: ImageSet) -> Population:
    return train(BASE, [3, 4, 5], images)


def _plain(recipe: Recipe, seed: int, images: ImageSet) -> tuple[nn.Module, list[float]]:
    """One network with torch.optim, nn.Module and nothing of the engine but its batches; test accuracy per epoch."""
    model = architectures.build(recipe.architecture, shape=images.shape, classes=10)
    init(model, recipe.init, seed=derive(seed, "init"))
    if recipe.optimiser == "sgd":
        own = {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
        optimiser = torch.optim.SGD(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, **own)
    else:
        betas = (recipe.momentum, 0.999)
        optimiser = torch.optim.AdamW(model.parameters(), recipe.lr, betas=betas, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * (len(images.train) // recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    batches = Batches(
        images, [seed], batch_size=recipe.batch_size, augmentation=recipe.augmentation, device=torch.device("cpu")
    )

    def accuracy() -> float:
        norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
        stored = {name: value.clone() for name, value in model.state_dict().items()}
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images.train.images[:CALIBRATION_IMAGES])
        hits = (model.eval()(images.test.images).argmax(1) == images.test.labels).float().mean().item()
        model.load_state_dict(stored)
        for norm in norms:
            norm.momentum = 0.1
        return hits

    accuracies = [accuracy()]
    for _ in range(recipe.epochs):
        for pictures, labels in batches.epoch():
            model.train()
            optimiser.zero_grad()
            F.cross_entropy(model(pictures[0]), labels[0], label_smoothing=recipe.label_smoothing).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimiser.step()
            scheduler.step()
        accuracies.append(accuracy())
    return model, accuracies


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augmentation": "flip-crop", "label_smoothing": 0.1, "clip_norm": 0.5, "nesterov": True},
        {"architecture": "vit-1-w16"},
        {"architecture": "mlp-2-w16", "optimiser": "adamw", "lr": 3e-3, "weight_decay": 0.05},
    ],
)
def test_population_against_a_plain_loop(images: ImageSet, changes: dict) -> None:
    """Weights, buffers and accuracies after every epoch; float rounding grows with the steps, so the bound is loose."""
    recipe = dataclasses.replace(BASE, **changes)
    found = train(recipe, [3, 4], images)
    assert found.form == "grouped"
    for member, seed in enumerate([3, 4]):
        model, accuracies = _plain(recipe, seed, images)
        state = model.state_dict()
        for layout, rows in ((found.layout, found.weights), (found.buffer_layout, found.buffers)):
            for spec in layout:
                value = rows[member, -1, spec.offset : spec.offset + spec.length].reshape(spec.shape)
                expected = state[spec.name].float().numpy()
                assert np.abs(value - expected).max() <= 2e-3 * max(1.0, np.abs(expected).max()), spec.name
        measured = found.metrics[member, :, found.metric_names.index("test_accuracy")]
        assert np.abs(measured - accuracies).max() <= 0.01


def test_everything_a_zoo_needs_is_there(base: Population, images: ImageSet) -> None:
    module = architectures.build(BASE.architecture, shape=images.shape, classes=10)
    assert {spec.name for spec in (*base.layout, *base.buffer_layout)} == set(module.state_dict())
    assert sum(spec.length for spec in base.layout) == base.weights.shape[2]
    assert sum(spec.length for spec in base.buffer_layout) == base.buffers.shape[2]
    assert {spec.role for spec in base.buffer_layout} == {"running_mean", "running_var", "counter"}
    assert base.weights.shape[:2] == base.buffers.shape[:2] == (3, 3)
    assert base.checkpoint_epochs.tolist() == [0, 1, 2]
    assert base.evaluation_epochs.tolist() == [0, 1, 2]
    assert base.evaluation_steps.tolist() == [0, 10, 20]
    assert base.metrics.shape == (3, 3, 6)
    assert np.isfinite(base.metrics).all()
    assert base.status == ("ok",) * 3
    assert (base.metrics[:, -1, -1] > base.metrics[:, 0, -1] + 0.3).all()


def test_epoch_0_holds_what_the_initialiser_wrote(base: Population, images: ImageSet) -> None:
    for member, seed in enumerate(base.seeds):
        module = architectures.build(BASE.architecture, shape=images.shape, classes=10)
        init(module, "he", seed=derive(seed, "init"))
        for layout, rows in ((base.layout, base.weights), (base.buffer_layout, base.buffers)):
            for spec in layout:
                value = module.state_dict()[spec.name].float().flatten().numpy()
                assert np.array_equal(rows[member, 0, spec.offset : spec.offset + spec.length], value)


def test_same_seeds_give_the_same_bits_and_the_global_state_is_not_used(base: Population, images: ImageSet) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = train(BASE, [3, 4, 5], images)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(again.weights, base.weights)
    assert np.array_equal(again.metrics, base.metrics)


def test_a_member_alone_is_the_member_among_others(images: ImageSet) -> None:
    """Two steps, because other kernels run for other group counts and rounding grows (to 5e-3 in ten steps here)."""
    recipe = dataclasses.replace(BASE, epochs=1, batch_size=640)
    alone, among = train(recipe, [4], images), train(recipe, [3, 4, 5], images)
    assert np.array_equal(alone.weights[0, 0], among.weights[1, 0])
    np.testing.assert_allclose(alone.weights[0, 1], among.weights[1, 1], rtol=0, atol=1e-4)
    assert np.abs(among.weights[1, 1] - among.weights[0, 1]).max() > 0.1


# Narrow networks: their channels do not fill vectors, which shows in the rounding where it can.
ONE_OF_EACH = (
    "resnet-8-w2", "resnet-8-w4", "bare-resnet-8-w2", "cnn-3-w5", "vgg-3-w5", "mobilenet-3-w3", "mlp-2-w3", "vit-1-w16",
)  # fmt: skip


def test_one_of_each_family() -> None:
    assert {architectures.parse(name).family for name in ONE_OF_EACH} == set(architectures.families())


@pytest.mark.parametrize("architecture", ONE_OF_EACH)
def test_what_a_calibration_chooses_does_not_show_in_the_weights(
    images: ImageSet, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it finds one unit the fastest, or two, or four: the same bits, and one stack after the other."""
    recipe = dataclasses.replace(BASE, architecture=architecture, epochs=1, batch_size=640, augmentation="flip-crop")
    least = unit(architectures.build(architecture, shape=images.shape, classes=10))
    seeds, found = range(max(4 * least + 3, calibration.ENOUGH + 1)), []
    for stack in (least, 2 * least, 4 * least):
        chosen = calibration.Calibration({stack: 1.0}, 0)
        monkeypatch.setattr(calibration, "_once", lambda *anything, chosen=chosen: chosen)
        shares: list[float] = []
        found.append(train(recipe, seeds, images, tick=shares.append))
        assert found[-1].stack == stack and found[-1].calibration == {stack: 1.0}
        assert found[-1].seeds == tuple(seeds) and len(found[-1].status) == len(seeds)
        assert shares[0] == 0 and shares == sorted(set(shares))
    for name in ("weights", "buffers", "metrics"):
        one, two, four = (getattr(population, name) for population in found)
        assert np.array_equal(one, two) and np.array_equal(one, four), name


def test_stacks_one_after_the_other(images: ImageSet) -> None:
    """As many as asked for: three together, two and one, and each alone; two steps, for rounding grows."""
    recipe = dataclasses.replace(BASE, epochs=1, batch_size=640, augmentation="flip-crop")
    together, apart = train(recipe, [3, 4, 5], images), train(recipe, [3, 4, 5], images, stack=2)
    alone = [train(recipe, [seed], images) for seed in (3, 4, 5)]
    assert (together.stack, apart.stack, alone[0].stack) == (3, 2, 1)
    for name in ("weights", "buffers", "metrics"):
        np.testing.assert_allclose(getattr(apart, name), getattr(together, name), rtol=0, atol=1e-4)
        assert np.array_equal(getattr(apart, name)[2], getattr(alone[2], name)[0])


def test_fractional_epochs_and_chosen_checkpoints_do_not_change_the_training(
    base: Population, images: ImageSet
) -> None:
    recipe = dataclasses.replace(
        BASE, evaluations_per_epoch=4, evaluation_steps=(1,), saved=(0, 2), statistics="running"
    )  # fmt: skip
    often = train(recipe, [3, 4, 5], images)
    assert often.evaluation_epochs.tolist() == [0, 0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert often.evaluation_steps.tolist() == [0, 1, 2, 5, 8, 10, 12, 15, 18, 20]
    assert often.checkpoint_epochs.tolist() == [0, 2]
    assert np.array_equal(often.weights, base.weights[:, [0, 2]])
    assert np.array_equal(often.buffers, base.buffers[:, [0, 2]])
    assert not np.array_equal(often.metrics[:, 5, 1], base.metrics[:, 1, 1])  # other statistics, same networks


def test_the_initialiser_does_not_move_the_order_of_the_data(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two initialisers with one seed are paired: the same images in the same order, with the same augmentation."""
    seen: list[list[float]] = []

    class Watched(Batches):
        def epoch(self, *, skip: int = 0):
            for pictures, labels in super().epoch(skip=skip):
                seen[-1].append(float(pictures.double().sum()))
                yield pictures, labels

    monkeypatch.setattr(training, "Batches", Watched)
    final = []
    for name in ("he", "xavier"):
        seen.append([])
        recipe = dataclasses.replace(BASE, init=name, epochs=1, augmentation="flip-crop", saved="last")
        final.append(train(recipe, [3], images).weights)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 10
    assert not np.array_equal(*final)


def test_initialisers_that_need_data_get_training_images(images: ImageSet) -> None:
    """LSUV (Mishkin and Matas, ICLR 2016) scales every layer to unit output variance on the data it is given."""
    recipe = dataclasses.replace(BASE, architecture="mlp-2-w16", init="orthogonal+lsuv", epochs=1, saved=(0,))
    found = train(recipe, [3], images)
    spec = found.layout[0]
    weight = found.weights[0, 0, spec.offset : spec.offset + spec.length].reshape(spec.shape)
    outputs = images.train.images[:128].flatten(1) @ torch.from_numpy(weight).T
    assert abs(float(outputs.var()) - 1) < 0.1


def test_layouts_name_roles_and_places() -> None:
    weights, buffers = layouts(architectures.build("vgg-3-w4", shape=(1, 8, 8), classes=10))
    assert [spec.role for spec in weights[:3]] == ["conv_weight", "norm_scale", "norm_shift"]
    assert weights[1].offset == weights[0].length == 4 * 9
    assert [spec.length for spec in buffers[:3]] == [4, 4, 1]


def test_what_does_not_fit_is_refused(images: ImageSet) -> None:
    with pytest.raises(ConfigError, match="distinct seeds"):
        train(BASE, [1, 1], images)
    with pytest.raises(ConfigError, match="lower batch_size"):
        train(dataclasses.replace(BASE, batch_size=1296), [1], images)
    with pytest.raises(ConfigError, match="4 evaluations per epoch"):
        train(dataclasses.replace(BASE, batch_size=512, evaluations_per_epoch=4), [1], images)
    with pytest.raises(UnknownNameError, match="xavier"):
        train(dataclasses.replace(BASE, init="xavir"), [1], images)


def test_an_interruption_reaches_the_caller(images: ImageSet) -> None:
    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(BASE, [1], images, tick=stop)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_classifier_with_a_learning_rate_of_its_own(images: ImageSet, optimiser: str) -> None:
    """At rate 0 it stays and all else moves; at a tenth its first step is a tenth, those of the others are whole."""
    recipe = dataclasses.replace(
        BASE, architecture="cnn-2-w8", optimiser=optimiser, epochs=1, saved=(0, 1), batch_size=1024, lr=0.1
    )
    runs = {share: train(dataclasses.replace(recipe, classifier_lr=share), [3, 4], images) for share in (0.0, 0.1, 1.0)}
    steps = {share: (found.weights[:, 1] - found.weights[:, 0]) for share, found in runs.items()}
    last = np.zeros(steps[1.0].shape[1], dtype=bool)
    for spec in runs[1.0].layout[-2:]:  # weight and bias of the classifier
        last[spec.offset : spec.offset + spec.length] = True
    assert not steps[0.0][:, last].any() and (steps[0.0][:, ~last] != 0).mean() > 0.9
    np.testing.assert_allclose(steps[0.1][:, last], 0.1 * steps[1.0][:, last], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(steps[0.1][:, ~last], steps[1.0][:, ~last], rtol=1e-3, atol=1e-7)
