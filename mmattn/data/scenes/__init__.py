"""Scenes of coloured shapes in relations, made on the fly, whose truth is known: pictures, texts, translations."""

from mmattn.data.scenes.dataset import ObjectRegion, SceneDataset
from mmattn.data.scenes.layout import HELD_OUT_PAIRS, Scene, SceneObject
from mmattn.data.scenes.translation import SceneTranslations

__all__ = ["HELD_OUT_PAIRS", "ObjectRegion", "Scene", "SceneDataset", "SceneObject", "SceneTranslations"]
