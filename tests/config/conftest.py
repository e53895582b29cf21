from tests.toy_recipe import toy_tree

__all__ = ["toy_tree"]
