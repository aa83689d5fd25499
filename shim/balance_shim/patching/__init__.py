"""Patches of other libraries: applied when their modules are imported, undone one by one, safe where they fail."""
