"""Recipes: functions that return a Config, for the data that ships and for people's own.

A recipe calls another and changes a few fields. `budget` sets the length of training: "short" is for a first look and
says so; "full" trains to where the baseline's Recall@1 on val stops rising.
"""

from collections.abc import Callable
from typing import Literal

from dml.config import Config
from dml.names import unknown

Budget = Literal["short", "full"]


def glyphs(budget: Budget = "full") -> Config:
    """Characters of the typefaces that matplotlib ships: about 2,000 classes, half of them never seen in training."""
    short = budget == "short"
    return Config().replace(
        **{"optim.lr": 3e-3, "train.epochs": 4 if short else 48, "train.eval_every": 1 if short else 4}
    )


def digits(budget: Budget = "full") -> Config:
    """scikit-learn's 1,797 handwritten digits, a toy: six classes train, two are val, two are test."""
    return Config().replace(
        **{
            "data.dataset": "digits",
            "data.image_size": 16,
            "batch.classes": 6,
            "batch.samples": 8,
            "train.epochs": 3 if budget == "short" else 20,
        }
    )


def image_folder(budget: Budget = "full") -> Config:
    """Your photographs, a folder a class: a pretrained ResNet-50 at 224 px. Set --data.root."""
    return Config().replace(
        **{
            "data.dataset": "image_folder",
            "data.image_size": 224,
            "data.channels": 3,
            "data.mean": 0.45,
            "data.std": 0.226,
            "data.augment": "crop",
            "encoder.name": "resnet50",
            "encoder.pretrained": True,
            "encoder.batch_norm": "frozen",
            "encoder.dim": 128,
            "batch.classes": 56,
            "batch.samples": 2,
            "optim.lr": 3e-5,
            "optim.weight_decay": 4e-4,
            "train.precision": "bf16",
            "train.epochs": 5 if budget == "short" else 50,
        }
    )


RECIPES: dict[str, Callable[[Budget], Config]] = {
    "glyphs": glyphs,
    "digits": digits,
    "image_folder": image_folder,
}


def build(name: str, budget: Budget = "full") -> Config:
    """The Config of a recipe.

    Raises:
        ValueError: unknown name; the valid ones are listed, nearest first.
    """
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[name](budget)
