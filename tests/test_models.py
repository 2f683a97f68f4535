"""The shipped networks have the sizes that their papers and docstrings state, and the checkpoint is what it says."""

from __future__ import annotations

import pytest
import torch

from fastsharp import data
from fastsharp.data import _files
from fastsharp.errors import InputError
from fastsharp.models import demo_cnn, load_weights, mlp, resnet20


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    assert size(mlp((784, 512, 512, 10))) == 669_706
    assert size(demo_cnn()) == 29_738
    assert size(resnet20()) == 269_722


def test_shapes():
    assert mlp((6, 4, 3))(torch.zeros(2, 6)).shape == (2, 3)
    assert demo_cnn()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert resnet20(7, 1).eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("sizes", [(3,), (3, 0), (3, 2.5), ()])
def test_mlp_refuses_sizes_that_are_none(sizes):
    with pytest.raises(InputError, match="at least two positive whole numbers"):
        mlp(sizes)


def test_the_demo_checkpoint_reaches_its_stated_accuracy_on_the_embedded_test_images():
    """The stated accuracy is that of 10,000 images; on 1,000 of them it may differ by four binomial standard errors."""
    model = demo_cnn()
    stated = float(load_weights(model, _files.own_file("demo_cnn.safetensors"))["test_accuracy"])
    images = data.load("fashion_mnist_mini", split="test")
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.loader(images, batch_size=500))
    assert stated > 0.9
    assert abs(right / len(images) - stated) < 4 * (stated * (1 - stated) / len(images)) ** 0.5
