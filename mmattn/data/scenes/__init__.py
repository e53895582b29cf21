"""Pictures of coloured shapes in relations, made on the fly, whose truth is known."""

from mmattn.data.scenes.dataset import ObjectRegion, SceneDataset
from mmattn.data.scenes.grammar import Translation
from mmattn.data.scenes.layout import HELD_OUT_PAIRS, Scene, SceneObject

__all__ = ["HELD_OUT_PAIRS", "ObjectRegion", "Scene", "SceneDataset", "SceneObject", "Translation"]
