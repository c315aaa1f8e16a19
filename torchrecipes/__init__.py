"""Training recipes for language models, written to be read.

Importing this package costs nothing: its parts are imported by name.
"""

__version__ = "0.2.0"
