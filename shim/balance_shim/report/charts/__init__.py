"""Charts as SVG, for the page, for `plan --picture` and for `memory.svg`: fluid in width, in light and dark.

Horizontal positions are percentages, so that text keeps its size however wide the picture is.
"""
