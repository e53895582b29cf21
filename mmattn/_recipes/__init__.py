"""The shipped recipes under one importable name.

In the wheel the recipe files lie in this folder. In a source tree they lie in `recipes/` beside the package, so that
they can be read, copied and launched directly; that folder is added to the search path here. Either way a recipe is
`mmattn._recipes.<name>`, also in worker processes that import it anew.
"""

from pathlib import Path

_source_tree = Path(__file__).resolve().parents[2]
if (_source_tree / "pyproject.toml").is_file() and (_source_tree / "recipes").is_dir():
    __path__.append(str(_source_tree / "recipes"))
