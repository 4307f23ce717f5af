"""The command `longspec-hf`; one file per subcommand."""

from .main import main, make_parser

__all__ = ["main", "make_parser"]
