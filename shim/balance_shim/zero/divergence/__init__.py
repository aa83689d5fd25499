"""Ranks that run different modules: detected and explained, or evened out where that is exact."""
