"""LongSpec (arXiv 2502.17421) for Hugging Face transformers: lossless speculative decoding for long contexts.

Importing this package registers LongSpec drafts with the auto classes and lets `generate` take one as
`assistant_model`. Nothing changes for calls without one; `uninstall()` undoes it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import LongSpecCache
from .candidate_generator import LongSpecCandidateGenerator
from .configuration_longspec import LongSpecDraftConfig
from .convert import convert_checkpoint
from .hook import install, uninstall
from .modeling_longspec import LongSpecDraftModel, LongSpecDraftOutput
from .settings import with_tree_settings
from .stats import LongSpecGenerateOutput, SpeculationStats
from .tree import TokenTree
from .version import __version__

__all__ = [
    "LongSpecCache",
    "LongSpecCandidateGenerator",
    "LongSpecDraftConfig",
    "LongSpecDraftModel",
    "LongSpecDraftOutput",
    "LongSpecGenerateOutput",
    "SpeculationStats",
    "TokenTree",
    "__version__",
    "convert_checkpoint",
    "install",
    "uninstall",
    "with_tree_settings",
]

AutoConfig.register("longspec", LongSpecDraftConfig, exist_ok=True)
AutoModel.register(LongSpecDraftConfig, LongSpecDraftModel, exist_ok=True)
AutoModelForCausalLM.register(LongSpecDraftConfig, LongSpecDraftModel, exist_ok=True)
install()
